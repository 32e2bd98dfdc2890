"""Many machines, simulated: a router before them, a bounded line at each, and a store that cold ones load from."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from latentrt.engines.spec import Document
from latentrt.runtime.bench.load.simulator.replica import NEVER, Ask, Replica

RouterName = Literal["round robin", "least loaded", "two choices"]


class Router(Document, frozen=True, kw_only=True):
    """How requests are given to machines.

    name: in turn; to the one with the fewest pictures; or to the better of two random ones
    decide_s: seconds that it takes over each request, one after the other
    stale_s: how old what it knows of the machines may be; 0: it knows all that it has given them
    """

    name: RouterName = "two choices"
    decide_s: float = 0.0
    stale_s: float = 0.0


class Store(Document, frozen=True, kw_only=True):
    """Where cold machines load engines from. link_s: bytes a second to one machine; total_s: to all together

    open_s: seconds from the last byte to the first picture
    """

    bytes: float
    link_s: float
    total_s: float
    open_s: float


def ready_times(starts: Sequence[float], store: Store) -> np.ndarray:
    """Return (n,) float64: when machines that begin to load at `starts` are ready; those that load share the store."""
    begin = np.sort(np.asarray(starts, dtype=np.float64))
    left = np.full(len(begin), store.bytes)
    ready = np.full(len(begin), np.nan)
    now, first, last = (begin[0] if len(begin) else 0.0), 0, 0  # those from first to before last are loading
    while first < len(begin):
        while last < len(begin) and begin[last] <= now:
            last += 1
        if last == first:
            now = begin[last]
            continue
        speed = min(store.link_s, store.total_s / (last - first))
        until = min(now + left[first] / speed, begin[last] if last < len(begin) else NEVER)
        left[first:last] -= (until - now) * speed
        now = until
        while first < last and left[first] <= store.bytes * 1e-9:  # who began first ends first: all are equally fast
            ready[first] = now + store.open_s
            first += 1
    return ready


class Played(msgspec.Struct, frozen=True, kw_only=True):
    """What became of requests: (n,) float64 each.

    delivered: the moments of delivery, inf for what was rejected; routed: when the router had decided
    """

    delivered: np.ndarray
    routed: np.ndarray


def play(
    asks: Sequence[Ask], replicas: Sequence[Replica], router: Router, *, seed: int = 0,
    available: np.ndarray | None = None,
) -> Played:  # fmt: skip
    """Play requests, in the order of their moments, until all are delivered.

    available: (replicas,) float64, in order: from when on each may be given requests; None for always
    """
    load = np.zeros(len(replicas), dtype=np.int32)
    place_of: dict[int, int] = {}
    delivered, routed = np.full(len(asks), NEVER), np.zeros(len(asks))
    events: list[tuple[float, int]] = []

    def run_until(moment: float) -> None:
        while events and events[0][0] <= moment:
            at, place = heapq.heappop(events)
            replica = replicas[place]
            if replica.next_at != at:
                continue  # an older plan
            for number, when in replica.happen():
                delivered[number] = when
                load[place_of.pop(number)] -= 1
            if replica.next_at < NEVER:
                heapq.heappush(events, (replica.next_at, place))

    choose = chooser(router, load, np.random.default_rng(seed))
    free = 0.0
    for ask in asks:
        free = moment = max(ask.at, free) + router.decide_s
        run_until(moment)
        count = len(replicas) if available is None else int(np.searchsorted(available, moment, side="right"))
        place = choose(moment, max(1, count))
        routed[ask.number] = moment
        replica, before = replicas[place], replicas[place].next_at
        if replica.arrive(ask, moment):
            load[place] += 1
            place_of[ask.number] = place
        if replica.next_at != before:
            heapq.heappush(events, (replica.next_at, place))
    run_until(NEVER)
    return Played(delivered=delivered, routed=routed)


def chooser(router: Router, load: np.ndarray, rng: np.random.Generator) -> Callable[[float, int], int]:
    """Return what chooses one of the first `count` machines at a moment. load: pictures at each, kept up to date"""
    known = load if router.stale_s == 0 else load.copy()
    told, turn = 0.0, -1
    noise = rng.random(len(load)) * 0.5  # of equals not always the first
    pairs: list[float] = []

    def choose(moment: float, count: int) -> int:
        nonlocal told, turn
        if router.stale_s and moment - told >= router.stale_s:
            known[:] = load
            told = moment
        if router.name == "round robin":
            turn = (turn + 1) % count
            return turn
        if router.name == "least loaded":
            return int(np.argmin(known[:count] + noise[:count]))
        if not pairs:
            pairs.extend(rng.random(4096).tolist())
        one, other = int(pairs.pop() * count), int(pairs.pop() * count)
        return one if known[one] <= known[other] else other

    return choose
