"""A tiny decoder beside SD 3's VAE, as TAESD3 is: diffusers' picture with an AutoencoderTiny in the VAE's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.verify.verify import verify
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions
from tests.conftest import Make
from tests.sd3 import diffusers_sd3
from tests.test_families import LEAST, psnr
from tests.test_sd3 import PROMPT, SEED, SIZE, STEPS, drawn
from tests.test_tiny_decoder import save_tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")


OTHERS = {"scaling_factor": 1.5, "shift_factor": 0.06}


@pytest.mark.parametrize(
    "numbers", [pytest.param({}, id="TAESD3's"), pytest.param(OTHERS, id="others", marks=pytest.mark.slow)]
)
def test_pictures_are_those_of_diffusers(made: Make, tmp_path: Path, numbers: dict[str, float]) -> None:
    """TAESD3 takes latents as the transformer gives them: its scaling factor is 1 and its shift 0."""
    checkpoint, _ = made("sd3", "")
    tiny = save_tiny_vae(tmp_path / "tiny", latent_channels=16, **numbers)
    options = CheckpointOptions(tiny_vae=str(tiny))
    export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp32", options=options)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "guidance": 4.0, "size": SIZE}
    drafts = []
    with Pipeline.load(tmp_path / "bundle", "cpu", threads=1) as pipe:
        found = pipe(**asked, decoder="tiny", on_step=lambda step: drafts.append(step.draft)).pixels
        assert psnr(pipe(**asked).pixels, found) < LEAST
    theirs = diffusers_sd3(checkpoint, vae=diffusers.AutoencoderTiny.from_pretrained(tiny))
    call = {"guidance_scale": 4.0, "width": SIZE[0], "height": SIZE[1], "output_type": "np"}
    expected = np.asarray((drawn(theirs, **call) * 255).round())
    assert len(np.unique(expected)) > 16
    assert psnr(found, expected) >= LEAST
    assert psnr(drafts[-1], expected) >= LEAST  # the last stage's draft is the picture
    assert all(row.ok for row in verify(Bundle.open(tmp_path / "bundle"), backend="cpu"))
