"""Continuous batching: a picture that others join and leave is the one drawn alone, and a fault is its own."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentrt import Batcher, BatcherOptions, Cancellation, Lora, Pipeline, Request, Result, Step
from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import (
    BundleError,
    CancelledError,
    ClosedError,
    DeadlineError,
    DeviceLostError,
    DrainingError,
    EngineError,
    NestedCallError,
    NotFiniteError,
    OutOfMemoryError,
    QueueFullError,
    RequestError,
)
from latentrt.engines.spec import Array, EngineView, Inputs
from latentrt.engines.workspace.contract import ALL, Workspace, WorkspaceShape
from latentrt.runtime.batching import drawing_loop
from latentrt.runtime.batching.observer import (
    Admitted,
    Cancelled,
    Delivered,
    Event,
    Failed,
    Refused,
    StageDone,
    Started,
)
from latentrt.runtime.batching.ticket import Ticket
from latentrt.runtime.calls import Limits
from latentrt.runtime.sampling.catalogue import sampler_names
from tests.lora_files import every_layer, kohya

WAIT_S = 300  # more than anything here takes; nothing is waited for by time alone
Kind = TypeVar("Kind")
NEAR_DB = 60  # kernels differ by how many rows there are


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def asked(seed: int, **options: Any) -> Request:
    known = {"prompt": f"a circle, the {seed}th", "steps": 4, "guidance": 3.0, **options}
    return Request(seed=seed, **known)


def psnr(one: Array, other: Array) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def answer(future: Future[Result]) -> Result:
    return future.result(WAIT_S)


def all_of(batcher: Batcher, requests: list[Request], *, pause: Callable[[], None] = lambda: None) -> list[Result]:
    futures = []
    for request in requests:
        futures += batcher.submit(request)
        pause()
    return [answer(future) for future in futures]


def together(monkeypatch: pytest.MonkeyPatch, batcher: Batcher, requests: list[Request]) -> list[Result]:
    """Draw requests of a picture each, all of them prepared by the second stage of the first, on whatever machine."""
    return [answer(future) for future in begun_together(monkeypatch, batcher, requests)]


def shared(
    batched: Pipeline, requests: list[Request], alone: list[Array], monkeypatch: pytest.MonkeyPatch, *, slots: int = 8
) -> int:
    """Draw requests together, each of which must give its picture of `alone`; return how many shared a stage."""
    told = list[Event]()
    with Batcher(batched, BatcherOptions(slots=slots), observer=told.append) as batcher:
        found = [result.pixels[0] for result in together(monkeypatch, batcher, requests)]
    for one, other, request in zip(alone, found, requests, strict=True):
        assert psnr(one, other) >= NEAR_DB, request
    return max(event.pictures for event in told if isinstance(event, StageDone))


def begun_together(monkeypatch: pytest.MonkeyPatch, batcher: Batcher, requests: list[Request]) -> list[Future[Result]]:
    """Have requests of a picture each drawn as `together` says."""
    prepared, all_asked, all_prepared = itertools.count(1), threading.Event(), threading.Event()
    prepare = drawing_loop.prepare

    def counted(*given: Any) -> None:
        prepare(*given)
        if next(prepared) == len(requests):
            all_prepared.set()

    def hold(_: int, step: Step) -> None:
        assert (all_asked if step.stage == 1 else all_prepared).wait(WAIT_S)

    monkeypatch.setattr(drawing_loop, "prepare", counted)
    futures = batcher.submit(requests[0], on_step=hold)
    for request in requests[1:]:
        futures += batcher.submit(request)
    all_asked.set()
    return futures


def test_every_sampler_draws_among_others_what_it_draws_alone(pipe: Pipeline) -> None:
    chance = random.Random(1)
    requests = [
        asked(seed, sampler=sampler, steps=chance.choice((3, 5, 8)), guidance=chance.choice((1.0, 4.0)))
        for seed, sampler in enumerate(name for name in sampler_names() if "flow" not in name)
    ]
    chance.shuffle(requests)
    alone = [pipe.draw(request) for request in requests]
    with Batcher(pipe, BatcherOptions(slots=5, waiting=len(requests))) as batcher:
        found = all_of(batcher, requests, pause=lambda: time.sleep(chance.random() / 50))
    for request, one, other in zip(requests, alone, found, strict=True):
        assert psnr(one.pixels[0], other.pixels[0]) >= NEAR_DB, request.sampler
        assert one.seeds == other.seeds and one.settings == other.settings
        assert len(other.step_seconds) == len(one.step_seconds)


def test_images_masks_and_texts_share_their_stages(pipe: Pipeline) -> None:
    width, height = pipe.manifest.default_size
    chance = np.random.default_rng(5)
    image = chance.integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[: height // 2] = 255
    requests = [
        asked(1, steps=6),
        asked(2, image=image, strength=0.6, steps=6),
        asked(3, image=image, mask=mask, steps=5),
        asked(4, guidance=1.0, variation_seed=9, variation_strength=0.4),
        asked(5, guidance_interval=(0.3, 0.8), guidance_rescale=0.7, steps=7),
        asked(6, tile=width // 2),
    ]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    with Batcher(pipe, BatcherOptions(slots=4)) as batcher:
        found = [result.pixels[0] for result in all_of(batcher, requests)]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= NEAR_DB


def test_the_pictures_of_a_request_count_their_seeds_up_and_can_be_drawn_again(pipe: Pipeline) -> None:
    with Batcher(pipe, BatcherOptions(slots=2)) as batcher:
        found = [answer(future) for future in batcher.submit(asked(7, n=3))]
    assert [result.seeds for result in found] == [(7,), (8,), (9,)]
    for result in found:
        again = pipe.draw(Request(prompt="a circle, the 7th", seed=result.seeds[0], steps=4, guidance=3.0))
        assert psnr(again.pixels[0], result.pixels[0]) >= NEAR_DB


def test_pictures_join_and_leave_in_mid_flight(pipe: Pipeline) -> None:
    """Fewer passes of the denoiser than stages in all: they were shared; and no more rows than there are slots for."""
    with Watched(pipe) as passes, Batcher(pipe, BatcherOptions(slots=3)) as batcher:
        all_of(batcher, [asked(seed, steps=3 + seed) for seed in range(6)])
    assert len(passes.rows) < sum(3 + seed for seed in range(6))
    assert max(passes.rows) <= 6 and max(passes.rows) > 2


def test_a_cancelled_picture_frees_its_slot_within_a_stage_and_disturbs_nobody(pipe: Pipeline) -> None:
    alone, cancel, seen = pipe.draw(asked(1, steps=6)), Cancellation(), list[int]()

    def watch(picture: int, step: Step) -> None:
        seen.append(step.stage)
        if step.stage == 2:
            cancel.cancel()

    with Batcher(pipe) as batcher:
        (lost,) = batcher.submit(asked(2, steps=40), on_step=watch, cancel=cancel)
        (kept,) = batcher.submit(asked(1, steps=6))
        with pytest.raises(CancelledError):
            answer(lost)
        assert psnr(answer(kept).pixels[0], alone.pixels[0]) >= NEAR_DB
    assert max(seen) <= 3


def test_cancelling_many_at_random_leaves_the_others_as_they_are(pipe: Pipeline) -> None:
    chance, alone = random.Random(3), pipe.draw(asked(0, steps=5))
    with Batcher(pipe, BatcherOptions(slots=4, waiting=200)) as batcher:
        kept, ended = [], []
        for number in range(60):
            if number % 6 == 0:
                kept += batcher.submit(asked(0, steps=5))
                continue
            cancel = Cancellation()
            ended += batcher.submit(asked(number, steps=12), cancel=cancel)
            threading.Timer(chance.random(), cancel.cancel).start()
        for future in kept:
            assert psnr(answer(future).pixels[0], alone.pixels[0]) >= NEAR_DB
        for future in ended:
            assert isinstance(future.exception(WAIT_S), CancelledError) or answer(future).pixels.any()
        batcher.drain()
        assert batcher.waiting == batcher.drawing == 0


def test_a_deadline_ends_a_picture_and_no_other(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        (late,) = batcher.submit(asked(1, steps=1000, deadline=0.2))
        (kept,) = batcher.submit(asked(2))
        with pytest.raises(DeadlineError):
            answer(late)
        assert answer(kept).pixels.shape[0] == 1


def test_what_a_watcher_raises_ends_its_own_picture(pipe: Pipeline) -> None:
    class BrokenError(Exception):
        pass

    def watch(picture: int, step: Step) -> None:
        assert step.preview.shape[0] == 1
        raise BrokenError

    with Batcher(pipe) as batcher:
        (ended,) = batcher.submit(asked(1), on_step=watch)
        (kept,) = batcher.submit(asked(2))
        assert isinstance(ended.exception(WAIT_S), BrokenError)
        assert answer(kept).seeds == (2,)


def test_a_full_line_refuses_at_once_and_takes_more_later(pipe: Pipeline) -> None:
    with Batcher(pipe, BatcherOptions(slots=1, waiting=3)) as batcher:
        taken = []
        with pytest.raises(QueueFullError) as refused:
            for seed in range(50):
                taken += batcher.submit(asked(seed, steps=20))
        assert refused.value.retryable and refused.value.retry_after_s >= 1
        with pytest.raises(RequestError) as never:
            batcher.submit(asked(1, n=4))
        assert never.value.field == "n" and not never.value.retryable
        for future in taken:
            answer(future)
        assert answer(batcher.submit(asked(1))[0]).seeds == (1,)


def test_a_draining_batcher_ends_what_it_took_and_takes_nothing_new(pipe: Pipeline) -> None:
    with Batcher(pipe, BatcherOptions(slots=2)) as batcher:
        taken = [future for seed in range(4) for future in batcher.submit(asked(seed, steps=8))]
        batcher.drain()
        assert all(future.done() and future.exception() is None for future in taken)
        with pytest.raises(DrainingError):
            batcher.submit(asked(1))
    with pytest.raises(ClosedError):
        batcher.submit(asked(1))


def test_closing_cancels_what_is_not_drawn(pipe: Pipeline) -> None:
    batcher = Batcher(pipe, BatcherOptions(slots=1))
    taken = [future for seed in range(3) for future in batcher.submit(asked(seed, steps=200))]
    batcher.close()
    assert all(isinstance(future.exception(WAIT_S), ClosedError) for future in taken)


def test_the_pipeline_itself_draws_in_between(pipe: Pipeline) -> None:
    expected = pipe.draw(asked(1))
    with Batcher(pipe) as batcher:
        (busy,) = batcher.submit(asked(2, steps=20))
        np.testing.assert_array_equal(pipe.draw(asked(1)).pixels, expected.pixels)
        assert answer(busy).seeds == (2,)
        assert answer(batcher.submit(asked(1))[0]).seeds == (1,)


@pytest.mark.parametrize("options", [{"slots": 0}, {"waiting": 0}])
def test_a_batcher_has_room_for_a_picture(pipe: Pipeline, options: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        Batcher(pipe, BatcherOptions(**options))


def test_bad_requests_are_refused_at_once(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        for options in ({"sampler": "nobody"}, {"size": (13, 8)}, {"guidance": float("nan")}, {"n": 0}):
            with pytest.raises(RequestError):
                batcher.submit(asked(1, **options))


class Watched:
    """A network of a pipeline, watched: how many rows each pass has.

    fault: may raise before a pass; spoil: is given what went in and what came out, which it may change
    """

    def __init__(
        self,
        pipe: Pipeline,
        fault: Callable[[Inputs], None] = lambda _: None,
        *,
        spoil: Callable[[Inputs, dict[str, Array]], None] = lambda *_: None,
        component: str = "unet",
    ) -> None:
        self._engines, self._component, self.rows = pipe.loaded.opened.engines, component, list[int]()
        self._fault, self._spoil = fault, spoil

    def __enter__(self) -> Watched:
        self._real, watched = self._engines[self._component], self

        class View(EngineView):
            def __call__(self, inputs: Inputs) -> dict[str, Array]:
                watched._fault(inputs)
                watched.rows.append(len(next(iter(inputs.values()))))
                outputs = self._engine(inputs)
                watched._spoil(inputs, outputs)
                return outputs

        self._engines[self._component] = View(self._real)
        return self

    def __exit__(self, *_: object) -> None:
        self._engines[self._component] = self._real


def test_an_engine_that_fails_once_in_mid_batch_costs_nobody_a_picture(pipe: Pipeline) -> None:
    requests = [asked(seed, steps=5 + seed) for seed in range(4)]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    failures = iter([EngineError("it tripped")])

    def fault(inputs: Inputs) -> None:
        if len(inputs["sample"]) > 4 and (error := next(failures, None)):
            raise error

    with Watched(pipe, fault), Batcher(pipe) as batcher:
        found = [result.pixels[0] for result in all_of(batcher, requests)]
    assert next(failures, None) is None
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= NEAR_DB


def test_a_picture_that_always_fails_fails_alone(pipe: Pipeline) -> None:
    """It is told from its neighbours, who meet it in one batch, by being tried alone."""
    poison = pipe.loaded.encode(_job(pipe, asked(3)), "unet")["encoder_hidden_states"][0]

    def fault(inputs: Inputs) -> None:
        if any(np.array_equal(row, poison) for row in inputs["encoder_hidden_states"]):
            raise EngineError("this text breaks it")

    with Watched(pipe, fault), Batcher(pipe) as batcher:
        futures = [future for seed in range(5) for future in batcher.submit(asked(seed, steps=6))]
        errors = [future.exception(WAIT_S) for future in futures]
    assert [isinstance(error, EngineError) for error in errors] == [False, False, False, True, False]


def _job(pipe: Pipeline, request: Request) -> Any:
    from latentrt.runtime.draw.job import resolve

    return resolve(request, pipe.manifest)


def test_numbers_that_leave_the_range_end_their_own_picture_within_the_stage(pipe: Pipeline) -> None:
    requests = [asked(seed, steps=6) for seed in range(4)]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    text = pipe.loaded.encode(_job(pipe, asked(2)), "unet")["encoder_hidden_states"][0]
    stages = itertools.count(1)

    def spoil(inputs: Inputs, outputs: dict[str, Array]) -> None:
        own = [np.array_equal(row, text) for row in inputs["encoder_hidden_states"]]
        if any(own) and next(stages) == 3:
            outputs["out_sample"][own] = np.inf

    with Watched(pipe, spoil=spoil), Batcher(pipe) as batcher:
        futures = [future for request in requests for future in batcher.submit(request)]
        lost = futures.pop(2).exception(WAIT_S)
        found = [answer(future).pixels[0] for future in futures]
    assert isinstance(lost, NotFiniteError) and lost.stage == 3
    for one, other in zip([*alone[:2], alone[3]], found, strict=True):
        assert psnr(one, other) >= NEAR_DB


def test_a_picture_that_cannot_be_decoded_fails_alone(pipe: Pipeline) -> None:
    told, decodings = Notes(), itertools.count(1)

    def fault(_: Inputs) -> None:
        if next(decodings) == 2:
            raise EngineError("it tripped")

    with Watched(pipe, fault, component="vae_decoder"), Batcher(pipe, observer=told) as batcher:
        futures = [future for seed in range(3) for future in batcher.submit(asked(seed, steps=4 + seed))]
        errors = [future.exception(WAIT_S) for future in futures]
    assert [type(error) for error in errors] == [type(None), EngineError, type(None)]
    assert [(one.picture, one.when) for one in told.of(Failed)] == [(2, "decoding")]


@pytest.mark.parametrize("component", ["unet", "vae_decoder", "text_encoder"])
def test_a_lost_device_ends_all_and_nothing_more_is_taken(pipe: Pipeline, component: str) -> None:
    told, runs, all_asked = Notes(), itertools.count(1), threading.Event()

    def fault(_: Inputs) -> None:
        assert all_asked.wait(WAIT_S)
        if next(runs) >= 2:
            raise DeviceLostError("it fell off the bus")

    requests = [asked(seed, steps=3 + 5 * seed, prompt=f"{component}, {seed}") for seed in range(6)]
    with Watched(pipe, fault, component=component), Batcher(pipe, BatcherOptions(slots=2), observer=told) as batcher:
        futures = [future for request in requests for future in batcher.submit(request)]
        all_asked.set()
        errors = [future.exception(WAIT_S) for future in futures]
        assert batcher.drain(WAIT_S)
        with pytest.raises(DeviceLostError):
            batcher.submit(asked(1))
    assert {type(error) for error in errors[2:]} == {DeviceLostError}
    assert [one.reason for one in told.of(Refused)] == ["lost"]
    assert len(told.of(Failed)) + len(told.of(Delivered)) == len(futures)


def test_without_room_for_many_fewer_are_drawn_at_a_time(pipe: Pipeline) -> None:
    def fault(inputs: Inputs) -> None:
        if len(inputs["sample"]) > 4:
            raise OutOfMemoryError("no room for more than two guided pictures")

    requests = [asked(seed, steps=6) for seed in range(6)]
    with Watched(pipe, fault) as passes, Batcher(pipe) as batcher:
        found = all_of(batcher, requests)
    assert [result.seeds for result in found] == [(seed,) for seed in range(6)]
    assert max(passes.rows) == 4


def test_one_picture_without_room_is_told_so(pipe: Pipeline) -> None:
    def fault(_: Inputs) -> None:
        raise OutOfMemoryError("no room at all")

    with Watched(pipe, fault), Batcher(pipe) as batcher:
        futures = [future for seed in range(3) for future in batcher.submit(asked(seed))]
        assert all(isinstance(future.exception(WAIT_S), OutOfMemoryError) for future in futures)


@pytest.mark.parametrize(
    "error", [OutOfMemoryError("no room for two"), EngineError("it tripped")], ids=["room", "fault"]
)
def test_who_is_drawn_already_is_answered_where_no_larger_workspace_can_be_made(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, error: EngineError
) -> None:
    real, refused = pipe.loaded.opened.workspace, list[int]()

    def make(space: LatentSpec, shape: WorkspaceShape, **further: Any) -> Workspace:
        if shape.pictures > 1:
            refused.append(shape.pictures)
            raise error
        return real(space, shape, **further)

    monkeypatch.setattr(pipe.loaded.opened, "workspace", make)
    with Batcher(pipe) as batcher:
        found = together(monkeypatch, batcher, [asked(seed, steps=6) for seed in range(3)])
    assert [result.seeds for result in found] == [(0,), (1,), (2,)] and refused


def test_a_device_that_is_lost_while_a_group_makes_way_for_another_leaves_nobody_without_an_answer(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipe.loaded.opened.workspace

    def make(*given: Any, **further: Any) -> Workspace:
        workspace = real(*given, **further)
        read = workspace.read

        def lost(name: str, rows: slice = ALL) -> Array:
            if rows.start == 1:  # the second picture's, after the first one's
                raise DeviceLostError("it fell off the bus")
            return read(name, rows)

        monkeypatch.setattr(workspace, "read", lost)
        return workspace

    monkeypatch.setattr(pipe.loaded.opened, "workspace", make)
    monkeypatch.setattr(drawing_loop, "LEAST_TURN_S", 1e-6)
    width, height = pipe.manifest.default_size
    requests = [asked(1, steps=20), asked(2, steps=20), asked(3, steps=20, size=(width + 16, height))]
    with Batcher(pipe, BatcherOptions(slots=2)) as batcher:
        futures = begun_together(monkeypatch, batcher, requests)
        errors = [future.exception(WAIT_S) for future in futures]
    assert [type(error) for error in errors] == [DeviceLostError] * 3


class Panic(BaseException):
    """What a library in Rust raises: it is no Exception."""


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_what_is_no_exception_ends_its_picture_and_no_thread(pipe: Pipeline, component: str) -> None:
    faults = iter([Panic("it panicked")])

    def fault(_: Inputs) -> None:
        if (error := next(faults, None)) is not None:
            raise error

    with Watched(pipe, fault, component=component), Batcher(pipe) as batcher:
        (poor,) = batcher.submit(asked(1, prompt=f"a panic in {component}"))
        assert isinstance(poor.exception(WAIT_S), EngineError)
        assert answer(batcher.submit(asked(2))[0]).seeds == (2,)
        assert batcher.drain(WAIT_S)


def test_a_watcher_that_ends_its_thread_ends_its_own_picture(pipe: Pipeline) -> None:
    def leave(*_: object) -> None:
        raise SystemExit

    with Batcher(pipe) as batcher:
        (poor,) = batcher.submit(asked(1), on_step=leave)
        assert isinstance(poor.exception(WAIT_S), EngineError)
        with pipe.loaded.turn.hold():  # nothing is drawn meanwhile
            (told,) = batcher.submit(asked(2))
            told.add_done_callback(leave)
        assert answer(told).seeds == (2,) and answer(batcher.submit(asked(3))[0]).seeds == (3,)
        assert batcher.drain(WAIT_S)


def test_lora_sets_and_sizes_take_turns_and_each_picture_has_its_own(
    pipe: Pipeline, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files):
        save_file(kohya(every_layer(sd1_checkpoint, seed=seed)), file)
    width, height = pipe.manifest.default_size
    choices: list[dict[str, Any]] = [
        {},
        {"loras": [Lora(file=files[0])]},
        {"loras": [Lora(file=files[1], scale=0.5)]},
        {"size": (width * 2, height)},
    ]
    requests = [asked(seed, steps=6, **choices[seed % 4]) for seed in range(12)]
    alone = [pipe.draw(request).pixels[0] for request in requests]
    with Batcher(pipe, BatcherOptions(slots=3)) as batcher:
        found = [result.pixels[0] for result in all_of(batcher, requests)]
    for one, other in zip(alone, found, strict=True):
        assert psnr(one, other) >= NEAR_DB
    assert len({one.tobytes() for one in found}) == len(found)


def test_a_group_has_its_turn_while_more_of_another_wait_than_are_prepared(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group whose turn it was waited behind them to be prepared, and they for the end of its turn."""
    monkeypatch.setattr(drawing_loop, "LEAST_TURN_S", 1e-4)  # shorter than a stage
    width, height = pipe.manifest.default_size
    with Batcher(pipe, BatcherOptions(slots=1)) as batcher:
        first = [batcher.submit(asked(seed, steps=20))[0] for seed in range(6)]
        (other,) = batcher.submit(asked(7, size=(width * 2, height)))
        assert [answer(future).seeds for future in (*first, other)] == [(seed,) for seed in (*range(6), 7)]


def test_weights_that_cannot_be_changed_end_whoever_needs_them_and_are_not_taken_for_changed(
    pipe: Pipeline, sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(kohya(every_layer(sd1_checkpoint, seed=3)), file)
    styled = asked(1, loras=[Lora(file=file)])
    alone, adapt, failures = pipe.draw(styled).pixels[0], pipe.loaded.adapt, iter([EngineError("no")])

    def fail_once(changes: Any) -> float:
        if changes and (error := next(failures, None)):
            raise error
        return adapt(changes)

    pipe.draw(asked(1))  # the base's weights again
    monkeypatch.setattr(pipe.loaded, "adapt", fail_once)
    again: list[Future[Result]] = []
    asked_again = threading.Event()
    with Batcher(pipe) as batcher:

        def ask_again(_: Future[Result]) -> None:  # at once, on the batcher's own thread
            again.extend(batcher.submit(styled))
            asked_again.set()

        (kept,) = batcher.submit(asked(2, steps=30))
        (lost,) = batcher.submit(styled)
        lost.add_done_callback(ask_again)
        assert isinstance(lost.exception(WAIT_S), EngineError)
        assert answer(kept).seeds == (2,)
        assert asked_again.wait(WAIT_S)
        assert psnr(answer(again[0]).pixels[0], alone) >= NEAR_DB


def test_a_lora_that_cannot_be_is_refused_at_once(pipe: Pipeline, tmp_path: Path) -> None:
    with Batcher(pipe) as batcher, pytest.raises(RequestError):
        batcher.submit(asked(1, loras=[Lora(file=tmp_path / "nowhere.safetensors")]))


class Notes:
    """What an observer was told, by kind."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]


def test_an_observer_is_told_what_becomes_of_pictures_and_of_stages(pipe: Pipeline) -> None:
    told = Notes()
    with Batcher(pipe, BatcherOptions(slots=2, slo=1000), observer=told) as batcher:
        (first,) = all_of(batcher, [asked(0, guidance=1.0)])
        taken = [batcher.submit(asked(seed, steps=6))[0] for seed in range(1, 4)]
        results = [answer(future) for future in taken]
        batcher.drain()
        with pytest.raises(DrainingError):
            batcher.submit(asked(1, n=2))
    assert [one.picture for one in told.of(Admitted)] == [1, 2, 3, 4]
    assert sorted(one.picture for one in told.of(Started)) == [1, 2, 3, 4]
    assert all(one.wait_s >= 0 for one in told.of(Started))
    stages, own, others = told.of(StageDone), len(first.step_seconds), 3 * len(results[0].step_seconds)
    assert sum(one.pictures for one in stages) == own + others and {one.capacity for one in stages} == {4}
    assert sum(one.used for one in stages) == own + 2 * others and {one.padded for one in stages} == {0}
    delivered = {one.picture: one for one in told.of(Delivered)}
    assert [delivered[number].promise for number in range(1, 5)] == ["none", "met", "met", "met"]
    assert [delivered[number].seconds for number in range(2, 5)] == [result.seconds for result in results]
    assert told.of(Refused) == [Refused(reason="draining", pictures=2)]
    assert not told.of(Cancelled) and not told.of(Failed)


def test_an_observer_is_told_when_and_why_pictures_end_early(pipe: Pipeline) -> None:
    told, cancels, all_asked = Notes(), [Cancellation() for _ in range(2)], threading.Event()

    def end_both(_: int, step: Step) -> None:
        assert all_asked.wait(WAIT_S)
        for cancel in cancels if step.stage == 2 else ():
            cancel.cancel()

    with Batcher(pipe, BatcherOptions(slots=1, waiting=3), observer=told) as batcher:
        (drawn,) = batcher.submit(asked(1, steps=40), on_step=end_both, cancel=cancels[0])
        (waits,) = batcher.submit(asked(2), cancel=cancels[1])
        (late,) = batcher.submit(asked(3, steps=1000, deadline=0.05))
        with pytest.raises(QueueFullError):
            batcher.submit(asked(4, n=3))
        all_asked.set()
        for future in (drawn, waits, late):
            assert isinstance(future.exception(WAIT_S), CancelledError | DeadlineError)
        (poor,) = batcher.submit(asked(5), on_step=lambda _, step: step.draft and None)  # there is no tiny decoder
        assert isinstance(poor.exception(WAIT_S), BundleError)
    ended = {one.picture: one for one in told.of(Cancelled)}
    assert (ended[1].when, ended[2].when) == ("drawing", "waiting")
    assert [ended[number].expired for number in (1, 2, 3)] == [False, False, True]
    assert [(one.picture, one.when, type(one.error)) for one in told.of(Failed)] == [(4, "drawing", BundleError)]
    assert [(one.reason, one.pictures) for one in told.of(Refused)] == [("full", 3)]


def test_an_observer_is_told_of_a_picture_before_anything_can_become_of_it(pipe: Pipeline) -> None:
    owed = list[bool]()

    def observe(event: Event) -> None:
        if isinstance(event, Admitted):
            owed.append(batcher.busy)

    with Batcher(pipe, observer=observe) as batcher, pipe.loaded.turn.hold():
        batcher.submit(asked(1, n=2))
        assert owed == [False, False] and batcher.busy


def test_an_observer_that_fails_costs_nobody_a_picture(pipe: Pipeline) -> None:
    def broken(event: Event) -> None:
        raise ValueError(event)

    with Batcher(pipe, observer=broken) as batcher:
        assert [result.seeds for result in all_of(batcher, [asked(1), asked(2)])] == [(1,), (2,)]


def test_a_future_that_is_cancelled_frees_its_slot(pipe: Pipeline) -> None:
    told, begun = Notes(), threading.Event()
    with Batcher(pipe, BatcherOptions(slots=1), observer=told) as batcher:
        (future,) = batcher.submit(asked(1, steps=1000), on_step=lambda *_: begun.set())
        assert begun.wait(WAIT_S) and future.cancel()
        assert answer(batcher.submit(asked(2))[0]).seeds == (2,)
    assert [(one.picture, one.when) for one in told.of(Cancelled)] == [(1, "drawing")]


def test_places_in_the_line_and_seconds_are_known_before_a_picture_is_drawn(pipe: Pipeline) -> None:
    wait, begun = threading.Event(), threading.Event()

    def hang(_: int, __: Step) -> None:
        begun.set()
        wait.wait(WAIT_S)

    with Batcher(pipe, BatcherOptions(slots=1)) as batcher:
        assert batcher.estimate(asked(1)) is None
        all_of(batcher, [asked(1)])
        short, long = (batcher.estimate(asked(1, steps=steps)) for steps in (4, 40))
        both = batcher.estimate(asked(1, n=2))
        assert short is not None and long is not None and 0 < short < long
        assert both == pytest.approx(2 * short)
        (first,) = batcher.submit(asked(1), on_step=hang)
        assert begun.wait(WAIT_S)
        futures = [batcher.submit(asked(seed))[0] for seed in (2, 3)]
        assert [batcher.position(future) for future in (first, *futures)] == [None, 1, 2]
        assert (batcher.waiting, batcher.drawing) == (2, 1) and batcher.expected_wait_s() >= 1
        at = batcher.last_stage_at
        assert batcher.last_stage_at == at  # nothing moves while a stage hangs
        wait.set()
        answer(futures[1])
        assert batcher.position(futures[1]) is None
        assert batcher.drain() and batcher.last_stage_at > at


def test_pictures_that_are_decoded_one_after_another_are_no_standstill(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pipe.loaded.opened), "fills_cores", False)  # stages go on beside a decoding that waits
    last_stages, decodings, after = threading.Semaphore(0), itertools.count(1), list[float]()
    second, go_on = threading.Event(), threading.Event()

    def fault(_: Inputs) -> None:
        if next(decodings) == 2:
            second.set()
            assert go_on.wait(WAIT_S)
        else:
            assert all(last_stages.acquire(timeout=WAIT_S) for _ in range(2))
            after.append(time.perf_counter())

    def count(_: int, step: Step) -> None:
        if step.stage == step.stages:
            last_stages.release()

    with Watched(pipe, fault, component="vae_decoder"), Batcher(pipe) as batcher:
        futures = batcher.submit(asked(1, n=2), on_step=count)
        assert second.wait(WAIT_S)
        at = batcher.last_stage_at
        go_on.set()
        assert at > after[0]
        assert [answer(future).seeds for future in futures] == [(1,), (2,)]


def test_pictures_may_leave_while_other_threads_ask_of_them(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(pipe) as batcher, pipe.loaded.turn.hold():  # the loop itself asks nothing meanwhile
        loop, reads = batcher._loop, iter([SimpleNamespace(tickets=[]), None])
        with monkeypatch.context() as patch:
            patch.setattr(type(loop), "_batch", property(lambda _: next(reads)), raising=False)
            assert loop.drawn == []
            reads = iter([SimpleNamespace(tickets=[]), None])
            job = _job(pipe, asked(1))
            ticket = Ticket(number=1, job=job, tokens=pipe.loaded.tokens(job), changes={}, limits=Limits())
            loop.line.owed += 1
            loop._end(ticket, CancelledError("enough"))
        assert isinstance(ticket.done.exception(WAIT_S), CancelledError)

    class Leaving:
        part, done = 0, 1

        def __bool__(self) -> bool:
            ticket.picture = None
            return True

    for ask in ("part", "stages_left", "group"):
        ticket.picture = Leaving()  # type: ignore[assignment]
        assert getattr(ticket, ask) is not None


def test_deadlines_that_keep_coming_do_not_keep_a_picture_without_one_waiting_for_ever(pipe: Pipeline) -> None:
    job = _job(pipe, asked(1))

    def urgency(number: int, began: float, deadline: float | None) -> tuple[float, int]:
        due = None if deadline is None else began + deadline
        limits = Limits(began=began, deadline=deadline)
        return Ticket(number=number, job=job, tokens={}, changes={}, limits=limits, due=due).urgency

    waits = urgency(1, 0.0, None)
    assert urgency(2, 0.0, 5.0) < waits < urgency(3, 3600.0, 5.0)
    assert waits < urgency(4, 0.0, None) < urgency(5, 1.0, None)


def test_while_another_call_has_the_turn_pictures_end_in_time_and_the_batcher_can_be_closed(pipe: Pipeline) -> None:
    cancel = Cancellation()
    with pipe.loaded.turn.hold():
        batcher = Batcher(pipe)
        (late,) = batcher.submit(asked(1, deadline=0.01))
        (gone,) = batcher.submit(asked(2), cancel=cancel)
        (last,) = batcher.submit(asked(3))
        cancel.cancel()
        assert isinstance(late.exception(WAIT_S), DeadlineError)
        assert isinstance(gone.exception(WAIT_S), CancelledError)
        batcher.close()
        assert isinstance(last.exception(0), ClosedError)


def test_a_pipeline_is_taken_away_while_nothing_is_drawn(pipe: Pipeline) -> None:
    wait, begun = threading.Event(), threading.Event()

    def hang(_: int, __: Step) -> None:
        begun.set()
        wait.wait(WAIT_S)

    with Batcher(pipe) as batcher:
        (busy,) = batcher.submit(asked(1), on_step=hang)
        assert begun.wait(WAIT_S)
        with batcher.hold(0.01) as quiet:
            assert not quiet
        assert not batcher.drain(0.01)
        wait.set()
        assert answer(busy).seeds == (1,)
    with Batcher(pipe) as batcher:
        taken = batcher.submit(asked(1))
        with batcher.hold() as quiet:
            assert quiet and taken[0].done()
            with pytest.raises(DrainingError):
                batcher.submit(asked(2))
            assert pipe.draw(asked(2)).seeds == (2,)
        assert answer(batcher.submit(asked(3))[0]).seeds == (3,)


@pytest.mark.parametrize("cancelled", [False, True])
def test_drawing_from_what_a_future_calls_is_an_error_not_a_deadlock(pipe: Pipeline, cancelled: bool) -> None:
    """It is called on the thread that draws or decodes, whose turn it is."""
    found, told, cancel = list[BaseException](), threading.Event(), Cancellation()

    def call(_: Future[Result]) -> None:
        try:
            pipe.draw(asked(1))
        except BaseException as error:
            found.append(error)
        told.set()

    with Batcher(pipe) as batcher:
        (future,) = batcher.submit(asked(2), cancel=cancel, on_step=lambda *_: cancel.cancel() if cancelled else None)
        future.add_done_callback(call)
        assert told.wait(WAIT_S)
    assert [type(error) for error in found] == [NestedCallError]
    assert len(pipe.draw(asked(3)).pixels) == 1
