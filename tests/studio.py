"""A tiny bundle compiled for the stand-in of TensorRT, what may be drawn with it, and what a picture must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from msgspec.structs import replace
from onnx import helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord, LatentSpec, Manifest
from latentrt.engines.compare import to_pixels
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_pixel_tail, prepend_state_head
from latentrt.engines.spec import Array, EngineKey, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import STATE_ROWS
from latentrt.engines.tensorrt.engines import TensorRTSession, open_tensorrt
from latentrt.engines.tensorrt.workspace import TensorRTWorkspace
from latentrt.engines.workspace.contract import ALL, STATE, Workspace, WorkspaceShape
from latentrt.runtime.draw.denoise import begin
from latentrt.runtime.draw.slots import encode_rows
from latentrt.runtime.sampling.guidance import Guidance, plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import SamplingPlan
from tests import loop
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan
from tests.whole_plan import denoise

RANGE = 1e-5  # of the largest latent: the same float32 sums in another order
GUIDANCE = 4.0
DRAWN: dict[str, Any] = {"denoiser": "unet", "decoder": "vae_decoder"}  # what a workspace draws with
STEPS = 5
ONE = WorkspaceShape(pictures=1, tokens=77, width=32, height=32)
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
        {"pictures": 1, "latent_height": 8, "latent_width": 8},
        {"pictures": 2, "latent_height": 8, "latent_width": 8},
        {"pictures": 1, "latent_height": 12, "latent_width": 8},
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


def make_studio(bundle: Bundle, root: Path) -> Studio:
    """Write the plans of a bundle below `root`, where a bundle's own would lie."""
    directory = root / "engines" / "host"
    directory.mkdir(parents=True)
    specs, sessions = {}, {}
    for component, profiles in PROFILES.items():
        model = onnx.load(str(bundle.path(bundle.manifest.components[component].graph)))
        sessions[component] = session_of(model)
        model = edited(model, component, bundle.manifest.latents)
        specs[component] = spec_of(model, component, profiles)
        write_plan(directory / f"{component}.engine", model, specs[component])
    return Studio(directory=directory, record=record_of(specs), manifest=bundle.manifest, sessions=sessions)


def record_of(specs: Mapping[str, EngineSpec]) -> EngineRecord:
    key = EngineKey(
        backend="tensorrt",
        backend_version="0.0.0",
        device="host",
        precision="fp32",
        graphs="",
        compute_capability="8.9",
    )
    entries = {component: f"{component}.engine" for component in specs}
    return EngineRecord(schema_version=1, key=key, specs=dict(specs), entries=entries, files={}, build_s=0.0)


def session_of(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the networks are tiny: threads would only wait for each other
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def edited(model: Any, component: str, latents: LatentSpec) -> Any:
    """Make the graph that is compiled for TensorRT."""
    if component == "unet":
        return fuse_stage(model)
    if component == "vae_decoder":
        append_pixel_tail(model)
        prepend_state_head(model, STATE_ROWS, latents)
    return model


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

    shape: WorkspaceShape = ONE
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
    stages = iter(guidance.groups > 1)

    def follow(latents: Array, timesteps: Array) -> Array:
        return loop.guided(studio.model, text, negative if next(stages) else None, GUIDANCE)(latents, timesteps)

    draw = request.noises(space.channels, space.factor)
    *_, latents = loop.denoise(plan, draw(), follow, draw)
    return latents, to_pixels(studio.run("vae_decoder", latent_sample=latents / np.float32(space.scaling_factor)))


class Spoiling:
    """A workspace that is handed arrays which are spoilt at once: it must have its own copy."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workspace, name)

    def write(self, name: str, array: Any, rows: slice = ALL) -> None:
        mine = np.array(array)
        self._workspace.write(name, mine, rows)
        mine.fill(-77)


def draw_on(drawn: TensorRTWorkspace, studio: Studio, request: Request) -> None:
    """Queue a whole picture. Whatever was handed over is spoilt at once."""
    workspace: Any = Spoiling(drawn)
    (plan, guidance), space = plan_of(studio, request), studio.manifest.latents
    draw = request.noises(space.channels, space.factor)
    ids = np.concatenate(request.texts if request.guided else request.texts[:1])
    slots, parts = slice(0, request.shape.pictures), 2 if request.guided else 1
    encode_rows(workspace, "text_encoder", {"input_ids": ids}, slots, parts=parts)
    workspace.write(STATE, begin(plan, draw(), state_rows=workspace.state_rows))
    for _ in denoise(workspace, plan, guidance, draw, denoiser="unet"):
        pass
    workspace.run("vae_decoder")


def assert_same(found: tuple[Array, Array], wanted: tuple[Array, Array]) -> None:
    worst = np.max(np.abs(found[0] - wanted[0])) / np.max(np.abs(wanted[0]))
    assert worst <= RANGE
    levels = np.abs(found[1].astype(int) - wanted[1].astype(int))
    assert levels.max() <= 1 and np.mean(levels > 0) < 1e-2


def picture(workspace: TensorRTWorkspace, studio: Studio, request: Request) -> tuple[Array, Array]:
    draw_on(workspace, studio, request)
    pixels = workspace.read("pixels")
    return workspace.read(STATE)[:, 0], pixels
