"""Guidance as a matrix: the model runs on rows, and a picture's guided output is a weighted sum of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.plan import SamplingPlan

Denoiser = Callable[[Array, Array], Array]
"""(latents (n, C, h, w) float32, timesteps (n,) float32) -> guided output (n, C, h, w)"""

Model = Callable[[Array, Array, Array], Array]
"""(latents (rows, C, h, w), timesteps (rows,), text (rows, T, D)) -> raw output (rows, C, h, w)"""


class Interval(NamedTuple):
    """The timesteps at which guidance is on, both ends with it."""

    low: float
    high: float


ALWAYS = Interval(-math.inf, math.inf)


def guidance_interval(plan: SamplingPlan, start: float, stop: float) -> Interval:
    """Return the timesteps of a plan's stages from one fraction of them to another, for `classifier_free`.

    start, stop: 0 to 1; stage k of K is guided when start <= k / K < stop, as in arXiv:2404.07724
    Raises RequestError when they are not in order, or no stage lies between them.
    """
    if not 0 <= start < stop <= 1:
        raise RequestError(f"guidance interval: found {start:g} to {stop:g}, expected 0 <= start < stop <= 1")
    first, end = math.ceil(start * plan.stages), math.ceil(stop * plan.stages)
    if first == end:
        raise RequestError(
            f"guidance interval: no one of {plan.stages} stages lies from {start:g} to {stop:g}; "
            "use guidance 1 for no guidance"
        )
    inside = plan.timesteps[first:end]
    return Interval(float(inside.min()), float(inside.max()))


def classifier_free(
    model: Model,
    text: Array,
    negative: Array | None,
    guidance: float | Array,
    *,
    interval: Interval = ALWAYS,
    rescale: float = 0.0,
) -> Denoiser:
    """Wrap a model into a denoiser whose output is negative + guidance * (text - negative), arXiv:2207.12598.

    text: (n, T, D); negative: the same, or None for no guidance
    guidance: one scale, or one a picture, (n,). At 1 the negative has no weight and is not computed: that
    picture costs one row instead of two
    interval: outside of these timesteps a picture is not guided, and costs one row
    rescale: how much of the prompt's own contrast to restore, 0 to 1: arXiv:2305.08891, eqs. 14 to 16
    Raises RequestError when the shapes differ or a number is not finite.
    """
    scales = _scales(guidance, len(text))
    if not 0 <= rescale <= 1:
        raise RequestError(f"guidance rescale: found {rescale}, expected 0 to 1")
    if negative is not None and negative.shape != text.shape:
        raise RequestError(f"negative prompt: found shape {negative.shape}, expected {text.shape}")

    def denoiser(latents: Array, timesteps: Array) -> Array:
        inside = (timesteps >= interval.low) & (timesteps <= interval.high)
        guided = np.flatnonzero(inside & (scales != 1))
        if negative is None or not len(guided):
            return model(latents, timesteps, text)
        rows = np.concatenate([guided, np.arange(len(text))])
        outputs = model(latents[rows], timesteps[rows], np.concatenate([negative[guided], text]))
        mixed = np.tensordot(guidance_matrix(scales, guided), outputs, axes=1).astype(np.float32, copy=False)
        return _restore_contrast(mixed, outputs[len(guided) :], guided, rescale) if rescale else mixed

    return denoiser


def guidance_matrix(scales: Array, guided: Array) -> Array:
    """Return G of `output = G @ rows`, the negative rows of the guided pictures before every picture's own.

    scales: (n,); guided: the indices of the guided pictures, (g,); returns: (n, g + n), float32
    """
    weights = np.ones(len(scales), dtype=np.float32)
    weights[guided] = scales[guided]
    matrix = np.zeros((len(scales), len(guided) + len(scales)), dtype=np.float32)
    matrix[:, len(guided) :] = np.diag(weights)
    matrix[guided, np.arange(len(guided))] = 1 - scales[guided]
    return matrix


def _scales(guidance: float | Array, pictures: int) -> Array:
    scales = np.asarray(guidance, dtype=np.float32)
    if scales.shape not in ((), (pictures,)) or not np.isfinite(scales).all():
        raise RequestError(f"guidance: found {guidance}, expected a number, or one for each of {pictures} pictures")
    return np.broadcast_to(scales, (pictures,))


def _restore_contrast(mixed: Array, own: Array, guided: Array, rescale: float) -> Array:
    """Return the guided outputs with their deviation moved towards that of the prompt's own outputs."""
    axes = tuple(range(1, mixed.ndim))
    ratio = own[guided].std(axis=axes, keepdims=True) / mixed[guided].std(axis=axes, keepdims=True)
    restored = mixed.copy()
    restored[guided] *= rescale * ratio + (1 - rescale)
    return restored
