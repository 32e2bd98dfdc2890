"""The public class draws with engines on a device what it draws in NumPy: every family, start and kind of prompt.

Everything is real but the device and TensorRT, for which the stand-ins of tests/stand_in.py run the graphs late.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import NotFiniteError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.finite import LATENTS
from latentrt.runtime.draw.step import Step
from latentrt.runtime.pipeline import Pipeline
from tests.conftest import REFINED, Make
from tests.host_device import HostDevice
from tests.stand_in import install
from tests.test_pipeline_images import left_half, photo

LEVELS = 2  # of 255: the same float32 sums in another order, through a whole trajectory
SIZE = (40, 32)
OPTIONS = BuildOptions(sizes=(SIZE, (32, 32)), batches=(1, 2), tokens=(77, 154), references=False)
FAMILIES = [("sd1", ""), ("sd2", ""), ("sd1", "lcm"), ("sd1", "inpainting"), ("sdxl", ""), ("sdxl", REFINED)]
LONG = "a red circle on a blue square " * 20

REQUESTS: dict[str, dict[str, Any]] = {
    "text": {},
    "two of a text": {"n": 2, "sampler": "euler_ancestral"},
    "no guidance": {"guidance": 1.0},
    "guidance for a while, with its contrast restored": {"guidance_interval": (0.2, 0.7), "guidance_rescale": 0.7},
    "weights": {"prompt": "a (red:1.4) circle on a (blue:0.5) square"},
    "a long prompt": {"prompt": LONG},
    "two long prompts": {"prompt": LONG, "negative_prompt": LONG[9:]},
    "an image": {"image": photo(), "strength": 0.7, "size": None},
    "an image and a mask": {"image": photo(), "mask": left_half(), "strength": 0.7, "size": None},
    "a sampler that looks twice": {"sampler": "heun"},
}


class Pair:
    """One bundle opened twice: on the device, and on the CPU."""

    def __init__(self, root: Path, device: HostDevice) -> None:
        self.device = device
        self.compiled, self.plain = Pipeline.load(root), Pipeline.load(root, "cpu", threads=1)

    def close(self) -> None:
        self.compiled.close()
        self.plain.close()
        assert self.device.leftovers() == {}


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def pair(request: pytest.FixtureRequest, made: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = shutil.copytree(made(*request.param)[1], tmp_path_factory.mktemp("compiled") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(root), "tensorrt", options=OPTIONS)
        pair = Pair(root, device)
        yield pair
        pair.close()


def repaints(pair: Pair) -> bool:
    """Tell whether it is an inpainting model, which draws from a mask alone."""
    return pair.compiled.manifest.components["unet"].inputs[0].shape[1] == 9


def request_for(pair: Pair, **asked: Any) -> dict[str, Any]:
    """Return a request, with an image and a mask where the model draws from nothing else."""
    refined = {"refine_from": 0.5} if pair.plain.manifest.refiner else {}
    known = {"prompt": "a red circle", "sampler": "euler", "size": SIZE, "steps": 4, "seed": 3, **refined, **asked}
    return known | {"image": photo(), "mask": left_half(), "size": None} if repaints(pair) else known


def skip_distilled(pair: Pair) -> None:
    if "timestep_cond" in {spec.name for spec in pair.plain.manifest.components["unet"].inputs}:
        pytest.skip("guidance is a number that this UNet is told, and multiplies nothing")


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"n": 2, "guidance_interval": (0.0, 0.5)}], ids=str)
def test_what_is_not_finite_is_never_given(pair: Pair, options: dict[str, Any]) -> None:
    """A device tells at the end, with the pixels; a refiner's base where it hands over. The next call is as ever."""
    skip_distilled(pair)
    asked = request_for(pair)
    expected = pair.compiled(**asked)
    with pytest.raises(NotFiniteError) as caught:
        pair.compiled(**request_for(pair, guidance=1e30, **options))
    pictures = tuple(range(options.get("n", 1)))
    assert (caught.value.stages, caught.value.pictures, caught.value.place) == (4, pictures, LATENTS)
    assert_close(pair.compiled(**asked).pixels, expected.pixels)


def test_a_caller_who_watches_is_told_at_the_stage(pair: Pair) -> None:
    skip_distilled(pair)
    with pytest.raises(NotFiniteError) as caught:
        pair.compiled(**request_for(pair, guidance=1e30), on_step=lambda step: step.latents.sum())
    assert (caught.value.stage, caught.value.stages) == (1, 4)


@pytest.mark.parametrize("name", REQUESTS)
def test_what_a_device_draws_is_what_numpy_draws(pair: Pair, name: str) -> None:
    """Twice, so that graphs are launched as well as recorded, and after whatever the tests before left there."""
    asked = request_for(pair, **REQUESTS[name])
    expected = pair.plain(**asked)
    for _ in range(2):
        found = pair.compiled(**asked)
        assert found.backend == "tensorrt" and len(found.step_seconds) == len(expected.step_seconds)
        assert_close(found.pixels, expected.pixels)


def assert_close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= LEVELS


def test_a_caller_who_watches_sees_each_stage(pair: Pair) -> None:
    asked = request_for(pair, steps=3)
    seen: dict[Pipeline, list[Array]] = {pair.compiled: [], pair.plain: []}
    for pipe, latents in seen.items():
        pipe(**asked, on_step=lambda step, latents=latents: latents.append(step.latents))
    assert len(seen[pair.compiled]) == len(seen[pair.plain]) == 3
    for found, expected in zip(*seen.values(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_call_that_ends_early_leaves_no_trace_in_the_next(pair: Pair) -> None:
    asked = request_for(pair, steps=3)

    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.compiled(**asked | {"seed": 4}, on_step=stop)
    found = pair.compiled(**asked)
    assert_close(found.pixels, pair.plain(**asked).pixels)
    assert len(found.step_seconds) == 3


def test_a_picture_from_text_is_waited_for_once(pair: Pair) -> None:
    """A fresh prompt each time: what was encoded before is remembered on the host, and would be written."""
    for word in ("red", "blue"):
        pair.device.forget()
        pair.compiled(**request_for(pair, prompt=f"a {word} square on a circle"))
    waits = pair.device.counted()["wait"]
    one_encoder = (
        len(pair.compiled.manifest.of_role("text_encoder")) == 1
    )  # what SDXL's two give is put together on the host
    assert waits == 1 if one_encoder and not repaints(pair) else waits > 1
    assert pair.device.counted()["synchronize"] == 0


def test_an_image_is_read_by_the_engines_of_its_size(sd1_bundle: Path, tmp_path: Path) -> None:
    """Engines of two sizes in two directories: what is opened first is of no use to the other size."""
    root = shutil.copytree(sd1_bundle, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        for size in (SIZE, (32, 32)):
            options = BuildOptions(sizes=(size,), batches=(1,), tokens=(77,), references=False)
            build_engines(Bundle.open(root), "tensorrt", options=options)
        pair = Pair(root, device)
        for _ in range(2):
            for size in (SIZE, (32, 32)):
                asked = request_for(pair, image=photo(*size), strength=0.7, size=None)
                assert_close(pair.compiled(**asked).pixels, pair.plain(**asked).pixels)
        pair.close()
