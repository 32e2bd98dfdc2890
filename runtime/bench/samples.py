"""What a list of measurements says: quantiles, spread, intervals of medians and of ratios. Pure functions.

Every interval here is made of ranks, not of a normal distribution: latencies have long tails to one side. No
measurement is ever left out; those far from the rest are counted and shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from latentrt.engines.spec import Document

CONFIDENCE = 0.95
FAR = 3.0  # an outlier lies more than this many quartile ranges beyond the quartiles (Tukey's "far out")


class Summary(Document, frozen=True, kw_only=True):
    """What a list of measurements says, in their own unit.

    p90, p95, p99: interpolated between neighbours; with few measurements p99 is nearly the largest
    spread: the distance between the quartiles over the median
    median_low, median_high: where the true median lies with 95 % confidence; null with fewer than 6 measurements
    outliers: how many lie over three quartile ranges beyond the quartiles; they are in every other figure too
    """

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    lowest: float
    highest: float
    spread: float
    median_low: float | None
    median_high: float | None
    outliers: int


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as large one list is as another, with its interval; null where too few were measured."""

    estimate: float
    low: float | None
    high: float | None


def summarise(samples: Sequence[float]) -> Summary:
    """Summarise one or more measurements. Raises ValueError for none."""
    if not len(samples):
        raise ValueError("there is nothing to summarise")
    values = np.sort(np.asarray(samples, dtype=np.float64))
    first, p50, third, p90, p95, p99 = np.quantile(values, [0.25, 0.5, 0.75, 0.9, 0.95, 0.99]).tolist()
    reach = FAR * (third - first)
    interval = median_interval(values.tolist())
    return Summary(
        count=len(values),
        mean=float(values.mean()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        lowest=float(values[0]),
        highest=float(values[-1]),
        spread=(third - first) / p50 if p50 else 0.0,
        median_low=interval[0] if interval else None,
        median_high=interval[1] if interval else None,
        outliers=int(np.sum((values < first - reach) | (values > third + reach))),
    )


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval that holds the true median with the confidence of CONFIDENCE, or None if too few are here.

    The k-th smallest and k-th largest measurement: the number of measurements below the true median is binomial
    with probability 1/2, whatever the distribution (the sign test, inverted).
    """
    n = len(samples)
    tail, k = 0.0, 0  # the chance that at most k of n lie below the median
    while k < n // 2 and tail + math.comb(n, k) / 2**n <= (1 - CONFIDENCE) / 2:
        tail += math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


def unpaired_ratio(before: Sequence[float], after: Sequence[float], confidence: float) -> Ratio:
    """Return how many times as large `after` is as `before`, where the two were measured apart.

    The median of all quotients after[j] / before[i] (Hodges-Lehmann on logarithms), and the quotients between which
    the Mann-Whitney test sees no difference (Moses' interval, with the normal approximation of its rank).
    """
    quotients = np.sort(np.divide.outer(np.asarray(after, np.float64), np.asarray(before, np.float64)).ravel())
    m, n = len(before), len(after)
    z = normal_quantile((1 + confidence) / 2)
    k = math.floor(m * n / 2 - z * math.sqrt(m * n * (m + n + 1) / 12))
    inside = k >= 1
    return Ratio(
        estimate=float(np.median(quotients)),
        low=float(quotients[k - 1]) if inside else None,
        high=float(quotients[m * n - k]) if inside else None,
    )


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Return the interval of a share, `right` of `count` (Wilson's score interval): within 0..1 at the ends too."""
    z = normal_quantile((1 + CONFIDENCE) / 2)
    share, square = right / count, z * z / count
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def drift(samples: Sequence[float]) -> float:
    """Return how far the medians of the first and second half lie apart, over the smaller: how much a run wandered."""
    if len(samples) < 4:
        return 0.0
    half = len(samples) // 2
    first, second = float(np.median(samples[:half])), float(np.median(samples[half:]))
    return abs(second - first) / min(first, second) if min(first, second) > 0 else 0.0


def normal_quantile(probability: float) -> float:
    """Return the standard normal distribution's quantile."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)
