"""The fused stage draws the videos that NumPy draws, in windows: on ONNX Runtime's buffers, and compiled for TensorRT.

Everything of the latter is real but the device and TensorRT, for which the stand-ins of tests/stand_in.py run graphs.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions, Profile
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.verify.verify import verify
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control
from latentrt.runtime.sampling.guidance import guidance_rows
from tests.conftest import Controlled
from tests.stand_in import install
from tests.test_family_stages import LEVELS, engines_of_a_gpu

IMAGES = [Image.fromarray(one) for one in np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), np.uint8)]
ASKED: dict[str, Any] = {"size": (32, 32), "steps": 3, "seed": 4, "guidance": 3.0, "negative_prompt": "blue"}
VIDEOS: dict[str, dict[str, Any]] = {
    "one window": {"frames": 6},
    "windows": {"frames": 6, "window": 4, "overlap": 2, "sampler": "euler_ancestral"},
    "guided in part": {"frames": 6, "window": 4, "guidance_interval": (0.0, 0.5), "sampler": "dpmpp_2m"},
    "controlled": {"frames": 6, "window": 4, "controls": [Control(name="edges", image=IMAGES, stop=0.7)]},
}


@pytest.fixture(scope="module")
def plain(motion: Controlled) -> Iterator[Pipeline]:
    with Pipeline.load(motion.bundle, "cpu", threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def fused(motion: Controlled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    copy = shutil.copytree(motion.bundle, tmp_path_factory.mktemp("fused") / "bundle")
    with engines_of_a_gpu():  # which holds for all of the process, so for its own calls alone
        build_engines(Bundle.open(copy), "cpu", force=True)
        pipe = Pipeline.load(copy, "cpu", threads=1)
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def compiled(motion: Controlled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    copy = shutil.copytree(motion.bundle, tmp_path_factory.mktemp("compiled") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        options = BuildOptions(sizes=((32, 32),), batches=(2, 20), tokens=(77,), references=False)
        build_engines(Bundle.open(copy), "tensorrt", options=options)
        with Pipeline.load(copy, "tensorrt") as pipe:
            yield pipe
        assert device.leftovers() == {}


def frames_of(pipe: Pipeline, **asked: Any) -> Array:
    return pipe.video("a red circle", **ASKED | asked).frames.astype(int)


@pytest.mark.parametrize("video", VIDEOS)
def test_bound_buffers_draw_the_same_videos(plain: Pipeline, fused: Pipeline, video: str) -> None:
    with engines_of_a_gpu():
        found = frames_of(fused, **VIDEOS[video])
    assert np.abs(found - frames_of(plain, **VIDEOS[video])).max() <= LEVELS


@pytest.mark.parametrize("frames", [2, 20])
def test_compiled_stages_draw_the_same_videos(plain: Pipeline, compiled: Pipeline, frames: int) -> None:
    for guidance in (1.0, 3.0):
        asked = {"frames": frames, "steps": 2, "guidance": guidance}
        assert np.abs(frames_of(compiled, **asked) - frames_of(plain, **asked)).max() <= LEVELS


def test_pictures_are_compiled_beside_videos(plain: Pipeline, compiled: Pipeline) -> None:
    found, expected = (pipe("a red circle", n=2, **ASKED).pixels.astype(int) for pipe in (compiled, plain))
    assert np.abs(found - expected).max() <= LEVELS


def test_a_video_that_is_not_compiled_is_refused(compiled: Pipeline) -> None:
    with pytest.raises(EngineError, match="--batch 5"):
        frames_of(compiled, frames=5)


def test_every_profile_is_verified(motion: Controlled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(motion.bundle, tmp_path / "bundle")
    install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(
        Bundle.open(copy), "tensorrt", options=BuildOptions(sizes=((32, 32),), batches=(1, 4, 20), tokens=(77,))
    )
    rows = [row for row in verify(Bundle.open(copy), backend="tensorrt") if row.what in ("unet", "controlnet_edges")]
    assert all(row.ok for row in rows), rows
    assert {word for row in rows for word in row.profile.split(", ") if word.startswith("frames")} == {
        "frames 1",
        "frames 4",
        "frames 16",  # of twenty: in two windows that overlap
    }


@pytest.mark.slow
def test_the_stage_of_a_video_is_compiled_without_a_gpu(motion: Controlled, tmp_path: Path) -> None:
    try:
        library = trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    bundle = Bundle.open(motion.bundle)
    model = fuse_stage(load_graph(bundle.path(bundle.manifest.components["unet"].graph)))
    onnx.save(model, str(tmp_path / "fused.onnx"))
    profiles = [Profile(width=64, height=64, pictures=4, rows=rows, tokens=77, frames=4) for rows in (4, 8)]
    spec = tensorrt.spec_of("unet", model, profiles, factor=bundle.manifest.latents.factor)
    options = BuildOptions(compute_capability="8.9")
    plan = compile_graph(
        library, tmp_path / "fused.onnx", spec, options, tf32=False, device=None, what="build unet", report=silent
    )
    assert plan.nbytes > 0


def test_the_graph_is_verified_on_both_workspaces(motion: Controlled, fused: Pipeline) -> None:
    for bundle, patched in ((Bundle.open(motion.bundle), contextlib.nullcontext()), (fused.bundle, engines_of_a_gpu())):
        with patched:
            rows = [row for row in verify(bundle, backend="cpu") if row.what in ("unet", "controlnet_edges")]
        assert [row.ok for row in rows] == [True, True], rows


def test_rows_of_a_frame_share_its_weight() -> None:
    slots, shares = np.array([0, 1, 1, 2]), np.array([1, 0.25, 0.75, 1], np.float32)
    weights = np.array([[3, 2, 1], [-2, -1, 0]], np.float32)
    matrix, owners = guidance_rows(weights, 10, slots=slots, shares=shares)
    assert owners.tolist() == [0, 1, 1, 2, 0, 1, 1, 2, 0, 1]
    assert np.array_equal(matrix.sum(axis=1), weights.sum(axis=0))
    assert matrix[1].tolist() == [0, 0.5, 1.5, 0, 0, -0.25, -0.75, 0, 0, 0]
