"""A file with marks, and a ControlNet that is a difference, draw what diffusers draws of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Control
from tests.conftest import Controlled
from tests.single_files import save_single_file
from tests.test_controlnet_files import differences
from tests.test_controlnets import PIPELINES, SIZE, hint, ours, reference
from tests.test_families import LEAST, psnr, theirs
from tests.tiny import save_controlnet


@pytest.fixture(scope="module")
def marked(sd1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Controlled:
    """A tiny checkpoint whose file says v-prediction and no signal at the end, with a ControlNet as a difference."""
    root = tmp_path_factory.mktemp("marked")
    file = save_single_file(sd1_checkpoint, root / "a.safetensors", marks={"v_pred": [], "ztsnr": []})
    edges = save_controlnet(root / "edges", family="sd1")
    save_file({**differences(sd1_checkpoint, edges), "difference": torch.ones(1)}, root / "edges.safetensors")
    options = CheckpointOptions(
        config=str(sd1_checkpoint),
        controlnets=(ControlNetOption(name="edges", path=str(root / "edges.safetensors")),),
    )
    export_checkpoint(str(file), root / "bundle", precision="fp32", options=options)
    return Controlled(checkpoint=sd1_checkpoint, networks={"edges": edges}, bundle=root / "bundle")


@pytest.mark.parametrize("told", [{"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}])
def test_marks_are_the_schedulers_options(marked: Controlled, told: dict[str, Any]) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(marked.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **told)
    expected = theirs(pipe, guidance_scale=3.0, **SIZE)
    assert len(np.unique(expected)) > 16  # a flat picture would agree with anything
    found = psnr(ours(marked, size=(40, 32)), expected)
    assert found >= LEAST if told else found < 30


def test_a_difference_draws_what_the_sum_of_the_weights_draws(marked: Controlled) -> None:
    pipe = reference(PIPELINES["sd1", "text"], marked, "edges")
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **told)
    expected = theirs(pipe, image=hint(), guidance_scale=3.0, controlnet_conditioning_scale=0.7, **SIZE)
    assert psnr(ours(marked, Control(name="edges", image=hint(), scale=0.7)), expected) >= LEAST
    with Pipeline.load(marked.bundle, "cpu", threads=1) as opened:
        assert opened.bundle.manifest.schedule.rescale_betas_zero_snr
