"""Pictures drawn through TensorRT's contexts, on a stand-in for the device that runs late and forgives nothing.

The contexts run the very graphs that are compiled for TensorRT, in ONNX Runtime. Nothing here has run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from latentrt.engines import tensorrt
from latentrt.engines.bundle import Bundle
from latentrt.engines.canvas import CanvasShape, StageInput
from latentrt.engines.device import CudaDevice
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.gpu import find_gpu
from latentrt.engines.graphs import append_pixel_tail
from latentrt.engines.manifest import EngineRecord, Manifest
from latentrt.engines.spec import Array, EngineKey, EngineSpec, TensorSpec
from latentrt.engines.stage import STATE_ROWS, control_width, fuse_stage
from latentrt.engines.tensorrt_canvas import TensorRTCanvas
from latentrt.engines.tensorrt_run import open_program
from latentrt.engines.tensorrt_session import TensorRTSession, load_engine, open_tensorrt
from latentrt.engines.verification import to_pixels
from latentrt.runtime.denoise import begin, stage_inputs
from latentrt.runtime.guidance import Guidance, plan_guidance
from latentrt.runtime.plan import SamplingPlan
from latentrt.runtime.samplers import make_plan
from tests import loop
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan

RANGE = 1e-5  # of the largest latent: the same float32 sums in another order
GUIDANCE = 4.0
STEPS = 5
STILL = {"state": (1, STATE_ROWS, 4, 8, 8), "known": (1, 2, 4, 8, 8), "keep_mask": (1, 1, 8, 8)}
STAGE_FIELDS = ("control", "guidance", "picture_of_row", "noise")
ONE = CanvasShape(pictures=1, tokens=77, width=32, height=32)
TWO = replace(ONE, pictures=2)
TALL = replace(ONE, height=48)
LONG = replace(ONE, tokens=154)

Sizes = dict[str, int]


def unet_sizes(pictures: int, rows: int, *, tokens: int = 77, height: int = 8, width: int = 8) -> Sizes:
    latents = {"latent_height": height, "latent_width": width}
    return {"pictures": pictures, "rows": rows, "tokens": tokens, **latents}


PROFILES: dict[str, list[Sizes]] = {
    "text_encoder": [{"batch": texts} for texts in (1, 2, 4)],
    "unet": [
        *(unet_sizes(pictures, rows) for pictures, rows in ((1, 1), (1, 2), (2, 2), (2, 4))),
        *(unet_sizes(1, rows, height=12) for rows in (1, 2)),
        *(unet_sizes(1, rows, tokens=154) for rows in (1, 2)),
    ],
    "vae_decoder": [
        {"batch": 1, "latent_height": 8, "latent_width": 8},
        {"batch": 2, "latent_height": 8, "latent_width": 8},
        {"batch": 1, "latent_height": 12, "latent_width": 8},
    ],
    "vae_encoder": [{"batch": 1, "height": 32, "width": 32}],
}


@dataclass(frozen=True)
class Studio:
    """One bundle's networks: as canonical graphs in ONNX Runtime, and as plans for the stand-in."""

    directory: Path
    record: EngineRecord
    manifest: Manifest
    sessions: dict[str, Any]

    def run(self, component: str, **inputs: Array) -> Array:
        return np.asarray(self.sessions[component].run(None, inputs)[0])

    def model(self, latents: Array, timesteps: Array, text: Array) -> Array:
        feeds = {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}
        return self.run("unet", **{name: np.float32(array) for name, array in feeds.items()})

    def open(self, device: HostDevice, **options: Any) -> TensorRTSession:
        library = options.pop("library", None) or make_library(device)
        factor = self.manifest.latents.factor
        return open_tensorrt(library, self.directory, self.record, device, factor=factor, **options)


@pytest.fixture(scope="module")
def studio(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    bundle = Bundle.open(sd1_bundle)
    root = tmp_path_factory.mktemp("plans") / "bundle"
    directory = root / "engines" / "host"
    directory.mkdir(parents=True)
    specs, sessions = {}, {}
    for component, profiles in PROFILES.items():
        model = onnx.load(str(bundle.path(bundle.manifest.components[component].graph)))
        sessions[component] = session_of(model)
        model = edited(model, component, bundle.manifest.latents.scaling_factor)
        specs[component] = spec_of(model, component, profiles)
        write_plan(directory / f"{component}.engine", model, specs[component])
    record = EngineRecord(
        schema_version=1,
        key=EngineKey(backend="tensorrt", backend_version="0.0.0", device="host", precision="fp32", graphs=""),
        specs=specs,
        entries={component: f"{component}.engine" for component in PROFILES},
        files={},
        build_s=0.0,
    )
    return Studio(directory=directory, record=record, manifest=bundle.manifest, sessions=sessions)


def session_of(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the networks are tiny: threads would only wait for each other
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def edited(model: Any, component: str, scaling: float) -> Any:
    if component == "unet":
        return fuse_stage(model)
    if component == "vae_decoder":
        start_at_state(model, scaling)
        append_pixel_tail(model)
    return model


def start_at_state(model: Any, scaling: float) -> None:
    """Make a VAE decoder take the state, whose first row it scales."""
    (latents,) = model.graph.input
    axes = [axis.dim_param or axis.dim_value for axis in latents.type.tensor_type.shape.dim]
    constants = {"head.first": np.int64(0), "head.scaling": np.float32(scaling)}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in constants.items())
    model.graph.node.insert(0, helper.make_node("Div", ["head.latents", "head.scaling"], [latents.name]))
    model.graph.node.insert(0, helper.make_node("Gather", ["state", "head.first"], ["head.latents"], axis=1))
    del model.graph.input[:]
    shape = [axes[0], STATE_ROWS, *axes[1:]]
    model.graph.input.append(helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, shape))


def spec_of(model: Any, component: str, profiles: list[Sizes]) -> EngineSpec:
    def tensors(infos: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=info.name,
                dtype=helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type).name,
                shape=tuple(axis.dim_param or axis.dim_value for axis in info.type.tensor_type.shape.dim),
            )
            for info in infos
        )

    return EngineSpec(
        component=component,
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
        profiles=tuple(profiles),
    )


@dataclass(frozen=True)
class Request:
    """What one call draws. guided: from and to which part of the plan, None for nowhere"""

    shape: CanvasShape = ONE
    sampler: str = "euler"
    guided: tuple[float, float] | None = (0.0, 1.0)
    seed: int = 0

    @property
    def texts(self) -> tuple[Array, Array]:
        """Tokens of the prompts and of the negative prompts, some texts for each picture."""
        texts = self.shape.pictures * self.shape.tokens // 77
        draw = np.random.default_rng(self.seed)
        return draw.integers(0, 500, (texts, 77)), draw.integers(0, 500, (texts, 77))

    def noises(self, channels: int, factor: int) -> Callable[[], Array]:
        size = (self.shape.pictures, channels, self.shape.height // factor, self.shape.width // factor)
        draw = np.random.default_rng(self.seed + 1)
        return lambda: draw.standard_normal(size, dtype=np.float32)


def plan_of(studio: Studio, request: Request) -> tuple[SamplingPlan, Guidance]:
    plan = make_plan(request.sampler, studio.manifest.schedule, steps=STEPS)
    scale, interval = (GUIDANCE, request.guided) if request.guided else (1.0, (0.0, 1.0))
    return plan, plan_guidance(plan, scale, request.shape.pictures, interval=interval)


def expected(studio: Studio, request: Request) -> tuple[Array, Array]:
    """Return the latents and pixels of the NumPy loop around the canonical graphs."""
    (plan, guidance), space = plan_of(studio, request), studio.manifest.latents
    text, negative = (
        studio.run("text_encoder", input_ids=ids).reshape(request.shape.pictures, request.shape.tokens, -1)
        for ids in request.texts
    )
    stages = iter(guidance.stages)

    def follow(latents: Array, timesteps: Array) -> Array:
        return loop.guided(studio.model, text, negative if next(stages) else None, GUIDANCE)(latents, timesteps)

    draw = request.noises(space.channels, space.factor)
    *_, latents = loop.denoise(plan, draw(), follow, draw)
    return latents, to_pixels(studio.run("vae_decoder", latent_sample=latents / np.float32(space.scaling_factor)))


def draw_on(canvas: TensorRTCanvas, studio: Studio, request: Request) -> None:
    """Queue a whole picture. Whatever was handed over is spoilt at once: the canvas must have its own copy."""
    (plan, guidance), space = plan_of(studio, request), studio.manifest.latents
    draw = request.noises(space.channels, space.factor)
    ids = np.concatenate(request.texts if request.guided else request.texts[:1])
    canvas.encode({"input_ids": ids})
    state = begin(plan, draw(), state_rows=canvas.state_rows)
    canvas.write("state", state)
    spoil(ids, state)
    for stage in stage_inputs(plan, guidance, draw, state_rows=canvas.state_rows):
        mine = StageInput(**{name: copied(getattr(stage, name)) for name in STAGE_FIELDS})
        canvas.advance(mine)
        spoil(*(getattr(mine, name) for name in STAGE_FIELDS))
    canvas.decode()


def copied(array: Array | None) -> Array | None:
    return None if array is None else np.array(array)


def spoil(*arrays: Array | None) -> None:
    for array in arrays:
        if array is not None:
            array.fill(-77)


def assert_same(found: tuple[Array, Array], wanted: tuple[Array, Array]) -> None:
    worst = np.max(np.abs(found[0] - wanted[0])) / np.max(np.abs(wanted[0]))
    assert worst <= RANGE
    levels = np.abs(found[1].astype(int) - wanted[1].astype(int))
    assert levels.max() <= 1 and np.mean(levels > 0) < 1e-2


def picture(canvas: TensorRTCanvas, studio: Studio, request: Request) -> tuple[Array, Array]:
    draw_on(canvas, studio, request)
    pixels = canvas.pixels()
    return canvas.read("state")[:, 0], pixels


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    assert device.leftovers() == {}, "a test leaves nothing on the device"


REQUESTS = {
    "guided": Request(),
    "not guided": Request(guided=None),
    "noise of the sampler": Request(sampler="euler_ancestral"),
    "guided in the middle": Request(guided=(0.3, 0.7)),
    "much memory": Request(sampler="unipc"),
    "two pictures": Request(shape=TWO, sampler="dpmpp_2m_sde", guided=(0.0, 0.5)),
    "tall": Request(shape=TALL),
    "long prompts": Request(shape=LONG),
}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", REQUESTS)
def test_pictures_are_those_of_the_numpy_loop(studio: Studio, device: HostDevice, name: str, graphs: bool) -> None:
    """Three in a row: kernel by kernel and recorded, then from the graphs, then with another seed."""
    request = REQUESTS[name]
    with studio.open(device, graphs=graphs) as session:
        canvas = session.canvas(request.shape)
        wanted = expected(studio, request)
        for _ in range(2):
            assert_same(picture(canvas, studio, request), wanted)
        other = replace(request, seed=7)
        assert_same(picture(canvas, studio, other), expected(studio, other))


def test_the_first_picture_records_each_pass_once_and_the_next_only_launches(
    studio: Studio, device: HostDevice
) -> None:
    """Of two encoders and two stages only those of the request run; every pass is put kernel by kernel once."""
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        device.forget()
        first = picture(canvas, studio, Request())
        calls = device.counted()
        assert (calls["begin_capture"], calls["end_capture"]) == (3, 3)
        assert calls["launch"] == STEPS - 1  # encoder, first stage and decoder went kernel by kernel
        device.forget()
        second = picture(canvas, studio, Request())
        calls = device.counted()
        assert calls["begin_capture"] == 0 and calls["launch"] == STEPS + 2
        np.testing.assert_array_equal(first[1], second[1])


def test_a_picture_is_one_queue_and_one_wait(studio: Studio, device: HostDevice) -> None:
    """From the second picture on: a copy and a launch a stage, nothing allocated, one wait at the end."""
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        picture(canvas, studio, Request())
        device.forget()
        draw_on(canvas, studio, Request())
        assert device.ran == [] and "wait" not in device.counted()
        canvas.pixels()
        stage = ["copy_in", "run next_state 1", "copy"]
        assert device.ran == [
            *("copy_in", "run last_hidden_state 1"),
            "copy_in",
            *(stage * STEPS),
            *("run pixels 0", "copy_out"),
        ]
        calls = device.counted()
        assert calls["wait"] == 1
        assert set(calls) == {"copy_in", "launch", "record", "copy_out", "wait"}


def test_noise_is_copied_only_where_it_has_weight(studio: Studio, device: HostDevice) -> None:
    """The last stage of an ancestral sampler draws none: what the stage before left is cleared, once."""
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        draw_on(canvas, studio, Request(sampler="euler_ancestral"))
        canvas.pixels()
        device.forget()
        draw_on(canvas, studio, Request(sampler="euler_ancestral"))
        sizes = [int(call.split()[1]) for call in device.calls if call.startswith("copy_in")]
        with_noise, without = sizes[-2], sizes[-1]
        assert sizes[2:] == [with_noise] * (STEPS - 1) + [without]
        assert with_noise - without >= 4 * 8 * 8 * 4
        assert device.counted()["zero"] == 1


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_few_slots_wait_for_a_copy_long_past_and_never_for_the_queue(
    studio: Studio, device: HostDevice, slots: int
) -> None:
    request = Request(sampler="euler_ancestral")
    with studio.open(device, slots=slots) as session:
        canvas = session.canvas(ONE)
        picture(canvas, studio, request)
        device.forget()
        draw_on(canvas, studio, request)
        assert device.counted()["wait"] == STEPS - slots
        assert device.pending() >= slots
        canvas.pixels()
        assert_same((canvas.read("state")[:, 0], canvas.pixels()), expected(studio, request))


def test_a_second_picture_may_be_queued_before_the_first_is_fetched(studio: Studio, device: HostDevice) -> None:
    other = Request(seed=5, guided=None)
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        draw_on(canvas, studio, Request())
        draw_on(canvas, studio, other)
        found = canvas.pixels()
        assert_same((canvas.read("state")[:, 0], found), expected(studio, other))


def test_canvases_share_scratch_memory_which_grows_with_the_largest(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        small = session.canvas(ONE)
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        before = session.scratch_bytes
        tall = session.canvas(TALL)
        assert session.scratch_bytes > before
        device.forget()
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        assert device.counted()["begin_capture"] == 3  # what was recorded used the memory where it was
        device.forget()
        tall_request = Request(shape=TALL, seed=3)
        assert_same(picture(tall, studio, tall_request), expected(studio, tall_request))
        assert_same(picture(small, studio, Request()), expected(studio, Request()))
        assert session.scratch_bytes > before and device.counted()["allocate"] == 0


def test_the_canvas_that_was_used_longest_ago_makes_room(studio: Studio, device: HostDevice) -> None:
    with studio.open(device, canvases=2) as session:
        first, second = session.canvas(ONE), session.canvas(TWO)
        assert session.canvas(ONE) is first
        session.canvas(TALL)
        assert session.canvas(ONE) is first
        with pytest.raises(EngineError, match="made room for another shape; ask for it again"):
            second.decode()


def test_a_canvas_is_handed_out_blank(studio: Studio, device: HostDevice) -> None:
    """Nothing of a request that was left in the middle, or that kept a part of a picture, is seen by the next."""
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        canvas.write("keep_mask", np.zeros((1, 1, 8, 8)))
        canvas.write("known", np.ones((1, 2, 4, 8, 8)))
        draw_on(canvas, studio, Request())
        canvas.mark()
        again = session.canvas(ONE)
        assert again is canvas and again.elapsed() == ()
        for call in (again.pixels, again.decode, lambda: again.read("state")):
            with pytest.raises(EngineError):
                call()
        assert_same(picture(again, studio, Request()), expected(studio, Request()))


def test_what_is_kept_stays_as_it_is_known(studio: Studio, device: HostDevice) -> None:
    """The left half is drawn, the right half ends as the known latents: the plan's last level has no noise."""
    known = np.random.default_rng(9).standard_normal((1, 2, 4, 8, 8), dtype=np.float32)
    mask = np.zeros((1, 1, 8, 8), dtype=np.float32)
    mask[..., :4] = 1
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        canvas.write("keep_mask", mask)
        canvas.write("known", known)
        latents, _ = picture(canvas, studio, Request())
        (plan, _), right = plan_of(studio, Request()), slice(4, 8)
        np.testing.assert_allclose(latents[..., right], plan.levels[-1, 0] * known[:, 0][..., right], atol=1e-5)
        assert np.abs(latents[..., :4] - known[:, 0][..., :4]).max() > 0.1


def test_marks_tell_the_device_time_between_them(studio: Studio, device: HostDevice) -> None:
    """Each piece of work takes the stand-in a thousandth of a second."""
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        picture(canvas, studio, Request())
        for _ in range(2):
            canvas.mark()
            draw_on(canvas, studio, Request(guided=None))
            canvas.mark()
            canvas.mark()
            assert canvas.elapsed() == ((2 + 1 + 3 * STEPS + 2) / 1e3, 0.0)
        assert canvas.elapsed() == ()


def test_settling_waits_for_marks_and_not_for_the_queue(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        canvas = session.canvas(ONE)
        canvas.settle(0)
        assert device.pending() > 0
        for name in ("state", "known", "keep_mask"):
            canvas.mark()
            canvas.write(name, np.zeros(STILL[name]))
        canvas.settle(3)
        before = device.pending()
        canvas.settle(2)
        assert device.pending() < before
        canvas.settle(0)
        assert device.pending() == 1


def test_warming_up_records_everything_and_leaves_a_blank_canvas(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        seconds = session.warm_up(ONE)
        assert list(seconds) == [
            "unet, profile 0",
            "unet, profile 1",
            "text_encoder, profile 0",
            "text_encoder, profile 1",
            "vae_decoder, profile 0",
        ]
        assert all(one > 0 for one in seconds.values())
        device.forget()
        assert_same(picture(session.canvas(ONE), studio, Request()), expected(studio, Request()))
        assert not {"begin_capture", "allocate", "allocate_pinned"} & set(device.counted())


def test_threads_share_a_session(studio: Studio, device: HostDevice) -> None:
    requests = [Request(seed=1), Request(shape=TALL, seed=2), Request(shape=TWO, seed=3)]
    wanted = [expected(studio, request) for request in requests]
    found: dict[int, tuple[Array, Array]] = {}
    with studio.open(device) as session:
        canvases = [session.canvas(request.shape) for request in requests]

        def work(number: int) -> None:
            for _ in range(3):
                found[number] = picture(canvases[number], studio, requests[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(len(requests)):
        assert_same(found[number], wanted[number])


def test_closing_frees_everything_once(studio: Studio, device: HostDevice) -> None:
    library = make_library(device)
    session = studio.open(device, library=library)
    canvas, engine = session.canvas(ONE), session.engine("vae_encoder")
    draw_on(canvas, studio, Request())
    assert len(library.engines) == 4 and device.leftovers()
    session.close()
    session.close()
    canvas.close()
    engine.close()
    assert device.leftovers() == {} and len(library.engines) == 0
    for call in (lambda: canvas.pixels(), lambda: session.canvas(ONE), lambda: engine({}), lambda: canvas.decode()):
        with pytest.raises(EngineError, match=r"closed; open the bundle again"):
            call()
