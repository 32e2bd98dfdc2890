"""Goodput: the highest rate at which enough requests are in time. Pure functions of what was tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

ENOUGH = 0.95  # of all requests in time
STEP, CLOSE = 1.3, 1.12  # from rate to rate until one passes and one fails; how close those two come to each other
NEAR = CLOSE  # from rate to rate where it is known about where to begin
MOST_TRIES = 9

Bound = Literal["found", "at least", "at most"]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A goodput. bound: `found`, or on which side of `rate` it lies where no tried rate failed, or none passed

    tried: (rate, share in time), in the order of trying
    """

    rate: float
    bound: Bound
    tried: tuple[tuple[float, float], ...]


def find_goodput(
    share: Callable[[float], float],
    start: float,
    *,
    most: int = MOST_TRIES,
    step: float = STEP,
    go_on: Callable[[], bool] = lambda: True,
) -> Found:
    """Find the rate at which the share of requests in time falls below ENOUGH.

    From `start` the rate grows or shrinks by `step` until it is passed, then the distance is halved until it is small;
    between the two that are left, the share is taken as a line. go_on: asked before each rate but the first, e.g. for
    time
    """
    tried: dict[float, float] = {}
    rate = start
    while len(tried) < most and (not tried or go_on()):
        tried[rate] = share(rate)
        passed, failed = _around(tried)
        if passed is not None and failed is not None:
            if failed / passed <= CLOSE:
                break
            rate = (passed * failed) ** 0.5
        else:
            rate = rate * step if failed is None else rate / step
    passed, failed = _around(tried)
    in_order = tuple(tried.items())
    if passed is None:
        return Found(rate=min(tried), bound="at most", tried=in_order)
    if failed is None:
        return Found(rate=passed, bound="at least", tried=in_order)
    part = (tried[passed] - ENOUGH) / (tried[passed] - tried[failed])
    return Found(rate=passed + part * (failed - passed), bound="found", tried=in_order)


def _around(tried: dict[float, float]) -> tuple[float | None, float | None]:
    """Return the lowest rate that failed, and the highest below it that passed."""
    failed = min((rate for rate, share in tried.items() if share < ENOUGH), default=None)
    passing = (rate for rate, share in tried.items() if share >= ENOUGH and (failed is None or rate < failed))
    return max(passing, default=None), failed
