"""Every workspace draws the picture that NumPy draws: here the one whose buffers ONNX Runtime holds, for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.find import find_engines
from latentrt.engines.onnxruntime import assignment, keys, session
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from latentrt.runtime.draw.denoise import begin
from latentrt.runtime.draw.slots import encode_rows
from latentrt.runtime.sampling.guidance import plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.noise import TorchCpuNoise
from tests.studio import DRAWN
from tests.whole_plan import denoise

RANGE = 1e-4  # of the largest latent: the same float32 sums in another order, over a whole trajectory
SHAPE = WorkspaceShape(pictures=2, tokens=77, width=24, height=32)

Engines = dict[str, OnnxRuntimeEngine]


@pytest.fixture(scope="module")
def bundle(sd1_bundle: Path) -> Bundle:
    return Bundle.open(sd1_bundle)


@pytest.fixture(scope="module")
def fused(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """The engines that a GPU would have, on the CPU."""
    directory = tmp_path_factory.mktemp("fused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "FUSED", {"cpu"})
        built = onnxruntime.build(bundle, directory, "cpu", silent)
    one = OnnxRuntimeOptions(threads=1)
    return {name: session.load(directory / file, spec, "cpu", one) for name, (file, spec) in built.items()}


@pytest.fixture(scope="module")
def canonical(bundle: Bundle) -> Engines:
    directory, record = find_engines(bundle, "cpu")
    one = OnnxRuntimeOptions(threads=1)
    return {
        name: session.load(directory / entry, record.specs[name], "cpu", one) for name, entry in record.entries.items()
    }


def tokens_of(count: int) -> Array:
    return np.random.default_rng(5).integers(0, 20, (count, 77))


def paint(
    workspace: Workspace, bundle: Bundle, *, sampler: str = "dpmpp_2m", write: Callable[[Workspace], None] | None
) -> Any:
    """Draw two guided pictures; return the latents after each stage and the pixels."""
    plan = make_plan(sampler, bundle.manifest.schedule, steps=6)
    generator = TorchCpuNoise(0)

    def draw() -> Array:
        return generator.normal((2, 4, SHAPE.height // 4, SHAPE.width // 4))

    inputs = {"input_ids": tokens_of(4), "extra_embeddings": np.zeros((1, 32))}
    encode_rows(workspace, "text_encoder", inputs, slice(0, 2), parts=2)
    workspace.write("state", begin(plan, draw(), state_rows=workspace.state_rows))
    if write is not None:
        write(workspace)
    guidance = plan_guidance(plan, 3.0, 2, interval=(0.2, 0.8), rescale=0.5)
    path = [workspace.read("state")[:, 0] for _ in denoise(workspace, plan, guidance, draw, denoiser="unet")]
    workspace.run("vae_decoder")
    return path, workspace.read("pixels")


def host(canonical: Engines, bundle: Bundle, sampler: str = "dpmpp_2m") -> NumpyWorkspace:
    rows = make_plan(sampler, bundle.manifest.schedule, steps=6).rows
    return NumpyWorkspace(canonical, bundle.manifest.latents, SHAPE, state_rows=rows, **DRAWN)


def device(fused: Engines, bundle: Bundle) -> OnnxRuntimeWorkspace:
    workspace = OnnxRuntimeWorkspace(fused, bundle.manifest.latents, SHAPE, device="cpu", denoiser="unet")
    workspace.reset(decoder="vae_decoder")
    return workspace


def assert_same(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=RANGE * float(np.abs(theirs).max()))
    assert np.abs(found[1].astype(int) - expected[1].astype(int)).max() <= 1
    assert found[1].shape == (2, SHAPE.height, SHAPE.width, 3)


def keep_half(workspace: Workspace) -> None:
    mask = np.ones((2, 1, SHAPE.height // 4, SHAPE.width // 4), dtype=np.float32)
    mask[:, :, :3] = 0
    workspace.write("keep_mask", mask)
    workspace.write("known", TorchCpuNoise(9).normal((2, 2, 4, *mask.shape[2:])))


@pytest.mark.parametrize("write", [None, keep_half])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "heun", "unipc_3"])
def test_bound_buffers_draw_what_numpy_draws(
    fused: Engines, canonical: Engines, bundle: Bundle, sampler: str, write: Callable[[Workspace], None] | None
) -> None:
    """Two stages of six are not guided, so two numbers of rows take turns on one state."""
    found = paint(device(fused, bundle), bundle, sampler=sampler, write=write)
    assert_same(found, paint(host(canonical, bundle, sampler), bundle, sampler=sampler, write=write))


def test_a_workspace_draws_again_as_it_drew_before(fused: Engines, bundle: Bundle) -> None:
    workspace = device(fused, bundle)
    noisy = paint(workspace, bundle, sampler="euler_ancestral", write=None)
    quiet = paint(workspace, bundle, sampler="dpmpp_2m", write=None)  # the noise of before must not come back
    assert np.array_equal(paint(workspace, bundle, sampler="euler_ancestral", write=None)[1], noisy[1])
    assert np.array_equal(paint(device(fused, bundle), bundle, sampler="dpmpp_2m", write=None)[1], quiet[1])


def test_a_wiped_workspace_knows_nothing_of_the_last_batch(fused: Engines, bundle: Bundle) -> None:
    workspace = device(fused, bundle)
    expected = paint(workspace, bundle, write=None)[1]
    workspace.reset(decoder="vae_decoder")
    masked = paint(workspace, bundle, write=keep_half)[1]
    workspace.reset(decoder="vae_decoder")
    assert not np.array_equal(masked, expected)
    assert np.array_equal(paint(workspace, bundle, write=None)[1], expected)
    workspace.reset(decoder="vae_decoder")
    with pytest.raises(EngineError, match=r"^pixels\b"):
        workspace.read("pixels")
    plan = make_plan("euler", bundle.manifest.schedule, steps=2)
    with pytest.raises(EngineError, match=r"^state\b"):
        list(denoise(workspace, plan, plan_guidance(plan, 1.0, 2), lambda: np.zeros((2, 4, 8, 6)), denoiser="unet"))


def test_what_was_given_may_be_changed_afterwards(fused: Engines, bundle: Bundle) -> None:
    workspace = device(fused, bundle)
    state = np.ones((2, STATE_ROWS, 4, 8, 6), dtype=np.float32)
    text = np.ones((2, 77, 32), dtype=np.float32)
    workspace.write("state", state)
    workspace.write("encoder_hidden_states", text)
    state[:], text[:] = 0, 0
    assert workspace.read("state").all() and workspace.read("encoder_hidden_states").all()


def test_wrong_names_and_shapes_are_refused(fused: Engines, bundle: Bundle) -> None:
    workspace = device(fused, bundle)
    with pytest.raises(EngineError, match=r"^state: .* \(2, 4\), .* \(2, 6, 4, 8, 6\)"):
        workspace.write("state", np.zeros((2, 4)))
    with pytest.raises(EngineError, match="'text'"):
        workspace.write("text", np.zeros((2, 4)))
    with pytest.raises(EngineError, match=r"^pixels\b"):
        workspace.read("pixels")
    plan = make_plan("euler", bundle.manifest.schedule, steps=2)
    workspace.write("state", np.zeros((2, STATE_ROWS, 4, 8, 6)))
    with pytest.raises(EngineError, match=r"^encoder_hidden_states\b"):
        list(denoise(workspace, plan, plan_guidance(plan, 1.0, 2), lambda: np.zeros((2, 4, 8, 6)), denoiser="unet"))


def test_heavy_operators_on_the_cpu_are_refused_by_name(sd1_bundle: Path) -> None:
    options = session.session_options(threads=1)
    assignment.record_assignment(options)
    opened = session.open_session(sd1_bundle / "onnx/unet/model.onnx", options, "cpu")
    assignment.check_assignment(opened, "cpu", "unet")
    with pytest.raises(EngineError, match=r"\bAttention, Conv, .*\bCUDAExecutionProvider\b"):
        assignment.check_assignment(opened, "cuda", "unet")
