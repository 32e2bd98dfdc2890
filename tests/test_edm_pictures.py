"""Checkpoints with EDM's preconditioning, CosXL's and Playground 2.5's kinds, draw diffusers' pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.export.configs.schedule import training_schedule
from latentrt.runtime.pipeline import Pipeline
from tests.conftest import Make
from tests.test_distilled import with_schedule
from tests.test_families import LEAST, PROMPT, SEED, psnr, theirs
from tests.test_pipeline_images import photo

KINDS: Mapping[str, dict[str, Any]] = {
    "CosXL": {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": 0.002,
        "sigma_max": 120.0,
        "sigma_data": 1.0,
        "prediction_type": "v_prediction",
        "sigma_schedule": "exponential",
    },
    "Playground 2.5": {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"},
}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_brings_its_own_noise_draws_the_pictures_of_diffusers(
    made: Make, name: str, image: bool, tmp_path: Path
) -> None:
    checkpoint, bundle = made("sdxl", "")
    config = KINDS[name]
    schedule = training_schedule(config, where="scheduler_config.json", family="sdxl")
    bundle = with_schedule(bundle, schedule, tmp_path / "bundle")
    kind: Any = diffusers.StableDiffusionXLImg2ImgPipeline if image else diffusers.StableDiffusionXLPipeline
    pipe = kind.from_pretrained(checkpoint)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe.set_progress_bar_config(disable=True)
    start: dict[str, Any] = {"image": photo(), "strength": 0.6} if image else {}
    expected = theirs(pipe, guidance_scale=2.0, num_inference_steps=8, **start)
    with Pipeline.load(bundle, "cpu", threads=1) as pipe:
        assert pipe.manifest.schedule.edm is not None
        shown: list[Any] = []
        found = pipe(
            PROMPT,
            seed=SEED,
            guidance=2.0,
            steps=8,
            on_step=lambda step: shown.append((step.predicted.copy(), step.latents.copy())),
            **start,
        )
    assert Bundle.open(bundle).manifest.schedule == schedule
    assert psnr(found.pixels, expected) >= LEAST
    predicted, latents = shown[-1]
    np.testing.assert_allclose(predicted, latents, atol=0.05)  # at the last step the model has in mind what is drawn
