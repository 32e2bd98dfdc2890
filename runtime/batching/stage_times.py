"""How long stages take, as measured, and what follows from it: who may share them without breaking a promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import msgspec
import numpy as np
from cachetools import LRUCache

NEWEST = 0.2  # the weight of the newest measurement in the kept average
KEPT_KINDS = 256  # of stages: sizes may be anything


class StageTimes:
    """Seconds of a stage by its kind and its number of model rows: a moving average of what was measured.

    Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: LRUCache[Hashable, dict[int, float]] = LRUCache(KEPT_KINDS)

    def note(self, kind: Hashable, rows: int, seconds: float) -> None:
        """Take a measurement in."""
        with self._lock:
            known = self._seconds.setdefault(kind, {})
            before = known.get(rows, seconds)
            known[rows] = before + NEWEST * (seconds - before)

    def estimate(self, kind: Hashable, rows: int) -> float | None:
        """Return the seconds of a stage, None before any was measured.

        What was not measured lies on the line through what was; with one measurement, it grows with the rows.
        """
        with self._lock:
            known = dict(self._seconds.get(kind, {}))
        if not known or rows in known:
            return known.get(rows)
        if len(known) == 1:
            ((measured, seconds),) = known.items()
            return seconds * max(1.0, rows / measured)
        slope, offset = np.polyfit(list(known), list(known.values()), 1)
        return max(float(offset + slope * rows), min(known.values()))


class Owed(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to do for a picture.

    stages: that are left, 1 at the least; rows: model rows in each; after_s: seconds from the last stage to delivery
    due: the moment that delivery was promised for, on the clock of `now`; None for no promise
    """

    stages: int
    rows: int
    after_s: float = 0.0
    due: float | None = None


def delivery_times(pictures: Sequence[Owed], seconds: Callable[[int], float], *, now: float) -> list[float]:
    """Return when each picture is delivered where all share their stages from now on and nobody joins.

    seconds: of a stage with so many model rows
    """
    order = sorted(range(len(pictures)), key=lambda number: pictures[number].stages)
    rows, done, at = sum(picture.rows for picture in pictures), 0, now
    times = [0.0] * len(pictures)
    for number in order:
        picture = pictures[number]
        at += (picture.stages - done) * seconds(rows) if picture.stages > done else 0.0
        done, rows = picture.stages, rows - picture.rows
        times[number] = at + picture.after_s
    return times


def may_join(
    running: Sequence[Owed], waiting: Sequence[Owed], seconds: Callable[[int], float], *, now: float, most: int
) -> int:
    """Return how many of those that wait, in their order, may join those that run without breaking a promise.

    A promise that is broken already binds nobody. Where nothing runs one picture always joins.
    seconds: of a stage with so many model rows; most: pictures in all
    """
    joined = 0
    while joined < len(waiting) and len(running) + joined < most:
        without = [*running, *waiting[:joined]]
        if without and not _keeps_promises(without, [*without, waiting[joined]], seconds, now=now):
            break
        joined += 1
    return joined


def _keeps_promises(
    before: Sequence[Owed], after: Sequence[Owed], seconds: Callable[[int], float], *, now: float
) -> bool:
    """Tell whether every picture that would be delivered in time still is with more pictures. after: before's first"""
    earlier, later = (delivery_times(pictures, seconds, now=now) for pictures in (before, after))
    return all(
        picture.due is None or early > picture.due or late <= picture.due
        for picture, early, late in zip(before, earlier, later, strict=False)
    )
