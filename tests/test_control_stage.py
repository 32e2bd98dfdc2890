"""ControlNets where the engines run: the graph from the state, and workspaces on which its residuals never leave."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.onnxruntime import keys
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.spec import Array
from latentrt.engines.verify.verify import verify
from latentrt.engines.workspace.contract import ALL, STATE, WorkspaceShape
from latentrt.runtime.draw.denoise import Loop
from latentrt.runtime.draw.job import resolve
from latentrt.runtime.draw.step import Noise
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control, Request
from tests.conftest import MakeControlled
from tests.host_device import HostDevice
from tests.stand_in import install
from tests.test_controlnets import hint
from tests.test_family_stages import engines_of_a_gpu
from tests.test_pipeline_images import left_half, photo

LEVELS = 2  # of 255: the same float32 sums in another order, through a whole trajectory
# Each kind is exported for its own sake here, which takes a minute.
FAMILIES = [
    ("sd1", ""),
    ("sdxl", ""),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in (("sd1", "inpainting"), ("sd1", "lcm"), ("sd2", ""))),
]
SIZE = (40, 32)
EDGES = Control(name="edges", image=hint(0), scale=0.8)
DEPTH = Control(name="depth", image=hint(1), scale=1.2)
REQUESTS: dict[str, dict[str, Any]] = {
    "one": {"controls": [EDGES]},
    "nothing, after one": {},
    "two, the other first": {"controls": [DEPTH, EDGES]},
    "each at a part of the steps": {
        "controls": [
            Control(name="edges", image=hint(2), stop=0.5),
            Control(name="depth", image=hint(3), start=0.25, stop=0.75),
        ]
    },
    "guided for a while": {"controls": [EDGES], "guidance_interval": (0.3, 0.8)},
    "two pictures, each with its own": {
        "controls": [Control(name="edges", image=[hint(4), hint(5)])],
        "n": 2,
        "sampler": "euler_ancestral",
    },
    "an image": {"controls": [EDGES], "image": photo(), "strength": 0.7},
    "an image and a mask": {"controls": [EDGES, DEPTH], "image": photo(), "mask": left_half(), "strength": 0.7},
    "a sampler that looks twice": {"controls": [EDGES], "sampler": "heun"},
}


def request_of(pipe: Pipeline, **asked: Any) -> Request:
    known = {
        "prompt": "a red circle",
        "sampler": "euler",
        "size": SIZE,
        "steps": 4,
        "seed": 3,
        "guidance": 3.0,
        **asked,
    }
    repaints = pipe.manifest.components["unet"].inputs[0].shape[1] == 9
    return Request(**known | ({"image": photo(), "mask": left_half()} if repaints else {}))


def draw(pipe: Pipeline, **asked: Any) -> Array:
    return pipe.draw(request_of(pipe, **asked)).pixels


def named(kind: tuple[str, str]) -> str:
    return "-".join(filter(None, kind))


@contextmanager
def canonical() -> Iterator[None]:
    """Let the CPU run what it always does, even where a test lets it run what a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "FUSED", frozenset({"cuda"}))
        yield


@pytest.fixture(scope="module")
def plain(controlled: MakeControlled) -> Iterator[Callable[..., Array]]:
    """Draw in NumPy around the canonical networks; what was drawn once is remembered."""
    known: dict[str, Array] = {}

    def drawn(family: str, variant: str, name: str) -> Array:
        key = f"{family} {variant} {name}"
        if key not in known:
            with canonical(), Pipeline.load(controlled(family, variant).bundle, "cpu", threads=1) as pipe:
                known[key] = draw(pipe, **REQUESTS[name])
        return known[key]

    yield drawn


def assert_close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape and np.ptp(found) > 0
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= LEVELS


def copied(controlled: MakeControlled, family: str, variant: str, *, to: Path) -> Path:
    """Return a copy of a bundle. It may be made here, while a GPU's engines are let run on the CPU."""
    with canonical():
        return shutil.copytree(controlled(family, variant).bundle, to / "bundle")


@pytest.fixture(scope="module", params=FAMILIES[:4], ids=named)
def bound(
    request: pytest.FixtureRequest, controlled: MakeControlled, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[str, str], Pipeline]]:
    """The engines that a GPU would have, on the CPU."""
    root = copied(controlled, *request.param, to=tmp_path_factory.mktemp("bound"))
    with engines_of_a_gpu():
        build_engines(Bundle.open(root), "cpu", force=True)
        with Pipeline.load(root, "cpu", threads=1) as pipe:
            yield request.param, pipe


@pytest.mark.parametrize("name", REQUESTS)
def test_bound_buffers_follow_as_numpy_does(
    bound: tuple[tuple[str, str], Pipeline], plain: Callable[..., Array], name: str
) -> None:
    kind, pipe = bound
    expected = plain(*kind, name)
    for _ in range(2):
        assert_close(draw(pipe, **REQUESTS[name]), expected)


def test_a_controlnet_runs_where_it_is_followed_and_nowhere_else(
    bound: tuple[tuple[str, str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run_bound = OnnxRuntimeEngine.run_bound

    def watch(self: OnnxRuntimeEngine, binding: Any, *, graph: int = 0) -> None:
        if not self.spec.component.startswith(("text_encoder", "vae_encoder")):  # for what no test has drawn yet
            ran.append(self.spec.component)
        run_bound(self, binding, graph=graph)

    monkeypatch.setattr(OnnxRuntimeEngine, "run_bound", watch)
    draw(bound[1], **REQUESTS["each at a part of the steps"])
    edges, depth, unet = "controlnet_edges", "controlnet_depth", "unet"
    assert ran == [edges, unet, edges, depth, unet, depth, unet, unet, "vae_decoder"]
    ran.clear()
    draw(bound[1])
    assert set(ran) == {unet, "vae_decoder"}


def test_what_is_followed_must_be_on_the_workspace(bound: tuple[tuple[str, str], Pipeline]) -> None:
    _, pipe = bound
    write = OnnxRuntimeWorkspace.write

    def forget(self: OnnxRuntimeWorkspace, name: str, array: Array, rows: slice = ALL) -> None:
        if "controlnet" not in name:
            write(self, name, array, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntimeWorkspace, "write", forget)
        with pytest.raises(EngineError, match=r"^controlnet_edges\.controlnet_cond\b"):
            draw(pipe, controls=[EDGES])


class Pair:
    def __init__(self, root: Path, device: HostDevice) -> None:
        self.root, self.device = root, device
        self.compiled = Pipeline.load(root)

    def close(self) -> None:
        self.compiled.close()
        assert self.device.leftovers() == {}


@pytest.fixture(scope="module", params=FAMILIES, ids=named)
def compiled(
    request: pytest.FixtureRequest, controlled: MakeControlled, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[tuple[str, str], Pair]]:
    root = copied(controlled, *request.param, to=tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(root), "tensorrt", options=BuildOptions(sizes=(SIZE,), batches=(1, 2)))
        pair = Pair(root, device)
        yield request.param, pair
        pair.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_a_device_follows_as_numpy_does(
    compiled: tuple[tuple[str, str], Pair], plain: Callable[..., Array], name: str
) -> None:
    """Twice, so that graphs are launched as well as recorded, and after whatever the tests before left there."""
    kind, pair = compiled
    expected = plain(*kind, name)
    for _ in range(2):
        assert_close(draw(pair.compiled, **REQUESTS[name]), expected)


def test_nothing_leaves_the_device_between_stages(compiled: tuple[tuple[str, str], Pair]) -> None:
    _, pair = compiled
    draw(pair.compiled, controls=[EDGES, DEPTH])
    counts = {}
    for steps in (3, 6):
        pair.device.forget()
        draw(pair.compiled, controls=[EDGES, DEPTH], steps=steps)
        counts[steps] = pair.device.counted()
    assert counts[3]["copy_out"] == counts[6]["copy_out"]
    assert counts[3]["wait"] == counts[6]["wait"]
    assert counts[6]["copy_in"] - counts[3]["copy_in"] == 3  # one copy a stage, as without ControlNets


def test_verify_compares_every_profile_of_a_controlnet(compiled: tuple[tuple[str, str], Pair]) -> None:
    rows = [row for row in verify(Bundle.open(compiled[1].root), backend="tensorrt") if "controlnet" in row.what]
    assert len(rows) == 2 * 4  # two ControlNets: one picture and two, with guidance and without
    assert all(row.ok for row in rows), [row.message for row in rows]


def test_a_graph_that_is_no_controlnet_is_refused(controlled: MakeControlled) -> None:
    bundle = Bundle.open(controlled("sd1", "").bundle)
    unet = onnx.load(str(bundle.path(bundle.manifest.components["unet"].graph)), load_external_data=False)
    with pytest.raises(BundleError, match=r"ControlNet\b.* sample, timestep"):
        fuse_control(unet)


def shared(pipe: Pipeline, names: list[str]) -> list[Array]:
    """Draw requests of one picture that share their stages, each in a slot of its own."""
    drawing, manifest = pipe.loaded.drawing, pipe.manifest
    jobs = [resolve(request_of(pipe, **REQUESTS[name]), manifest) for name in names]
    sources = [pipe.loaded.source(job) for job in jobs]
    (tokens,) = {source.tokens[manifest.denoiser] for source in sources}
    shape = WorkspaceShape(pictures=len(jobs), tokens=tokens, width=SIZE[0], height=SIZE[1])
    rows = max(job.plan.rows for job in jobs)
    workspace = pipe.loaded.opened.workspace(
        manifest.latents, shape, state_rows=rows, denoiser=manifest.denoiser, decoder=None
    )
    loop = Loop(workspace, manifest.denoiser)
    for slot, (job, source) in enumerate(zip(jobs, sources, strict=True)):
        slots, noise = slice(slot, slot + 1), Noise(source.draw)
        source.write(workspace, manifest.denoiser, slots)
        inputs = drawing.begin(job, noise, shape, state_rows=workspace.state_rows)
        loop.join(drawing.seat(job, job.ranges[0], inputs, workspace, noise, slots=slots))
    while any(batch.running for batch in loop.batches):
        loop.advance()
    latents = [workspace.read(STATE, batch.slots)[:, 0] for batch in loop.batches]
    return [drawing.decode(job, job.decoder, each, tokens=tokens) for job, each in zip(jobs, latents, strict=True)]


MIXES = [
    ["one", "nothing, after one"],
    ["nothing, after one", "one", "two, the other first"],
    ["each at a part of the steps", "guided for a while", "an image"],
]


@pytest.mark.parametrize("names", MIXES)
def test_pictures_that_follow_different_controls_share_their_stages(
    controlled: MakeControlled, plain: Callable[..., Array], names: list[str]
) -> None:
    expected = [plain("sd1", "", name) for name in names]
    with canonical(), Pipeline.load(controlled("sd1", "").bundle, "cpu", threads=1) as pipe:
        for found, alone in zip(shared(pipe, names), expected, strict=True):
            assert_close(found, alone)


@pytest.mark.parametrize("names", MIXES)
def test_so_they_do_on_bound_buffers(
    bound: tuple[tuple[str, str], Pipeline], plain: Callable[..., Array], names: list[str]
) -> None:
    kind, pipe = bound
    expected = [plain(*kind, name) for name in names]
    for found, alone in zip(shared(pipe, names), expected, strict=True):
        assert_close(found, alone)


@pytest.mark.parametrize("names", [names[:2] for names in MIXES])
def test_and_so_they_do_on_a_device(
    compiled: tuple[tuple[str, str], Pair], plain: Callable[..., Array], names: list[str]
) -> None:
    kind, pair = compiled
    expected = [plain(*kind, name) for name in names]
    for found, alone in zip(shared(pair.compiled, names), expected, strict=True):
        assert_close(found, alone)
