"""How long stages take, as measured, and what follows from it: who may share them without breaking a promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import msgspec
import numpy as np
from cachetools import LRUCache

NEWEST = 0.2  # the weight of the newest measurement in the kept average
PATIENCE_S = 60.0  # a promise that was broken so long ago comes first again; a picture without one is promised in that
BEGUN = 8  # pictures that have begun, for each that may share a stage: no more begin before one of them ends
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
    urgency: what puts pictures in order, the least first; begun: it shared a stage before
    alone: it may share none
    """

    stages: int
    rows: int
    after_s: float = 0.0
    due: float | None = None
    urgency: tuple[float, int] = (0.0, 0)
    begun: bool = False
    alone: bool = False


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


def sharing(
    drawn: Sequence[Owed], ready: Sequence[Owed], seconds: Callable[[int], float], *, now: float, most: int
) -> list[int]:
    """Return which pictures share the next stage, by their places in [*drawn, *ready], the first in order first.

    The most urgent first, each as long as it breaks no promise of those before it; the others wait, with the state
    that they have come to. A promise that cannot be kept any more comes after those that can be, until it has been
    broken for `PATIENCE_S`. One without a promise goes on once it has begun.
    ready: those that are prepared, or wait with their state
    seconds: of a stage with so many model rows; most: pictures in all
    """
    if not ready or any(picture.alone for picture in drawn):
        return list(range(len(drawn)))
    pictures = [*drawn, *ready]

    def key(place: int) -> tuple[int, tuple[float, int]]:
        return rank(pictures[place], seconds(pictures[place].rows), now=now, runs=place < len(drawn))

    order = sorted(range(len(pictures)), key=key)
    if pictures[order[0]].alone:
        return list(range(len(drawn))) or order[:1]
    order = order[: next((at for at, place in enumerate(order) if pictures[place].alone), len(order))]
    places = BEGUN * most - sum(picture.begun for picture in pictures)
    new = [place for place in order if not pictures[place].begun]
    left_out = set(new[max(0, places) :])
    order = [place for place in order if place not in left_out]
    return order[: may_share([pictures[place] for place in order], seconds, now=now, most=most)]


def rank(picture: Owed, stage_s: float, *, now: float, runs: bool = False) -> tuple[int, tuple[float, int]]:
    """Return what puts pictures in the order that `sharing` says. stage_s: of a stage of the picture alone"""
    if picture.due is None:
        return -1 - runs if picture.begun else 0, picture.urgency
    late = now + picture.stages * stage_s + picture.after_s > picture.due
    return int(late and now < picture.due + PATIENCE_S), picture.urgency


def may_share(pictures: Sequence[Owed], seconds: Callable[[int], float], *, now: float, most: int) -> int:
    """Return how many of some pictures, in their order, may share stages without breaking a promise of those before.

    A promise that is broken already binds nobody. The first always may.
    seconds: of a stage with so many model rows; most: pictures in all
    """
    before: list[float] = []
    for count in range(1, min(most, len(pictures)) + 1):
        after = delivery_times(pictures[:count], seconds, now=now)
        if not all(
            picture.due is None or early > picture.due or late <= picture.due
            for picture, early, late in zip(pictures, before, after, strict=False)
        ):
            return count - 1
        before = after
    return min(most, len(pictures))
