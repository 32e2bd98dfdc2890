"""The fused stage draws the videos of an image that NumPy draws: on ONNX Runtime's buffers, and compiled for TensorRT.

Everything of the latter is real but the device and TensorRT, for which the stand-ins of tests/stand_in.py run graphs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions, Profile
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.graphs.compiled import on_device
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.verify.verify import verify
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.verify.stages import verify_stages
from tests.stand_in import install
from tests.test_family_stages import LEVELS, engines_of_a_gpu
from tests.test_moving_images import picture

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED: dict[str, Any] = {"image": picture(), "size": (32, 32), "steps": 3, "seed": 4}
SAMPLERS = ["euler", "dpmpp_2m_karras", "euler_ancestral", "heun"]
VIDEOS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "not guided": {"guidance": 1.0},
    "guided in part": {"guidance_interval": (0.0, 0.5), "sampler": "euler_ancestral"},
    "rescaled": {"guidance_rescale": 0.6},
    "in chunks": {"decode_chunk": 2},
    "several": {"n": 2, "frames": 3},
}


@pytest.fixture(scope="module")
def plain(svd: tuple[Path, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(svd[1], "cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def fused(svd: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    copy = shutil.copytree(svd[1], tmp_path_factory.mktemp("fused") / "bundle")
    with engines_of_a_gpu():  # which holds for all of the process, so for its own calls alone
        build_engines(Bundle.open(copy), "cpu", force=True)
        pipe = Pipeline.load(copy, "cpu", threads=1)
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def compiled(svd: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    copy = shutil.copytree(svd[1], tmp_path_factory.mktemp("compiled") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(copy), "tensorrt", options=BuildOptions(sizes=((32, 32),), batches=(2, 4)))
        with Pipeline.load(copy, "tensorrt") as pipe:
            yield pipe
        assert device.leftovers() == {}


def frames_of(pipe: Pipeline, **asked: Any) -> Array:
    return pipe.video(**ASKED | {"frames": 4} | asked).frames.astype(int)


@pytest.mark.parametrize("video", VIDEOS)
def test_bound_buffers_draw_the_same_videos(plain: Pipeline, fused: Pipeline, video: str) -> None:
    with engines_of_a_gpu():
        found = frames_of(fused, **VIDEOS[video])
    assert np.abs(found - frames_of(plain, **VIDEOS[video])).max() <= LEVELS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_same_video_of_an_image(plain: Pipeline, fused: Pipeline, sampler: str) -> None:
    with engines_of_a_gpu():
        found = frames_of(fused, sampler=sampler)
    expected = frames_of(plain, sampler=sampler)
    assert np.abs(found - expected).max() <= LEVELS
    assert np.ptp(found) > 0


@pytest.mark.parametrize("video", ["as it is", "not guided", "in chunks"])
def test_compiled_stages_draw_the_same_videos(plain: Pipeline, compiled: Pipeline, video: str) -> None:
    assert np.abs(frames_of(compiled, **VIDEOS[video]) - frames_of(plain, **VIDEOS[video])).max() <= LEVELS


def test_what_is_not_compiled_is_refused(compiled: Pipeline) -> None:
    with pytest.raises(EngineError, match="--batch 3"):
        frames_of(compiled, frames=3)
    with pytest.raises(EngineError, match="--batch 3"):
        frames_of(compiled, decode_chunk=3)


def test_videos_alone_are_compiled(compiled: Pipeline) -> None:
    profiles = {str(profile) for profile in BuildOptions(batches=(4,)).profiles(compiled.manifest)}
    assert profiles == {f"40x24 pictures 4 rows {rows} tokens 1 frames 4" for rows in (4, 8)}
    with pytest.raises(RequestError, match=r"^--tokens"):
        BuildOptions(tokens=(77,)).profiles(compiled.manifest)


def test_compiled_engines_are_verified(compiled: Pipeline) -> None:
    rows = [*verify(compiled.bundle, backend="tensorrt"), *verify_stages(compiled.bundle, backend="tensorrt")]
    assert all(row.ok for row in rows), rows
    assert {row.what for row in rows} >= {"unet", "vae_decoder", "vae_encoder", "image_encoder"}


@pytest.mark.parametrize("backend", ["cpu"])
def test_fused_engines_are_verified(fused: Pipeline, backend: Any) -> None:
    with engines_of_a_gpu():
        rows = [*verify(fused.bundle, backend=backend), *verify_stages(fused.bundle, backend=backend)]
    assert all(row.ok for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("component", ["unet", "vae_decoder", "image_encoder", "vae_encoder"])
def test_a_video_of_an_image_is_compiled_without_a_gpu(svd: tuple[Path, Path], tmp_path: Path, component: str) -> None:
    try:
        library = trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    bundle = Bundle.open(svd[1])
    told = bundle.manifest.components[component]
    model = on_device(load_graph(bundle.path(told.graph)), told.role, bundle.manifest.latents)
    onnx.save(model, str(tmp_path / "device.onnx"))
    profiles = [Profile(width=64, height=64, pictures=4, rows=rows, tokens=1, frames=4) for rows in (4, 8)]
    spec = tensorrt.spec_of(component, model, profiles, factor=bundle.manifest.latents.factor)
    options = BuildOptions(compute_capability="8.9")
    plan = compile_graph(
        library, tmp_path / "device.onnx", spec, options, tf32=False, device=None, what="build", report=silent
    )
    assert plan.nbytes > 0
