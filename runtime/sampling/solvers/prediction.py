"""What the model's output means: the same two formulas for every sampler."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from latentrt.engines.bundle.training import TrainingSchedule
from latentrt.engines.spec import Array
from latentrt.runtime.sampling.plan import SamplingPlan
from latentrt.runtime.sampling.schedule import Level


def denoised(x: Array, m: Array, level: Level, prediction: str) -> Array:
    """Return the picture that the output m implies for latents x = alpha * picture + sigma * noise."""
    alpha, sigma = level
    if prediction == "epsilon":
        return (x - sigma * m) / alpha
    if prediction == "sample":
        return m
    if prediction == "flow_prediction":  # noise - picture: arXiv:2209.03003
        return (x - sigma * m) / (alpha + sigma)
    # v = alpha * noise - sigma * picture on unit-variance latents: arXiv:2202.00512, App. D
    return (alpha * x / level.size - sigma * m) / level.size


def noise(x: Array, m: Array, level: Level, prediction: str) -> Array:
    """Return the noise that the output m implies for latents x = alpha * picture + sigma * noise."""
    alpha, sigma = level
    if prediction == "epsilon":
        return m
    if prediction == "sample":
        return (x - alpha * m) / sigma
    if prediction == "flow_prediction":
        return (x + alpha * m) / (alpha + sigma)
    return (alpha * m + sigma * x / level.size) / level.size


def output_units(schedule: TrainingSchedule) -> tuple[str, float, float]:
    """Return what an output means as a prediction that `denoised` knows, its sign, and the unit of the latents.

    A model with EDM's preconditioning, arXiv:2206.00364, Table 1, predicts v of latents that count in units of
    sigma_data: c_skip and c_out are the weights of `denoised`'s v with alpha = 1. EDM's epsilon has the other sign.
    """
    if schedule.edm is None:
        return schedule.prediction_type, 1.0, 1.0
    return "v_prediction", -1.0 if schedule.prediction_type == "epsilon" else 1.0, schedule.edm.sigma_data


def edm_units(plan: SamplingPlan, schedule: TrainingSchedule) -> SamplingPlan:
    """Return a plan that was made in units of sigma_data as one for the latents themselves.

    Every row of the state is multiplied by the unit: what is read from it is divided, and what enters it multiplied.
    """
    _, sign, unit = output_units(schedule)
    entering = np.array([1.0] * plan.rows + [sign * unit, unit], dtype=np.float32)
    return msgspec.structs.replace(
        plan,
        input_rows=np.float32(1 / unit) * plan.input_rows,
        transitions=entering * plan.transitions,
        initial_scale=unit * plan.initial_scale,
        levels=plan.levels * np.array([1.0, unit], dtype=np.float32),
    )


def moment_weights(nodes: Sequence[float], moments: Sequence[float]) -> Array:
    """Return w with sum(w * nodes**n) == moments[n] for every n below the number of nodes: (len(nodes),), float64."""
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.asarray(moments, dtype=np.float64))
