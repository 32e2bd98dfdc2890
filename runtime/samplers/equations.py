"""What the model's output means: the same two formulas for every sampler."""

from __future__ import annotations

from latentrt.engines.spec import Array
from latentrt.runtime.schedules import Level


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
