"""What many machines would do: their goodput behind each router, and what becomes the bottleneck. All simulated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from latentrt.engines.progress import Report as Progress
from latentrt.engines.spec import Document
from latentrt.runtime.bench.load.arrivals import Share, moments
from latentrt.runtime.bench.load.search import NEAR, STEP, find_goodput
from latentrt.runtime.bench.load.simulator.fleet import Router, Store, play, ready_times
from latentrt.runtime.bench.load.simulator.replica import Ask, Costs, SharedReplica, Times

STEADY = Router(name="two choices")  # what is looked at in every fleet
ROUTERS = (STEADY, Router(name="round robin"), Router(name="least loaded"), Router(name="least loaded", stale_s=0.25))
MANY = 2000  # machines, from which on the first router alone is looked at, and no bursts: each look takes minutes
LINES = (8, 64)  # places of a machine's line
TOO_MUCH = 1.3  # of the goodput
MOST_TRIES = 7
START = 0.7  # of what full batches could do: where the first search begins


class Assumed(Document, frozen=True, kw_only=True):
    """What is assumed of a fleet, beside the times of one machine.

    requests, seconds: of a run, whichever is more; those of the first tenth warm up and are not counted
    multiple, most, waiting: of each machine's batcher; bursty: cv of the gaps in the column of bursts
    decide_s: of one router over one request
    """

    requests: int = 20_000
    seconds: float = 12.0
    multiple: float = 5.0
    most: int = 8
    waiting: int = 64
    bursty: float = 4.0
    decide_s: float = 0.0002
    store: Store = Store(bytes=2.1e9, link_s=1.25e9, total_s=1e10, open_s=10.0)


class Row(Document, frozen=True, kw_only=True):
    """Machines, and what they would do.

    goodput: requests a second of all of them, by router; bursty: with bursts, behind two choices
    overloaded: share in time at TOO_MUCH times the goodput, by the places of each machine's line; not of large fleets
    routers: single ones that the goodput takes, at decide_s a request
    cold_s: until all are ready where all begin to load at once
    """

    machines: int
    requests: int
    goodput: Mapping[str, float]
    bursty: float | None
    overloaded: Mapping[str, float]
    routers: int
    cold_s: float


class Survey(Document, frozen=True, kw_only=True):
    """What a simulation of many machines says. No such fleet ran. source: of the times"""

    kind: Literal["latentrt fleet"]
    command: str
    source: str
    mix: tuple[Share, ...]
    times: Times
    assumed: Assumed
    rows: tuple[Row, ...]


def title(router: Router) -> str:
    """Return a router in words."""
    return router.name + (f", {1e3 * router.stale_s:.0f} ms late" if router.stale_s else "")


class Fleet:
    """Machines of one kind, and requests for them."""

    def __init__(self, machines: int, mix: Sequence[Share], times: Times, assumed: Assumed) -> None:
        self.machines, self._mix, self._assumed = machines, tuple(mix), assumed
        self._costs = Costs(times, assumed.most)
        stages = sum(part.steps * part.share for part in mix) / sum(part.share for part in mix)
        self.full = machines * assumed.most / (stages * self._costs.stage[2 * assumed.most])
        self.requests = int(max(assumed.requests, assumed.seconds * START * self.full))

    def in_time(self, rate: float, router: Router, *, cv: float = 1.0, waiting: int | None = None) -> float:
        """Return the share of requests that would be in time."""
        assumed = self._assumed
        unit, steps = moments(self._mix, self.requests, 0, cv=cv)
        at = unit / rate
        asks = [
            Ask(number=number, at=moment, stages=stages, rows=2)
            for number, (moment, stages) in enumerate(zip(at.tolist(), steps.tolist(), strict=True))
        ]
        room = assumed.waiting if waiting is None else waiting
        machines = [SharedReplica(self._costs, waiting=room, multiple=assumed.multiple) for _ in range(self.machines)]
        latency = play(asks, machines, router).delivered - at
        own = {part.steps: self._costs.together(part.steps, 2, 1) for part in self._mix}
        limits = assumed.multiple * np.array([own[stages] for stages in steps.tolist()])
        return float(np.mean((latency <= limits)[self.requests // 10 :]))

    def goodput(self, router: Router, start: float | None, *, cv: float = 1.0) -> float:
        """Return the rate of all machines together at which 95 % would be in time. start: None where none is near"""
        first, step = (START * self.full, STEP) if start is None else (start, NEAR)
        return find_goodput(lambda rate: self.in_time(rate, router, cv=cv), first, most=MOST_TRIES, step=step).rate


def survey(
    counts: Sequence[int], mix: Sequence[Share], times: Times, assumed: Assumed, progress: Progress
) -> Iterator[Row]:
    """Give a row for each number of machines."""
    each: dict[str, float] = {}  # goodput of one machine, from the fleet before: where the next search begins
    for machines in counts:
        what = f"{machines} machines"
        progress(what, 0, 1)
        fleet = Fleet(machines, mix, times, assumed)
        goodput = {}
        for router in ROUTERS if machines < MANY else (STEADY,):
            name = title(router)
            goodput[name] = fleet.goodput(router, machines * each[name] if name in each else None)
            each[name] = goodput[name] / machines
        best = goodput[title(STEADY)]
        yield Row(
            machines=machines,
            requests=fleet.requests,
            goodput=goodput,
            bursty=fleet.goodput(STEADY, best, cv=assumed.bursty) if machines < MANY else None,
            overloaded={
                str(places): fleet.in_time(TOO_MUCH * best, STEADY, waiting=places)
                for places in (LINES if machines < MANY else ())
            },
            routers=math.ceil(best * assumed.decide_s),
            cold_s=float(ready_times([0.0] * machines, assumed.store).max()),
        )
        progress(what, 1, 1)


def survey_table(found: Survey) -> str:
    """Return a Markdown table of a survey: goodput by machine."""
    names = [title(router) for router in ROUTERS]
    head = ["machines", *names, f"{names[0]}, bursts", *(f"in time, {places} places" for places in LINES)]
    lines = [[*head, "routers", "cold until"], ["---"] * (len(head) + 2)]
    for row in found.rows:
        rates = [*(row.goodput.get(name) for name in names), row.bursty]
        shares = [row.overloaded.get(str(places)) for places in LINES]
        cells = ["–" if rate is None else f"{rate / row.machines:.1f}" for rate in rates]
        cells += ["–" if share is None else f"{share:.0%}" for share in shares]
        lines.append([f"{row.machines:,}", *cells, str(row.routers), f"{row.cold_s:.0f} s"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
