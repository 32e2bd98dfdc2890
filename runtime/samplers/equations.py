"""What the model's output means: the same two formulas for every sampler."""

from __future__ import annotations

from latentrt.engines.manifest import Prediction
from latentrt.engines.spec import Array
from latentrt.runtime.schedules import Level


def denoised(x: Array, m: Array, level: Level, prediction: Prediction) -> Array:
    """Return the picture that the output m implies for latents x = alpha * picture + sigma * noise."""
    alpha, sigma = level
    if prediction == "epsilon":
        return (x - sigma * m) / alpha
    if prediction == "sample":
        return m
    # v = alpha * noise - sigma * picture on unit-variance latents: arXiv:2202.00512, App. D
    return (alpha * x / level.size - sigma * m) / level.size


def noise(x: Array, m: Array, level: Level, prediction: Prediction) -> Array:
    """Return the noise that the output m implies for latents x = alpha * picture + sigma * noise."""
    alpha, sigma = level
    if prediction == "epsilon":
        return m
    if prediction == "sample":
        return (x - alpha * m) / sigma
    return (alpha * m + sigma * x / level.size) / level.size
