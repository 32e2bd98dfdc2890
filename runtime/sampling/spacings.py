"""Noise ratios by formula: where a sampler spends its steps between the most and the least noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array


class Ends(NamedTuple):
    """What a spacing may depend on: the ratios to begin and end with, all training ratios, increasing, an exponent."""

    high: float
    low: float
    table: Array
    rho: float = 7.0


def karras(ends: Ends, steps: int) -> Array:
    """Return ratios that are even in their rho-th root: (steps,), float64."""
    # Elucidating the Design Space, arXiv:2206.00364, eq. 5
    first, last = ends.high ** (1 / ends.rho), ends.low ** (1 / ends.rho)
    return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** ends.rho, dtype=np.float64)


def exponential(ends: Ends, steps: int) -> Array:
    """Return ratios that are even in their logarithm: (steps,), float64."""
    return np.exp(np.linspace(math.log(ends.high), math.log(ends.low), steps))


def beta(ends: Ends, steps: int) -> Array:
    """Return ratios at even quantiles of Beta(0.6, 0.6), which crowd at both ends: (steps,), float64."""
    # Beta Sampling is All You Need, arXiv:2407.12173
    shares = _symmetric_beta_quantiles(1 - np.linspace(0, 1, steps), 0.6)
    return np.asarray(ends.low + shares * (ends.high - ends.low), dtype=np.float64)


def simple(ends: Ends, steps: int) -> Array:
    """Return every T / steps-th training ratio from the top: (steps,), float64."""
    total = len(ends.table)
    return ends.table[[total - 1 - int(k * total / steps) for k in range(steps)]].astype(np.float64)


def sgm_uniform(ends: Ends, steps: int) -> Array:
    """Return the ratios at even timesteps, the last of steps + 1 left out: (steps,), float64."""
    timesteps = np.linspace(len(ends.table) - 1, 0, steps + 1)[:-1]
    logs = np.interp(timesteps, np.arange(len(ends.table)), np.log(ends.table))
    return np.asarray(np.exp(logs), dtype=np.float64)


# Align Your Steps, arXiv:2404.14507: the ratios its authors publish for ten steps, and for the others
# interpolate as they do. Made for the noise of Stable Diffusion 1.5 and SDXL, which reaches 14.615.
ALIGNED = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def _aligned(name: str) -> Callable[[Ends, int], Array]:
    known = ALIGNED[name]

    def spacing(ends: Ends, steps: int) -> Array:
        if abs(float(ends.table[-1]) / known[0] - 1) > 0.01:
            raise RequestError(
                f"spacing: '{name}' is published for noise up to {known[0]}, and this checkpoint's reaches "
                f"{float(ends.table[-1]):.5g}; use karras"
            )
        wanted = np.linspace(0, len(known) - 1, steps + 1)[:-1]
        return np.exp(np.interp(wanted, np.arange(len(known)), np.log(known)))

    return spacing


BY_FORMULA = ("karras", "exponential", "lu", "beta")  # need the ends alone, no training timesteps

SPACINGS: dict[str, Callable[[Ends, int], Array]] = {
    "karras": karras,
    "exponential": exponential,
    "lu": exponential,  # even in half-log-SNR, arXiv:2206.00927: the same ratios, of which the model is told otherwise
    "beta": beta,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "ays": _aligned("ays"),
    "ays_sdxl": _aligned("ays_sdxl"),
}


def _symmetric_beta_quantiles(shares: Array, a: float) -> Array:
    """Return the quantiles of Beta(a, a) by bisection: the shape of `shares`, float64."""
    half = np.minimum(shares, 1 - shares)
    low, high = np.zeros_like(half), np.full_like(half, 0.5**a)
    for _ in range(60):  # each halves the interval; in x**a, so that small quantiles keep their digits
        middle = (low + high) / 2
        below = _symmetric_beta_cumulative(middle ** (1 / a), a) < half
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = ((low + high) / 2) ** (1 / a)
    quantile = np.where(half == 0, 0.0, quantile)
    return np.where(shares <= 0.5, quantile, 1 - quantile)


def _symmetric_beta_cumulative(x: Array, a: float) -> Array:
    # Abramowitz & Stegun 26.5.4: x^a / (a B(a, a)) * 2F1(a, 1 - a; a + 1; x), for x up to 1/2
    term, total = np.ones_like(x), np.ones_like(x)
    for n in range(60):
        term = term * x * (a + n) * (1 - a + n) / ((a + 1 + n) * (n + 1))
        total = total + term
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)
    return np.asarray(x**a / (a * whole) * total)
