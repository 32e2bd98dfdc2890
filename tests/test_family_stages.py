"""The fused stage draws what NumPy draws, for each family, from each start, with samplers of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.onnxruntime import keys
from latentrt.engines.onnxruntime.workspace import OnnxRuntimeWorkspace
from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from tests.conftest import REFINED, Make
from tests.stand_in import install
from tests.test_pipeline_images import left_half, photo

LEVELS = 2  # of 255: the same float32 sums in another order, through a whole trajectory
FAMILIES = [
    ("sd1", ""),
    ("sd2", ""),
    ("sd1", "lcm"),
    ("sd1", "inpainting"),
    ("sdxl", ""),
    ("sdxl", "inpainting"),
    ("sdxl", "refiner"),
    ("sdxl", REFINED),
    ("sd3", ""),
    ("sd3", "dual t5"),
]
STARTS: dict[str, dict[str, Any]] = {
    "text": {"size": (40, 32)},
    "image": {"image": photo(), "strength": 0.7},
    "mask": {"image": photo(), "mask": left_half(), "strength": 0.7},
}
SAMPLERS = ["euler", "dpmpp_2m_karras", "euler_ancestral", "heun", "lcm"]
OF_FLOWS = {"sd3": [*SAMPLERS[:-1], "flow_lcm"]}

Draw = Callable[..., Array]


@contextmanager
def engines_of_a_gpu() -> Iterator[None]:
    """Let the CPU build and run what a GPU does: the fused stage on bound buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "FUSED", frozenset({"cpu"}))
        yield


def on_other_workspaces(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, size: tuple[int, int]
) -> Iterator[Pipeline]:
    """Open copies of a bundle where a GPU would draw: bound to ONNX Runtime's buffers, and compiled for TensorRT.

    size: (width, height), and one or two pictures, for which they are compiled, in the folder's `compiled`
    """
    with engines_of_a_gpu():
        bound = shutil.copytree(bundle, folder / "bound")
        build_engines(Bundle.open(bound), "cpu", force=True)
        with Pipeline.load(bound, "cpu", threads=1) as pipe:
            yield pipe
    install(monkeypatch, tensorrt="11.4.0.106")
    compiled = shutil.copytree(bundle, folder / "compiled")
    build_engines(Bundle.open(compiled), "tensorrt", options=BuildOptions(sizes=(size,), batches=(1, 2)))
    with Pipeline.load(compiled) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def fused(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Draw]]:
    """Draw with the engines that a GPU would have, on the CPU."""
    known: dict[tuple[str, str], Pipeline] = {}

    def open_fused(family: str, variant: str) -> Draw:
        if (family, variant) not in known:
            copy = tmp_path_factory.mktemp("fused") / "bundle"
            shutil.copytree(made(family, variant)[1], copy)
            with engines_of_a_gpu():
                build_engines(Bundle.open(copy), "cpu", force=True)
                known[family, variant] = Pipeline.load(copy, "cpu", threads=1)

        def draw(**request: Any) -> Array:
            with engines_of_a_gpu():
                return known[family, variant](**request).pixels

        return draw

    yield open_fused
    for pipe in known.values():
        pipe.close()


def canonical(bundle: Path, **request: Any) -> Array:
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        return pipe(**request).pixels


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_every_family_is_drawn_alike_from_every_start(
    made: Make, fused: Callable[[str, str], Draw], family: str, variant: str, start: str
) -> None:
    if variant == "inpainting" and start != "mask":
        pytest.skip("an inpainting UNet repaints a part of an image, and nothing else")
    _, bundle = made(family, variant)
    draw = fused(family, variant)
    for sampler in OF_FLOWS.get(family, SAMPLERS):
        request = {"prompt": "a red circle", "steps": 4, "sampler": sampler, "guidance": 3.0, "seed": 1}
        request |= {"refine_from": 0.5} if variant == REFINED else {}
        expected = canonical(bundle, **request, **STARTS[start])
        found = draw(**request, **STARTS[start])
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= LEVELS, sampler
        assert np.ptp(found) > 0


def test_the_fused_engines_are_what_drew(fused: Callable[[str, str], Draw], monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[object] = []
    run = OnnxRuntimeWorkspace.run

    def watch(self: OnnxRuntimeWorkspace, program: str, rows: slice) -> None:
        if program == "unet":
            stages.append(rows)
        run(self, program, rows)

    monkeypatch.setattr(OnnxRuntimeWorkspace, "run", watch)
    fused("sdxl", "")(prompt="a red circle", steps=3, sampler="euler", seed=1)
    assert len(stages) == 3
