"""Small pictures of latents while they are being drawn: one matrix, fitted at export, instead of the VAE."""

from __future__ import annotations

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.errors import BundleError
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.schedule import Level
from latentrt.runtime.sampling.solvers.prediction import denoised, output_units


def preview(latents: Array, space: LatentSpec) -> Array:
    """Return what latents show, one pixel for each: (n, h, w, 3), uint8, sRGB.

    latents: (n, C, h, w), clean ones, such as `predicted_latents` gives
    Raises BundleError if the bundle has no preview.
    """
    if space.preview is None:
        raise BundleError(
            "this bundle has no latent preview: it was made by an older latentrt; export the checkpoint again"
        )
    *rows, offset = np.array(space.preview, dtype=np.float32)
    colours = np.moveaxis(latents, 1, -1).astype(np.float32, copy=False) @ np.stack(rows) + (offset + np.float32(0.5))
    return np.asarray(np.clip(colours, 0, 255), dtype=np.uint8)


def predicted_latents(
    before: Array,
    after: Array,
    plan: SamplingPlan,
    stage: int,
    schedule: TrainingSchedule,
    *,
    noise: Array | None = None,
) -> Array:
    """Return the clean latents that the model saw in a stage, long before the latents are: (n, C, h, w), float32.

    before, after: the states around the stage, (n, R, C, h, w)
    schedule: the manifest's, which says what the model predicts
    noise: (n, C, h, w), what was drawn for the stage; needed where `plan.uses_noise[stage]`
    The transition is solved for the model's output, in the row of the state where it weighs most. Outside a mask that
    row may hold the kept image: put that there, it is known.
    """
    transition, rows = plan.transitions[stage].astype(np.float64), plan.rows
    row = int(np.argmax(np.abs(transition[:, rows])))
    rest = after[:, row] - np.einsum("r,nr...->n...", transition[row, :rows], before[:, :rows])
    if transition[row, -1]:
        if noise is None:
            raise ValueError(f"stage {stage} of {plan.sampler} takes noise: give it")
        rest = rest - transition[row, -1] * noise
    prediction, sign, unit = output_units(schedule)
    alpha, sigma = (float(weight) for weight in plan.levels[stage])
    output = sign * rest / transition[row, rows]
    found = unit * denoised(before[:, 0] / unit, output, Level(alpha, sigma / unit), prediction)
    return np.asarray(found, dtype=np.float32)
