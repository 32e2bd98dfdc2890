"""Drawing from an image through the public class: the pictures of diffusers' own pipelines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.noise import TorchCpuNoise
from tests.refused import about

LEAST = 50.0  # dB over the range of pixels: float32 sums in another order, amplified by random weights
CALL: dict[str, Any] = {"steps": 5, "sampler": "ddim", "guidance": 2.0, "seed": 5}
PROMPT = "a red circle on blue"


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def photo(width: int = 40, height: int = 32) -> Image.Image:
    rows, columns = np.indices((height, width)) / np.array([[[height]], [[width]]])
    colours = np.stack([rows, columns, (rows - 0.5) ** 2 + (columns - 0.5) ** 2 < 0.1], axis=-1)
    return Image.fromarray((colours * 255).astype(np.uint8))


def left_half(width: int = 40, height: int = 32) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


def theirs(kind: Any, checkpoint: Path, **request: Any) -> Array:
    reference = kind.from_pretrained(checkpoint, safety_checker=None, requires_safety_checker=False)
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    reference.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(CALL["seed"])
    common = {"num_inference_steps": CALL["steps"], "guidance_scale": CALL["guidance"], "output_type": "np"}
    pictures = reference(PROMPT, generator=generator, **common, **request).images
    return np.asarray((pictures * 255).round())


def psnr(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return math.inf if error == 0 else 20 * math.log10(255) - 10 * math.log10(error)


@pytest.mark.parametrize("strength", [0.4, None, 1.0])
def test_an_image_is_changed_as_diffusers_changes_it(
    pipe: Pipeline, sd1_checkpoint: Path, strength: float | None
) -> None:
    request = {} if strength is None else {"strength": strength}
    expected = theirs(diffusers.StableDiffusionImg2ImgPipeline, sd1_checkpoint, image=photo(), **request)
    assert psnr(pipe(PROMPT, image=photo(), strength=strength, **CALL).pixels, expected) >= LEAST


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_masked_image_is_repainted_as_diffusers_repaints_it(
    pipe: Pipeline, sd1_checkpoint: Path, strength: float
) -> None:
    request = {"image": photo(), "mask_image": left_half(), "width": 40, "height": 32, "strength": strength}
    expected = theirs(diffusers.StableDiffusionInpaintPipeline, sd1_checkpoint, **request)
    found = pipe(PROMPT, image=photo(), mask=left_half(), strength=strength, **CALL)
    assert psnr(found.pixels, expected) >= LEAST


def test_a_file_is_read_and_its_size_is_the_pictures(pipe: Pipeline, tmp_path: Path) -> None:
    photo(43, 34).save(tmp_path / "photo.png")
    found = pipe(PROMPT, image=tmp_path / "photo.png", **CALL)
    assert found.pixels.shape == (1, 32, 40, 3) and found.settings[0].size == (40, 32)


def test_each_picture_may_have_its_own_image(pipe: Pipeline) -> None:
    other = photo().transpose(Image.Transpose.ROTATE_180)
    both = pipe([PROMPT, PROMPT], image=[photo(), other], **{**CALL, "seed": [1, 2]})
    for i, image in enumerate((photo(), other)):
        alone = pipe(PROMPT, image=image, **{**CALL, "seed": i + 1})
        assert np.abs(both.pixels[i].astype(int) - alone.pixels[0].astype(int)).max() <= 1


def test_the_callers_latents_take_the_place_of_the_seeds(pipe: Pipeline) -> None:
    noise = TorchCpuNoise(CALL["seed"]).normal((1, 4, 8, 8))
    expected = pipe(PROMPT, **CALL)
    assert np.array_equal(pipe(PROMPT, latents=noise[0], **{**CALL, "seed": 99}).pixels, expected.pixels)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask": left_half()}, "mask"),
        ({"image": photo(), "strength": 1.5}, "strength"),
        ({"image": photo(), "strength": 0.0}, "strength"),
        ({"image": photo(), "mask": left_half(8, 8)}, "mask"),
        ({"image": [photo(), photo()], "mask": left_half()}, "mask"),
        ({"image": [photo(), photo()]}, "image"),
        ({"image": b"no picture"}, "image"),
        ({"image": "/nowhere.png"}, "image"),
        (
            {"latents": np.zeros((4, 3, 3), dtype=np.float32)},
            "latents",
        ),
    ],
)
def test_what_cannot_be_started_from_is_refused(pipe: Pipeline, request_: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        pipe(PROMPT, **CALL, **request_)
