"""Compiled engines for host arrays, and every refusal on the way to running them as one sentence.

On the stand-in of tests/host_tensorrt.py, but for what the real libraries refuse on a machine without a GPU.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.errors import BundleError, ClosedError, EngineError, OutOfMemoryError
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import STATE_ROWS, control_width
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.engines import TensorRTSession
from latentrt.engines.tensorrt.execution import Kernels, open_program
from latentrt.engines.tensorrt.profiles import input_shapes
from latentrt.engines.tensorrt.text_encoder import STATES
from latentrt.engines.workspace.contract import ALL
from tests.graphs import model_of
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan
from tests.studio import (
    DRAWN,
    LONG,
    ONE,
    TALL,
    TWO,
    Request,
    Studio,
    assert_same,
    expected,
    make_studio,
    picture,
    spec_of,
)


@pytest.fixture(scope="module")
def studio(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return make_studio(Bundle.open(sd1_bundle), tmp_path_factory.mktemp("plans") / "bundle")


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    assert device.leftovers() == {} and not device.recording, "a test leaves nothing on the device"


def image(count: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)


def test_an_engine_computes_what_its_graph_computes_with_one_wait(studio: Studio, device: HostDevice) -> None:
    """Kernel by kernel, then from the graph; inputs of another type are converted, and may change after the call."""
    with studio.open(device) as session:
        engine = session.engine("vae_encoder")
        for seed in range(3):
            given = image(seed=seed)
            wanted = studio.run("vae_encoder", sample=given)
            device.forget()
            mine = given.astype(np.float64)
            (found,) = engine({"sample": mine}).values()
            mine.fill(0)
            assert device.counted()["wait"] == 1
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert set(device.counted()) == {"copy_in", "launch", "copy_out", "record", "wait"}


def test_an_engine_keeps_its_profiles_apart(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        encode = session.engine("text_encoder")
        for texts in (1, 4, 2, 4, 1):
            ids = np.random.default_rng(texts).integers(0, 500, (texts, 77))
            found = encode({"input_ids": ids})["last_hidden_state"]
            np.testing.assert_allclose(found, studio.run("text_encoder", input_ids=ids), atol=1e-5)
        assert device.counted()["begin_capture"] == 4  # the first again: four texts needed more scratch memory


def test_a_closed_engine_says_so_and_leaves_the_others(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        other = session.engine("text_encoder")
        with session.engine("vae_encoder") as engine:
            assert engine.spec == studio.record.specs["vae_encoder"]
            engine({"sample": image()})
        engine.close()
        with pytest.raises(ClosedError):
            engine({"sample": image()})
        other({"input_ids": np.zeros((1, 77))})


def test_a_session_hands_out_engines_as_often_as_asked(studio: Studio, device: HostDevice) -> None:
    with studio.open(device, components=["vae_encoder"]) as session:
        session.engine("vae_encoder").close()
        with session.engine("vae_encoder") as engine:
            engine({"sample": image()})
        with pytest.raises(EngineError, match=r" unet .* vae_encoder$"):
            session.engine("unet")
        with pytest.raises(EngineError, match=r" unet, .* vae_encoder$"):
            session.workspace(ONE, **DRAWN)


def test_shapes_that_no_engine_has_are_answered_with_the_command_that_builds_them(
    studio: Studio, device: HostDevice
) -> None:
    """The command names what there is as well: the engines it builds replace these."""
    root = studio.directory.parent.parent
    build = f"`latentrt build {root} --backend tensorrt"
    with studio.open(device) as session:
        with pytest.raises(EngineError) as caught:
            session.workspace(msgspec.structs.replace(ONE, pictures=3, width=512, height=768), **DRAWN)
        words = str(caught.value)
        assert words.startswith("unet ") and " pictures 3, tokens 77, latent_height 192, latent_width 128 " in words
        assert " pictures 1, rows 2, tokens 154, latent_height 8, latent_width 8;" in words
        assert f"{build} --size 32x32,32x48,512x768 --batch 1,2,3 --tokens 77,154`" in words
        with pytest.raises(EngineError) as caught:
            session.engine("vae_encoder")({"sample": image(3)})
        assert str(caught.value).startswith("vae_encoder ") and " batch 3, height 32, width 32 " in str(caught.value)
        assert f"{build} --size 32x32 --batch 1,3`" in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"pixels": image()}, "^vae_encoder .* sample, .* pixels$"),
        ({"sample": image()[0]}, r"^vae_encoder .* sample: float32\[.*\], .* \(3, 32, 32\)"),
    ],
)
def test_an_engine_names_what_it_takes(
    studio: Studio, device: HostDevice, inputs: Mapping[str, Array], told: str
) -> None:
    with studio.open(device) as session, pytest.raises(EngineError, match=told):
        session.engine("vae_encoder")(inputs)


def fewer_profiles(studio: Studio, component: str, profiles: Sequence[Mapping[str, int]]) -> Studio:
    """Return the studio with an engine that is compiled for some profiles only."""
    directory = Path(tempfile.mkdtemp(dir=studio.directory.parent))
    for file in studio.directory.iterdir():
        shutil.copyfile(file, directory / file.name)
    spec = msgspec.structs.replace(studio.record.specs[component], profiles=tuple(profiles))
    shapes = [input_shapes(spec, number) for number in range(len(profiles))]
    plan = directory / studio.record.entries[component]
    plan.write_bytes(json.dumps(shapes).encode() + b"\n" + plan.read_bytes().partition(b"\n")[2])
    record = msgspec.structs.replace(studio.record, specs=studio.record.specs | {component: spec})
    return replace(studio, directory=directory, record=record)


def changed(tensors: tuple[TensorSpec, ...], which: str, **fields: Any) -> tuple[TensorSpec, ...]:
    return tuple(msgspec.structs.replace(tensor, **fields) if tensor.name == which else tensor for tensor in tensors)


MISMATCHES: dict[str, tuple[Callable[[EngineSpec], EngineSpec], str]] = {
    "an input it has not": (
        lambda spec: msgspec.structs.replace(spec, inputs=changed(spec.inputs, "known", name="kept")),
        r"\bknown\b.*\bkept\b",
    ),
    "an output it has not": (
        lambda spec: msgspec.structs.replace(spec, outputs=changed(spec.outputs, "next_state", name="latents")),
        " next_state, .* latents",
    ),
    "another type": (
        lambda spec: msgspec.structs.replace(spec, inputs=changed(spec.inputs, "noise", dtype="float16")),
        r"\bnoise .*float32\[-1, 4, -1, -1\], .* noise: float16",
    ),
    "another number of state rows": (
        lambda spec: msgspec.structs.replace(
            spec, inputs=changed(spec.inputs, "state", shape=("pictures", 2, 4, "latent_height", "latent_width"))
        ),
        r"\bstate .*float32\[-1, 6, 4, -1, -1\], .* state: float32\[pictures, 2, 4",
    ),
    "another rank": (
        lambda spec: msgspec.structs.replace(spec, inputs=changed(spec.inputs, "picture_of_row", shape=("rows", 1))),
        r"\bpicture_of_row .*int64\[-1\], .* picture_of_row: int64\[rows, 1\]",
    ),
    "another number of profiles": (
        lambda spec: msgspec.structs.replace(spec, profiles=spec.profiles[:3]),
        " 8 .* 3",
    ),
    "other profiles": (
        lambda spec: msgspec.structs.replace(spec, profiles=(spec.profiles[1], spec.profiles[0], *spec.profiles[2:])),
        r"\bguidance .* 0 .*\[\(1, 1\)\], .* \(1, 2\)",
    ),
    "a profile without an axis": (
        lambda spec: msgspec.structs.replace(
            spec, profiles=({"pictures": 1, "rows": 1, "tokens": 77}, *spec.profiles[1:])
        ),
        r" latent_height, latent_width .*\bstate\b",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_an_engine_that_is_not_what_its_record_says_is_not_opened(
    studio: Studio, device: HostDevice, name: str
) -> None:
    change, told = MISMATCHES[name]
    specs = studio.record.specs | {"unet": change(studio.record.specs["unet"])}
    other = replace(studio, record=msgspec.structs.replace(studio.record, specs=specs))
    with pytest.raises(EngineError, match=rf"{told}.*`latentrt build --force`"):
        other.open(device)


def test_an_output_that_turns_out_of_another_size_is_refused(studio: Studio, device: HostDevice) -> None:
    """The compiler may not know an output's fixed axes before shapes are set."""
    spec = studio.record.specs["vae_encoder"]
    outputs = changed(spec.outputs, "latent_parameters", shape=("batch", 9, "height // 4", "width // 4"))
    specs = studio.record.specs | {"vae_encoder": msgspec.structs.replace(spec, outputs=outputs)}
    other = replace(studio, record=msgspec.structs.replace(studio.record, specs=specs))
    library = make_library(device, vague_outputs=True)
    told = r"^vae_encoder, profile 0 .* \(1, 8, 8, 8\), .*, 9, "
    with other.open(device, library=library) as session, pytest.raises(EngineError, match=told):
        session.engine("vae_encoder")({"sample": image()})


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (None, BundleError, r"unet\.engine .*No such file"),
        (b"", BundleError, r"unet\.engine .*empty file"),
        (b"no plan", EngineError, r"unet\.engine .*--force.*: the plan has no magic tag"),
    ],
)
def test_a_file_that_holds_no_engine_is_one_sentence(
    studio: Studio, device: HostDevice, tmp_path: Path, content: bytes | None, error: type[Exception], told: str
) -> None:
    directory = shutil.copytree(studio.directory, tmp_path / "host")
    (directory / "unet.engine").unlink()
    if content is not None:
        (directory / "unet.engine").write_bytes(content)
    with pytest.raises(error, match=told):
        replace(studio, directory=directory).open(device)


REFUSALS = {
    "deserialize_cuda_engine": r"\.engine ",
    "create_execution_context": "^unet, profile 0: ",
    "set_optimization_profile_async": "^unet, profile 0: ",
    "set_input_shape": r"^unet, profile 0: state .* \(1, 6, 4, 8, 8\)",
    "infer_shapes": r"^unet, profile 0: .* \(shape inference failed\)",
    "set_tensor_address": r"^unet, profile 0: .*\bstate\b",
    "execute_async_v3": "^text_encoder, profile 1: ",
    "execute_async_v3 in capture": "^text_encoder, profile 1: ",
}


@pytest.mark.parametrize("call", REFUSALS)
def test_what_the_library_refuses_is_said_in_its_own_words(studio: Studio, device: HostDevice, call: str) -> None:
    """Afterwards nothing is left on the device, and once the library is well again the same session draws."""
    library = make_library(device)
    library.refuses = {call}
    if call == "deserialize_cuda_engine":
        with pytest.raises(EngineError, match=rf"{REFUSALS[call]}.*: {call}: as the test wishes"):
            studio.open(device, library=library)
        return
    with studio.open(device, library=library) as session:
        with pytest.raises(EngineError, match=rf"{REFUSALS[call]}.*: {call}: as the test wishes"):
            picture(session.workspace(ONE, **DRAWN), studio, Request())
        assert not device.recording
        library.refuses = set()
        assert_same(picture(session.workspace(ONE, **DRAWN), studio, Request()), expected(studio, Request()))


def test_an_old_failure_is_not_told_as_the_reason_of_a_new_one(studio: Studio, device: HostDevice) -> None:
    library = make_library(device)
    with studio.open(device, library=library) as session:
        workspace = session.workspace(ONE, **DRAWN)
        library.refuses = {"create_execution_context"}
        with pytest.raises(EngineError):
            session.workspace(TWO, **DRAWN)
        library.refuses, library.silent = {"set_input_shape"}, True
        with pytest.raises(EngineError, match=r"^unet, profile \d+: state ") as caught:
            session.workspace(TALL, **DRAWN)
        assert "create_execution_context" not in str(caught.value)
        assert_same(picture(workspace, studio, Request()), expected(studio, Request()))


def test_a_device_without_room_says_so_and_keeps_what_it_has(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        workspace, held = session.workspace(ONE, **DRAWN), device.leftovers()
        picture(workspace, studio, Request())
        before = device.leftovers()["memory"]
        device.out_of_memory_above = session.scratch_bytes
        with pytest.raises(OutOfMemoryError):
            session.workspace(TALL, **DRAWN)
        assert device.leftovers()["pinned"] == held["pinned"] and device.leftovers()["memory"] <= before
        assert_same(picture(workspace, studio, Request()), expected(studio, Request()))


def test_rtx_contexts_never_exchange_kernels_under_a_graph(studio: Studio, device: HostDevice) -> None:
    """The stand-in of TensorRT-RTX lets a context be recorded only if its kernels are final."""
    with studio.open(device, library=make_library(device, rtx=True)) as session:
        workspace = session.workspace(ONE, **DRAWN)
        for _ in range(2):
            assert_same(picture(workspace, studio, Request()), expected(studio, Request()))
        assert device.counted()["begin_capture"] == 3


def test_a_context_that_cannot_be_recorded_is_an_error_and_no_slower_picture(
    studio: Studio, device: HostDevice
) -> None:
    library = make_library(device, rtx=True)
    library.refuses = {"is_stream_capturable"}
    with studio.open(device, library=library) as session, pytest.raises(EngineError, match=r"\bcuda_graphs=False"):
        picture(session.workspace(ONE, **DRAWN), studio, Request())
    with studio.open(device, library=library, graphs=False) as session:
        assert_same(picture(session.workspace(ONE, **DRAWN), studio, Request()), expected(studio, Request()))


def stage(rows: int = 1, **fields: Any) -> Callable[[Any], None]:
    """Return what runs one stage of one picture, with other numbers than it takes where there are some."""
    given: dict[str, Any] = {
        "control": np.zeros((1, control_width(STATE_ROWS))),
        "guidance": np.ones((1, rows)),
        "picture_of_row": np.zeros(rows, dtype=np.int64),
    }

    def run(workspace: Any) -> None:
        for name, array in (given | fields).items():
            workspace.write(name, array)
        workspace.run("unet")

    return run


def encode(shape: tuple[int, ...], *, name: str = "input_ids") -> Callable[[Any], None]:
    def run(workspace: Any) -> None:
        workspace.write(f"text_encoder.{name}", np.zeros(shape, dtype=np.int64))
        workspace.run("text_encoder")

    return run


def write(name: str, shape: tuple[int, ...], rows: slice = ALL) -> Callable[[Any], None]:
    return lambda workspace: workspace.write(name, np.zeros(shape), rows)


def ready(session: TensorRTSession, *, texts: int = 1) -> Any:
    workspace = session.workspace(ONE, **DRAWN)
    workspace.write("state", np.zeros((1, STATE_ROWS, 4, 8, 8)))
    encode((texts, 77))(workspace)
    return workspace


WRONG_STEPS: dict[str, Callable[[Any], Any]] = {
    "no such input": write("latents", (3,)),
    "a state of another size": write("state", (1, 2, 4, 8, 8)),
    "a slot that is not there": write("state", (1, STATE_ROWS, 4, 8, 8), slice(1, 2)),
    "more rows than were named": write("encoder_hidden_states", (2, 77, 32), slice(0, 1)),
    "text of another width": write("encoder_hidden_states", (2, 77, 5)),
    "no text": write("encoder_hidden_states", (0, 77, 32)),
    "more text than there is room for": write("encoder_hidden_states", (3, 77, 32)),
    "other inputs of the encoder": encode((1, 77), name="tokens"),
    "more texts than rows": encode((3, 77)),
    "no texts": encode((0, 77)),
    "longer texts": encode((1, 154)),
    "a number of rows": stage(3),
    "a picture that is not there": stage(picture_of_row=np.array([1])),
    "a picture before the first": stage(picture_of_row=np.array([-1])),
    "control of another width": stage(control=np.zeros((1, 7))),
    "guidance of other pictures": stage(guidance=np.ones((2, 1))),
    "owners of another number of rows": stage(guidance=np.ones((1, 2))),
    "noise of another shape": stage(noise=np.zeros((1, 4, 8, 9))),
    "too few rows of text": stage(2),
    "a stage without its numbers": lambda workspace: workspace.run("unet"),
    "a program that is not there": lambda workspace: workspace.run("vae_encoder"),
    "pixels of no picture": lambda workspace: workspace.read("pixels"),
    "more rows than are compiled": lambda workspace: workspace.fit("unet", 3),
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_a_workspace_refuses_what_does_not_fit_it(studio: Studio, device: HostDevice, name: str) -> None:
    with studio.open(device) as session:
        workspace = ready(session)
        with pytest.raises(EngineError):
            WRONG_STEPS[name](workspace)
        assert_same(picture(workspace, studio, Request()), expected(studio, Request()))


@pytest.mark.parametrize("name", ["state", "encoder_hidden_states"])
def test_a_workspace_refuses_to_draw_from_what_was_not_written(studio: Studio, device: HostDevice, name: str) -> None:
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        if name == "state":
            encode((1, 77))(workspace)
        else:
            workspace.write("state", np.zeros((1, STATE_ROWS, 4, 8, 8)))
        for call in (stage(), lambda workspace: workspace.read(name)):
            with pytest.raises(EngineError, match=rf"^{name}\b"):
                call(workspace)


def test_rows_of_text_are_written_and_read_one_by_one(studio: Studio, device: HostDevice) -> None:
    text = np.random.default_rng(0).standard_normal((2, 77, 32)).astype(np.float32)
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        for row in (1, 0):
            workspace.write("encoder_hidden_states", text[row:][:1], slice(row, row + 1))
        np.testing.assert_array_equal(workspace.read("encoder_hidden_states"), text)
        np.testing.assert_array_equal(workspace.read("encoder_hidden_states", slice(1, 2)), text[1:])
        workspace.write("encoder_hidden_states", 5.0, slice(1, 2))
        assert (workspace.read("encoder_hidden_states")[1] == 5).all()
        np.testing.assert_array_equal(workspace.read("encoder_hidden_states")[0], text[0])


def test_texts_are_encoded_for_the_rows_that_are_named(studio: Studio, device: HostDevice) -> None:
    ids = np.arange(154).reshape(2, 77)
    with studio.open(device) as session:
        workspace = session.workspace(ONE, **DRAWN)
        for row in (1, 0):
            workspace.write("text_encoder.input_ids", ids[row:][:1])
            workspace.run("text_encoder", slice(row, row + 1))
        found = workspace.read("encoder_hidden_states")
        np.testing.assert_allclose(found, studio.run("text_encoder", input_ids=ids), atol=1e-5)


def test_without_a_text_encoder_the_text_is_written(studio: Studio, device: HostDevice) -> None:
    with studio.open(device, components=["unet", "vae_decoder"]) as session, pytest.raises(EngineError):
        encode((2, 77))(session.workspace(LONG, **DRAWN))


def test_half_a_row_of_text_is_refused(studio: Studio, device: HostDevice) -> None:
    with (
        studio.open(device) as session,
        pytest.raises(EngineError, match=r" 1 .* 77 .* 0 .* 154 .* 2\b"),
    ):
        encode((1, 77))(session.workspace(LONG, **DRAWN))


def test_where_the_stage_takes_what_several_encoders_give_the_text_is_written(
    studio: Studio, device: HostDevice, tmp_path: Path
) -> None:
    """As SDXL's does: its first encoder gives 768 of the 2048 numbers of a token."""
    directory = shutil.copytree(studio.directory, tmp_path / "host")
    narrow = model_of(
        [
            helper.make_node("Cast", ["input_ids"], ["wide"], to=1),
            helper.make_node("Unsqueeze", ["wide", "axis"], [STATES]),
        ],
        {"input_ids": ["batch", 77]},
        {STATES: ["batch", 77, 1]},
        {"axis": np.array([2])},
        types={"input_ids": TensorProto.INT64},
    )
    spec = spec_of(narrow, "text_encoder", [{"batch": 2}])
    write_plan(directory / "text_encoder.engine", narrow, spec)
    record = msgspec.structs.replace(studio.record, specs=studio.record.specs | {"text_encoder": spec})
    with replace(studio, directory=directory, record=record).open(device) as session:
        workspace, ids = session.workspace(ONE, **DRAWN), np.arange(154).reshape(2, 77)
        with pytest.raises(EngineError):
            encode(ids.shape)(workspace)
        np.testing.assert_array_equal(session.engine("text_encoder")({"input_ids": ids})[STATES][..., 0], ids)
        workspace.write("encoder_hidden_states", np.zeros((2, 77, 32)))


def test_an_encoder_that_is_compiled_for_more_texts_than_there_are_is_filled_up(
    studio: Studio, device: HostDevice
) -> None:
    profiles = studio.record.specs["text_encoder"].profiles
    with fewer_profiles(studio, "text_encoder", [profiles[2]]).open(device) as session:
        assert_same(picture(session.workspace(ONE, **DRAWN), studio, Request()), expected(studio, Request()))


@pytest.mark.parametrize(
    ("component", "stands_for", "told"),
    [
        ("vae_encoder", "unet", "^unet .* sample; .*`latentrt build --force`"),
        ("vae_encoder", "vae_decoder", " vae_decoder: "),
    ],
)
def test_an_engine_in_another_place_is_refused(
    studio: Studio, device: HostDevice, component: str, stands_for: str, told: str
) -> None:
    specs = studio.record.specs | {
        stands_for: msgspec.structs.replace(studio.record.specs[component], component=stands_for)
    }
    entries = studio.record.entries | {stands_for: studio.record.entries[component]}
    other = replace(studio, record=msgspec.structs.replace(studio.record, specs=specs, entries=entries))
    with other.open(device) as session, pytest.raises(EngineError, match=told):
        session.workspace(ONE, **DRAWN)


def test_numbers_that_make_no_sense_are_refused(studio: Studio, device: HostDevice) -> None:
    for options in ({"workspaces": 0}, {"slots": 0}):
        with pytest.raises(EngineError, match=r"\bworkspaces\b.*\bslots\b.* 0\b"):
            studio.open(device, **options)


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU answers here")
def test_what_tensorrt_rtx_says_without_a_driver_reaches_the_user(sd1_bundle: Path, tmp_path: Path) -> None:
    """The real library, a real engine and the memory map: everything up to the driver that is not there."""
    try:
        library = trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    options = BuildOptions(compute_capability="8.9", optimization_level=0)
    built = tensorrt.build(Bundle.open(sd1_bundle), tmp_path, "tensorrt-rtx", options, silent)
    entry, spec = built["text_encoder"]
    with pytest.raises(EngineError, match=r"/text_encoder\.engine .*driver version is insufficient"):
        open_program(library, tmp_path / entry, spec, Kernels())
