"""The same checkpoint, seed, sampler, steps and guidance give the picture that diffusers gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.spec import Array
from latentrt.export.checkpoint import DEMO
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.plan_text import format_samplers, samplers_table

# PSNR in dB that the final uint8 pictures must reach. 60: one pixel value in sixteen may differ by one level, which is
# what float32 sums in another order leave. 50 for random weights, which amplify differences instead of forgetting them.
# 35 for fp16 weights against fp32: 11 bits over twenty steps.
LIMITS = {"demo": 60.0, "random": 50.0, "fp16": 35.0}
PROMPT, NEGATIVE = "a large red circle on a striped blue background", "green"

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


def psnr(first: Array, second: Array) -> float:
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


class Reference:
    """diffusers' own pipeline on a checkpoint, loaded once."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from diffusers import StableDiffusionPipeline

        self.pipe = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, sampler: str, seeds: list[int], **request: Any) -> Array:
        import diffusers

        name, options = SAMPLERS[sampler]
        self.pipe.scheduler = getattr(diffusers, name).from_config(self.pipe.scheduler.config, **options)
        return self.draw(seeds, **request)

    def draw(self, seeds: list[int], **request: Any) -> Array:
        """Draw with the scheduler as it is."""
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures = self.pipe(
            [PROMPT] * len(seeds),
            negative_prompt=[NEGATIVE] * len(seeds),
            generator=generators,
            output_type="np",
            **request,
        ).images
        return np.asarray((pictures * 255).round().astype(np.uint8))


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    return Reference(DEMO)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_demo_checkpoint_draws_the_pictures_of_diffusers(
    sampler: str, demo_bundle: Path, demo_reference: Reference
) -> None:
    expected = demo_reference(sampler, [7, 8], num_inference_steps=12, guidance_scale=3.0)
    with Pipeline.load(demo_bundle, "cpu") as pipe:
        found = pipe(PROMPT, negative_prompt=NEGATIVE, n=2, seed=7, sampler=sampler, steps=12, guidance=3.0)
    assert found.seeds == (7, 8)
    for ours, theirs in zip(found.pixels, expected, strict=True):
        assert psnr(ours, theirs) >= LIMITS["demo"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_v_prediction_checkpoint_draws_the_pictures_of_diffusers(
    sampler: str, sd2_bundle: Path, sd2_checkpoint: Path
) -> None:
    reference = Reference(sd2_checkpoint)
    expected = reference(sampler, [3, 11], num_inference_steps=8, guidance_scale=2.0, width=24, height=32)
    with Pipeline.load(sd2_bundle, "cpu") as pipe:
        found = pipe(
            PROMPT, negative_prompt=NEGATIVE, n=2, seed=[3, 11], sampler=sampler, steps=8, guidance=2.0, size=(24, 32)
        )
    assert found.pixels.shape == (2, 32, 24, 3)
    assert len(np.unique(found.pixels)) > 16  # a flat picture would agree with anything
    for ours, theirs in zip(found.pixels, expected, strict=True):
        assert psnr(ours, theirs) >= LIMITS["random"]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samplers_that_diffusers_clips_are_its_own_without_clipping(
    sampler: str, sd1_bundle: Path, sd1_checkpoint: Path
) -> None:
    """The config is PNDM's and leaves clip_sample out. What clips is another sampler, as `latentrt samplers` says."""
    import diffusers

    reference = Reference(sd1_checkpoint)
    config = dict(reference.pipe.scheduler.config)
    assert config["_class_name"] == "PNDMScheduler" and "clip_sample" not in config
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe:
        found = pipe(PROMPT, negative_prompt=NEGATIVE, seed=7, sampler=sampler, steps=8, guidance=3.0).pixels[0]
    against = {}
    for clips in (None, False):
        options = {} if clips is None else {"clip_sample": clips}
        reference.pipe.scheduler = getattr(diffusers, f"{sampler.upper()}Scheduler").from_config(config, **options)
        assert reference.pipe.scheduler.config["clip_sample"] is (clips is None)
        against[clips] = psnr(found, reference.draw([7], num_inference_steps=8, guidance_scale=3.0)[0])
    assert against[False] >= LIMITS["random"]
    assert against[None] < 25
    note = next(row["note"] for row in samplers_table() if row["name"] == sampler)
    assert "clip_sample" in note and note in format_samplers()


def test_an_fp16_bundle_draws_the_pictures_of_the_fp32_one(demo_bundle: Path, demo_half_bundle: Path) -> None:
    pictures = []
    for bundle in (demo_bundle, demo_half_bundle):
        with Pipeline.load(bundle, "cpu") as pipe:
            pictures.append(pipe(PROMPT, seed=7, steps=20, guidance=3.0).pixels)
    assert psnr(*pictures) >= LIMITS["fp16"]
