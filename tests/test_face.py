"""The public face: names, streams, cancellation, the awaited form, nested calls, errors by who can act, the log."""

from __future__ import annotations

import asyncio
import logging
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

import latentrt
from latentrt import Cancellation, KeyFrame, Lora, Pipeline, Request, Result, Step, Stream, errors
from latentrt.engines.bundle.files import read_engine_record, write_manifest
from latentrt.engines.errors import backend_error
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, load
from latentrt.engines.spec import EngineSpec, TensorSpec
from tests.lora_files import every_layer, kohya
from tests.stand_in import bindings_of

QUICK: dict[str, Any] = {"steps": 3, "sampler": "euler_ancestral", "guidance": 3.0, "seed": 4}
ASKED = Request(prompt="a circle", **QUICK)
KEYS = [KeyFrame(prompt="a red circle", seed=1), KeyFrame(prompt="a blue square", seed=2)]
WAIT_S = 60  # more than anything here takes; nothing is waited for by time alone


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> Result:
    return pipe.draw(ASKED)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


# --- names ---


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Nor does asking for its errors; only what a name needs is imported with it."""
    code = """
import sys
import latentrt
latentrt.errors.EngineError
print([name for name in ("numpy", "PIL", "onnxruntime", "tokenizers", "latentrt.runtime") if name in sys.modules])
from latentrt import Request
print("latentrt.runtime.pipeline" in sys.modules)
"""
    found = run("-c", code)
    assert found.stdout.split("\n")[:2] == ["[]", "False"], found.stderr


@pytest.mark.parametrize("name", latentrt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(latentrt, name) is not None
    assert name in dir(latentrt)


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError):
        latentrt.Pipelines  # type: ignore[attr-defined] # noqa: B018


PROGRAM = """
import latentrt
from latentrt.engines.bundle.files import read_engine_record, write_manifest
from latentrt.engines.errors import backend_error
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, load
from latentrt.engines.spec import EngineSpec, TensorSpec
from latentrt import Cancellation, Control, KeyFrame, Lora, Pipeline, Request, Result, Step, errors

async def served(pipe: Pipeline, request: Request) -> Result:
    return await pipe.draw_async(request)

def main(path: str, cancel: Cancellation) -> list[int]:
    seen: list[int] = []
    def on_step(step: Step) -> None:
        seen.append(step.stage)
    with Pipeline.load(path) as pipe:
        try:
            result: Result = pipe("a circle", steps=4, loras=[Lora(file="a.safetensors")], on_step=on_step)
            with pipe.stream(Request(prompt="a circle"), cancel=cancel) as stream:
                for step in stream:
                    seen.append(step.stages)
                reveal_type(step.stage)
            result = stream.result
            for part in pipe.animate([KeyFrame(prompt="a", seed=1), KeyFrame(prompt="b", seed=2)], 4):
                result = part
        except errors.NotInstalledError as error:
            print(error.install, error.retryable)
    reveal_type(result.seeds)
    reveal_type(latentrt.Pipeline)
    return seen
"""
MISTAKE = """
from latentrt import Pipeline
Pipeline.load("shapes")("a circle", stepz=4)
"""


def test_a_program_that_uses_the_names_is_typed_strictly(tmp_path: Path) -> None:
    """As mypy sees it from outside, with nothing of this project's own settings."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mistake.py").write_text(MISTAKE)
    command = ["-m", "mypy", "--strict", "--no-incremental", "--config-file", "", "--follow-imports=silent"]
    found = run(*command, "program.py", "mistake.py", cwd=tmp_path)
    lines = found.stdout.splitlines()
    assert [line for line in lines if line.startswith("program.py") and ": error:" in line] == [], found.stdout
    notes = "\n".join(line for line in lines if "Revealed type" in line)
    assert "tuple[int, ...]" in notes and "latentrt.runtime.pipeline.Pipeline" in notes and "Any" not in notes
    assert any(line.startswith("mistake.py") and "stepz" in line and "[call-arg]" in line for line in lines)


# --- streams ---


def test_a_stream_gives_each_stage_and_then_what_a_call_gives(pipe: Pipeline, expected: Result) -> None:
    stream = pipe.stream(ASKED)
    assert [(step.stage, step.stages) for step in stream] == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(stream.result.pixels, expected.pixels)
    assert stream.result.seeds == expected.seeds and set(stream.result.seconds) == set(expected.seconds)


def test_the_result_is_the_value_of_an_outer_generator_too(pipe: Pipeline, expected: Result) -> None:
    def outer() -> Iterator[Step]:
        result = yield from pipe.stream(ASKED)
        assert np.array_equal(result.pixels, expected.pixels)

    assert len(list(outer())) == 3


def test_what_was_looked_at_stays_true_and_what_was_not_is_no_other_stage(pipe: Pipeline) -> None:
    then: list[np.ndarray] = []
    steps: list[Step] = []
    for step in pipe.stream(ASKED):
        steps.append(step)
        if step.stage == 1:
            then.append(step.latents.copy())
        if step.stage == 2:
            then += [step.keep().latents.copy(), step.predicted.copy(), step.preview.copy()]
    first, second, third = steps
    assert np.array_equal(first.latents, then[0])
    shown = (second.latents, second.predicted, second.preview)
    assert all(np.array_equal(a, b) for a, b in zip(shown, then[1:], strict=True))
    for look in (lambda: first.predicted, lambda: third.latents, third.keep, lambda: second.draft):
        with pytest.raises(errors.RequestError):
            look()


def test_a_kept_step_cannot_be_written_over(pipe: Pipeline) -> None:
    with pipe.stream(ASKED) as stream, pytest.raises(ValueError):
        next(stream).latents[:] = 0


def test_the_steps_of_a_stream_are_those_that_on_step_sees(pipe: Pipeline) -> None:
    told: list[np.ndarray] = []
    pipe.draw(ASKED, on_step=lambda step: told.append(step.latents))
    for step, latents in zip(pipe.stream(ASKED), told, strict=True):
        assert np.array_equal(step.latents, latents)


@pytest.mark.parametrize("end", ["close", "with", "drop", "error"])
def test_a_stream_that_is_left_early_lets_the_next_call_draw(pipe: Pipeline, expected: Result, end: str) -> None:
    stream: Stream | None = pipe.stream(ASKED)
    assert stream is not None
    step = next(stream)
    if end == "close":
        stream.close()
    elif end == "with":
        with stream:
            pass
    elif end == "error":
        with pytest.raises(KeyError), stream:
            raise KeyError
    if end == "drop":
        stream = None
    else:
        assert list(stream) == []
        with pytest.raises(errors.RequestError):
            stream.result  # noqa: B018
    with pytest.raises(errors.RequestError):
        step.latents  # noqa: B018
    assert np.array_equal(elsewhere(lambda: pipe.draw(ASKED)).pixels, expected.pixels)


def test_a_request_that_cannot_be_drawn_is_refused_before_a_stream_begins(pipe: Pipeline) -> None:
    with pytest.raises(errors.RequestError):
        pipe.stream(Request(prompt="a circle", steps=0))


def test_a_stream_may_go_on_in_another_thread(pipe: Pipeline, expected: Result) -> None:
    stream = pipe.stream(ASKED)
    next(stream)
    elsewhere(lambda: list(stream))
    assert np.array_equal(stream.result.pixels, expected.pixels)
    assert np.array_equal(pipe.draw(ASKED).pixels, expected.pixels)


# --- cancellation ---


def elsewhere(work: Callable[[], Any]) -> Any:
    """Return what work returns in another thread, or raise what it raises."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def target() -> None:
        try:
            found.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    if raised:
        raise raised[0]
    return found[0]


def test_a_call_is_cancelled_from_another_thread_between_two_stages(pipe: Pipeline, expected: Result) -> None:
    cancel, seen = Cancellation(), list[int]()

    def on_step(step: Step) -> None:
        seen.append(step.stage)
        if step.stage == 2:
            elsewhere(cancel.cancel)

    with pytest.raises(errors.CancelledError) as caught:
        pipe.draw(Request(prompt="a circle", **{**QUICK, "steps": 50}), on_step=on_step, cancel=cancel)
    assert seen == [1, 2] and not caught.value.retryable
    assert np.array_equal(pipe.draw(ASKED).pixels, expected.pixels)


def test_what_was_cancelled_before_it_began_draws_nothing(pipe: Pipeline) -> None:
    cancel = Cancellation()
    cancel.cancel()
    for call in (lambda: pipe.draw(ASKED, cancel=cancel), lambda: next(pipe.stream(ASKED, cancel=cancel))):
        with pytest.raises(errors.CancelledError):
            call()
    with pytest.raises(errors.CancelledError):
        next(pipe.animate(KEYS, 2, cancel=cancel, steps=2))


def test_a_call_that_waits_for_its_turn_is_cancelled_at_once(pipe: Pipeline) -> None:
    """It is the stream that is before it which it does not wait for: that one never ends in this test."""
    cancel, waits = Cancellation(), threading.Event()
    waking = cancel.waking

    def waked(wake: Callable[[], None]) -> Any:
        waits.set()
        return waking(wake)

    cancel.waking = waked  # type: ignore[method-assign]
    raised: list[type[BaseException]] = []

    def second() -> None:
        try:
            pipe.draw(ASKED, cancel=cancel)
        except errors.CancelledError as error:
            raised.append(type(error))

    with pipe.stream(ASKED) as stream:
        next(stream)
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(WAIT_S)
        cancel.cancel()
        thread.join(WAIT_S)
        assert raised == [errors.CancelledError]


def test_calls_of_many_threads_take_turns(pipe: Pipeline, expected: Result) -> None:
    begin = threading.Barrier(4)
    drawing = list[int]()  # how many calls drew at a time
    drawn = dict[int, np.ndarray]()

    def call(number: int) -> None:
        inside = list[int]()

        def on_step(step: Step) -> None:
            inside.append(number)
            drawing.append(number)

        begin.wait(WAIT_S)
        drawn[number] = pipe.draw(ASKED, on_step=on_step).pixels

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert all(np.array_equal(pixels, expected.pixels) for pixels in drawn.values()) and len(drawn) == 4
    runs = [drawing[start : start + 3] for start in range(0, 12, 3)]
    assert all(len(set(run)) == 1 for run in runs)  # the stages of two calls never mix


# --- nested calls ---

NESTED: dict[str, Callable[[Pipeline], Any]] = {
    "draw": lambda pipe: pipe.draw(ASKED),
    "call": lambda pipe: pipe("a circle", steps=1),
    "stream": lambda pipe: next(pipe.stream(ASKED)),
    "animate": lambda pipe: next(pipe.animate(KEYS, 2, steps=1)),
    "warm_up": lambda pipe: pipe.warm_up(),
    "await": lambda pipe: asyncio.run(pipe.draw_async(ASKED)),
    "remove_embedding": lambda pipe: pipe.remove_embedding("word"),
}


@pytest.mark.parametrize("name", [*NESTED, "close"])
def test_a_call_from_on_step_is_an_error_and_no_deadlock(pipe: Pipeline, expected: Result, name: str) -> None:
    call = NESTED.get(name, Pipeline.close)
    with pytest.raises(errors.NestedCallError):
        pipe.draw(ASKED, on_step=lambda step: call(pipe))
    assert np.array_equal(pipe.draw(ASKED).pixels, expected.pixels)


@pytest.mark.parametrize("name", NESTED)
def test_a_call_from_between_two_steps_is_an_error_and_the_stream_goes_on(
    pipe: Pipeline, expected: Result, name: str
) -> None:
    stream = pipe.stream(ASKED)
    for _ in stream:
        with pytest.raises(errors.NestedCallError):
            NESTED[name](pipe)
    assert np.array_equal(stream.result.pixels, expected.pixels)


# --- asyncio ---


def test_a_picture_is_awaited_while_the_loop_goes_on(pipe: Pipeline, expected: Result) -> None:
    async def main() -> Result:
        loop, seen = asyncio.get_running_loop(), asyncio.Event()

        def on_step(step: Step) -> None:
            if step.stage == 1:  # the drawing waits for the loop, which must therefore be free
                asyncio.run_coroutine_threadsafe(set_it(), loop).result(WAIT_S)

        async def set_it() -> None:
            seen.set()

        drawing = asyncio.create_task(pipe.draw_async(ASKED, on_step=on_step))
        await asyncio.wait_for(seen.wait(), WAIT_S)
        return await drawing

    assert np.array_equal(asyncio.run(main()).pixels, expected.pixels)


def test_awaited_pictures_are_drawn_on_one_thread_of_the_pipelines(pipe: Pipeline, expected: Result) -> None:
    names = set[str]()

    async def main() -> list[Result]:
        def on_step(step: Step) -> None:
            names.add(threading.current_thread().name)

        return await asyncio.gather(*(pipe.draw_async(ASKED, on_step=on_step) for _ in range(3)))

    assert all(np.array_equal(result.pixels, expected.pixels) for result in asyncio.run(main()))
    assert len(names) == 1 and threading.current_thread().name not in names


def test_cancelling_the_task_ends_the_drawing_between_two_stages(pipe: Pipeline, expected: Result) -> None:
    seen, cancelled = list[int](), threading.Event()

    async def main() -> None:
        begun, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_step(step: Step) -> None:
            seen.append(step.stage)
            loop.call_soon_threadsafe(begun.set)
            assert cancelled.wait(WAIT_S)

        task = asyncio.create_task(pipe.draw_async(Request(prompt="a", steps=50, seed=1), on_step=on_step))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()

    asyncio.run(main())
    assert np.array_equal(pipe.draw(ASKED).pixels, expected.pixels)  # waits for its turn: the other one has ended
    assert seen == [1]


def test_a_cancelled_task_that_had_not_begun_draws_nothing(pipe: Pipeline) -> None:
    seen = list[int]()

    async def main() -> None:
        with pipe.stream(ASKED) as stream:
            elsewhere(lambda: next(stream))
            first = asyncio.create_task(pipe.draw_async(ASKED, on_step=lambda step: seen.append(1)))
            second = asyncio.create_task(pipe.draw_async(ASKED, on_step=lambda step: seen.append(2)))
            await asyncio.sleep(0)  # both are in the queue now
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
        await first

    asyncio.run(main())
    assert seen == [1, 1, 1]


def test_an_awaited_picture_has_its_deadline_in_the_queue_too(pipe: Pipeline) -> None:
    async def main() -> None:
        with pipe.stream(ASKED) as stream:
            elsewhere(lambda: next(stream))
            waits = asyncio.create_task(pipe.draw_async(ASKED))
            await asyncio.sleep(0)
            with pytest.raises(errors.DeadlineError) as caught:
                await pipe.draw_async(Request(prompt="a", deadline=0.01))
            assert caught.value.retryable
        await waits

    asyncio.run(main())


# --- refused before the first frame ---


@pytest.mark.parametrize(
    ("keys", "count", "options"),
    [
        (KEYS[:1], 5, {}),
        (KEYS, 1, {}),
        (KEYS, 5, {"batch": 0}),
        (KEYS, 5, {"steps": 0}),
        (KEYS, 5, {"clip_skip": 99}),
        (KEYS, 5, {"deadline": -1}),
        (KEYS, 5, {"loras": [Lora(file="nowhere.safetensors")]}),
        (KEYS, 5, {"sampler": "nobody's"}),
        ("two keys", 5, {}),
        ([*KEYS, "a third"], 5, {}),
        ([*KEYS, KeyFrame(prompt="c", seed="3")], 5, {}),  # type: ignore[arg-type]
        ([*KEYS, KeyFrame(prompt=None, seed=3)], 5, {}),  # type: ignore[arg-type]
        ([*KEYS, KeyFrame(prompt="c", seed=3, negative_prompt=3)], 5, {}),  # type: ignore[arg-type]
        (KEYS, 5, {"batch": 4, "image": [np.zeros((32, 32, 3), np.uint8)] * 4}),  # and the last batch is one frame
    ],
)
def test_an_animation_is_refused_before_its_first_frame(
    pipe: Pipeline, keys: Any, count: int, options: dict[str, Any]
) -> None:
    with pytest.raises(errors.RequestError):
        pipe.animate(keys, count, **{"steps": 2, **options})  # and nobody asks for a frame


# --- errors ---

KINDS = (errors.CheckpointError, errors.BundleError, errors.EngineError, errors.RequestError)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_of_one_of_four_kinds_and_says_whether_to_try_again(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.LatentrtError) and isinstance(kind.retryable, bool)
    assert kind is errors.LatentrtError or sum(issubclass(kind, one) for one in KINDS) == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.NotInstalledError("no library", install="pip install library"),
        errors.WrongMachineError("another machine", differences=("device: a here, b there",)),
        errors.NotFiniteError("the latents", (0, 2), stage=3, stages=20),
        errors.OutOfMemoryError("no room"),
        errors.DeviceLostError("gone"),
        errors.DeadlineError("too late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_fields_on_the_way_to_another_process(error: errors.LatentrtError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_closed_pipeline_says_so_whatever_it_is_asked(sd1_bundle: Path) -> None:
    pipe = Pipeline.load(sd1_bundle, "cpu", threads=1)
    begun = pipe.stream(ASKED)
    next(begun)
    pipe.close()  # ends the stream of this thread instead of waiting for it
    pipe.close()
    assert list(begun) == []
    closed: list[Callable[[], Any]] = [
        lambda: pipe.draw(ASKED),
        lambda: next(pipe.stream(ASKED)),
        lambda: next(pipe.animate(KEYS, 2, steps=1)),
        lambda: asyncio.run(pipe.draw_async(ASKED)),
    ]
    for call in closed:
        with pytest.raises(errors.ClosedError) as caught:
            call()
        assert not caught.value.retryable


# --- the log ---


def test_it_is_silent_by_default_and_told_to_whoever_asks(sd1_bundle: Path) -> None:
    code = f"""
import logging, sys
from latentrt import Pipeline
if len(sys.argv) > 1:
    logging.basicConfig(level=sys.argv[1], format="%(levelname)s %(name)s %(message)s")
with Pipeline.load({str(sd1_bundle)!r}, "cpu") as pipe:
    pipe("a circle", steps=1)
logging.getLogger("latentrt").warning("heard only where somebody listens")
"""
    assert run("-c", code).stderr == ""
    told = run("-c", code, "DEBUG").stderr.splitlines()
    mine = [line.split(" ", 2) for line in told if " latentrt." in line]
    assert ("INFO", "loaded") in {(level, message.split()[0]) for level, _, message in mine}
    assert ("DEBUG", "drew:") in {(level, message.split()[0]) for level, _, message in mine}


def test_changing_weights_is_told_and_keeping_them_is_not(
    pipe: Pipeline, sd1_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(kohya(every_layer(sd1_checkpoint, seed=1, part="unet")), file)
    styled = replace(ASKED, loras=[Lora(file=file)])
    with caplog.at_level(logging.INFO, "latentrt"):
        for request in (ASKED, styled, styled, ASKED, ASKED):
            pipe.draw(request)
    told = [record.getMessage() for record in caplog.records if record.name == "latentrt.runtime.loaded"]
    assert ["unet" in line for line in told] == [True, False]


def test_slow_calls_stand_out(pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("latentrt.runtime.calls.SLOW_S", 0.0)
    with caplog.at_level(logging.INFO, "latentrt"):
        pipe.draw(ASKED)
    assert [record.levelno for record in caplog.records if record.name == "latentrt.runtime.calls"] == [logging.INFO]


def test_a_call_is_slow_too_that_took_most_of_its_deadline(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("latentrt.runtime.calls.SLOW_SHARE", 0.0)
    with caplog.at_level(logging.INFO, "latentrt"):
        pipe.draw(Request(prompt="a circle", deadline=600.0, **QUICK))
        pipe.draw(ASKED)
    assert len([record for record in caplog.records if record.name == "latentrt.runtime.calls"]) == 1


# --- errors at their sources ---


def test_what_onnx_runtime_has_no_room_for_is_out_of_memory_and_the_engine_goes_on(tmp_path: Path) -> None:
    """Real: more is asked for than any machine has."""
    onnx = pytest.importorskip("onnx")
    value, number = onnx.helper.make_tensor_value_info, onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Expand", ["x", "shape"], ["y"])],
        "grow",
        [value("x", number.FLOAT, [1]), value("shape", number.INT64, [1])],
        [value("y", number.FLOAT, ["n"])],
    )
    file = tmp_path / "grow.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), file)
    spec = EngineSpec(
        component="grow",
        inputs=(
            TensorSpec(name="x", dtype="float32", shape=(1,)),
            TensorSpec(name="shape", dtype="int64", shape=(1,)),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("n",)),),
    )
    one = np.ones(1, np.float32)
    with load(file, spec, "cpu", OnnxRuntimeOptions(threads=1)) as engine:
        with pytest.raises(errors.OutOfMemoryError) as caught:
            engine({"x": one, "shape": np.array([1 << 50])})
        assert caught.value.retryable and isinstance(caught.value, MemoryError)
        assert engine({"x": one, "shape": np.array([3])})["y"].tolist() == [1, 1, 1]
    with pytest.raises(errors.ClosedError):
        engine({"x": one, "shape": np.array([3])})


@pytest.mark.parametrize(
    "words",
    [
        # ONNX Runtime's arenas, its CUDA provider, cuDNN, cuBLAS; CUDA; TensorRT
        "Non-zero status code returned while running Conv node. Status Message: std::bad_alloc",
        "bfc_arena.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 4503599627370496",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=a",
        "CUDNN failure 4000: CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "cudaErrorMemoryAllocation (out of memory)",
        "[executionContext.cpp::enqueueInternal] Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)",
        "Requested amount of GPU memory (34359738368 bytes) could not be allocated.",
    ],
)
def test_a_library_that_says_that_there_is_no_room_is_understood(words: str) -> None:
    assert type(backend_error(words, words)) is errors.OutOfMemoryError


@pytest.mark.parametrize("words", ["", "Error Code 4: Shape Error", "INVALID_GRAPH", "device-side memory fault"])
def test_another_failure_is_no_lack_of_room(words: str) -> None:
    assert type(backend_error(words, words)) is errors.EngineError


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.NotInstalledError) as caught:
        Pipeline.load(sd1_bundle, "cpu")
    assert caught.value.install == "pip install 'latentrt[cpu]'" and caught.value.install in str(caught.value)
    assert not caught.value.retryable


def test_a_machine_without_a_gpu_is_the_wrong_one_for_tensorrt(
    sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentrt.engines.cuda.gpus.bindings", lambda: bindings_of([]))
    with pytest.raises(errors.WrongMachineError) as caught:
        Pipeline.load(sd1_bundle, "tensorrt")
    assert caught.value.differences == ()
    monkeypatch.setattr("latentrt.engines.cuda.gpus.bindings", lambda: None)
    with pytest.raises(errors.NotInstalledError) as missing:
        Pipeline.load(sd1_bundle, "tensorrt")
    assert missing.value.install == "pip install cuda-bindings"


def test_engines_of_another_machine_are_told_apart_by_what_differs(sd1_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "moved"
    shutil.copytree(sd1_bundle, bundle)
    (engines,) = (bundle / "engines").iterdir()
    record = read_engine_record(engines)
    key = msgspec.structs.replace(record.key, device="another processor")
    write_manifest(engines, msgspec.structs.replace(record, key=key))
    engines.rename(engines.with_name(key.directory))
    with pytest.raises(errors.WrongMachineError) as caught:
        Pipeline.load(bundle, "cpu")
    assert [difference.partition(":")[0] for difference in caught.value.differences] == ["device"]
