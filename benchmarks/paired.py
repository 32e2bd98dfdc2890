"""What two candidates' seconds say of each other where both were measured in every round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentrt.runtime.bench.samples import Ratio, median_interval


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the median over rounds of theirs/ours: both were measured in each round, so that drift cancels.

    ours, theirs: as many of each, round by round
    """
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    interval = median_interval(ratios)
    low, high = interval if interval else (None, None)
    return Ratio(estimate=float(np.median(ratios)), low=low, high=high)
