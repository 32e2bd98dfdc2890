"""What the simulator says of requests that are measured too: it is given times of parts, and never a goodput."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.runtime.bench.load.arrivals import Item, Kind, at_rate
from latentrt.runtime.bench.load.drive import drive
from latentrt.runtime.bench.load.figures import limits_of
from latentrt.runtime.bench.load.search import Found, find_goodput
from latentrt.runtime.bench.load.serving import Options, continuous, request_of
from latentrt.runtime.bench.load.simulator.fleet import Router, play
from latentrt.runtime.bench.load.simulator.replica import (
    Ask,
    BatchReplica,
    Costs,
    Points,
    Replica,
    SharedReplica,
    Times,
)

if TYPE_CHECKING:
    from latentrt.runtime.pipeline import Pipeline
    from latentrt.runtime.result import Result

ROUNDS = 7  # of which the median counts
STEPS = 8  # of what is drawn to time the parts
NUMBERS = 2 * 10**6  # of requests that time: their prompts are no others'
BURSTS, BURST = 3, 3  # bursts that time what is done beside the loop, and requests in each, over the slots
MOST_SHARED = 4.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are served with. stages, alone: of a kind; multiple: of alone, within which they are in time"""

    stages: Mapping[Kind, int]
    alone: Mapping[Kind, float]
    options: Options


def asks_of(items: Sequence[Item], served: Served) -> list[Ask]:
    """Return what items are to the simulator."""
    return [
        Ask(number=number, at=item.at_s, stages=served.stages[item.kind], rows=rows_of(item.kind), like=item.kind)
        for number, item in enumerate(items)
    ]


def rows_of(kind: Kind) -> int:
    """Return the model rows of a picture in a stage: two where it is guided."""
    return 2 if kind.guidance > 1 else 1


def replica_of(name: str, costs: Costs, options: Options) -> Replica:
    """Return a machine that serves in one way."""
    if name == "continuous":
        return SharedReplica(costs, waiting=options.waiting, multiple=options.slo)
    return BatchReplica(costs, waiting=options.waiting, together=options.most if name == "static" else 1)


def predict(name: str, items: Sequence[Item], served: Served, times: Times, *, start: float) -> Found:
    """Return the goodput that one machine has with these requests, as simulated. start: where the search begins"""
    costs = Costs(times, served.options.most)
    own = np.array([served.alone[item.kind] for item in items])

    def share(rate: float) -> float:
        asked = at_rate(items, rate)
        played = play(asks_of(asked, served), [replica_of(name, costs, served.options)], Router())
        latency = played.delivered - np.array([item.at_s for item in asked])
        return float(np.mean(latency <= limits_of(asked, own, served.options.slo)))

    return find_goodput(share, start, most=20)


def measure_times(pipe: Pipeline, items: Sequence[Item], served: Served) -> Times:
    """Time a bundle's parts each by itself, and how much what is done beside the loop delays it.

    items: what will be asked for. Raises RequestError where they differ in more than their steps.
    """
    if len({kind[1:] for kind in served.stages}) > 1:
        raise RequestError("simulate: it takes requests that differ in steps alone; give them one size and guidance")
    most, first = served.options.most, items[0]
    counts = sorted({1, 2, most, *(2**power for power in range(most.bit_length()))} & set(range(1, most + 1)))
    drawn = {count: _draws(pipe, first, count) for count in counts}
    rows = rows_of(first.kind)
    alone = Times(
        stage_s=tuple((rows * count, _median(drawn[count], _stage)) for count in counts),
        encode_s=_points(drawn, lambda result, _: result.seconds["tokenize"] + result.seconds["encode"]),
        decode_s=_points(drawn, lambda result, _: result.seconds["decode"]),
        call_s=_points(drawn, lambda result, wall: max(0.0, wall - _parts(result))),
        between_s=0.0,
        shared=0.0,
    )
    return _time_batcher(pipe, items, served, alone)


Drawn = Sequence[tuple["Result", float]]
Part = Callable[["Result", float], float]


def _draws(pipe: Pipeline, item: Item, count: int) -> Drawn:
    """Draw a batch some times; return results with the seconds of each call. The first is not counted."""
    one, found = msgspec.structs.replace(item, steps=STEPS), []
    for round_ in range(ROUNDS + 1):
        request = request_of([one] * count, [NUMBERS + round_ * count + place for place in range(count)])
        start = time.perf_counter()
        result = pipe.draw(request)
        found.append((result, time.perf_counter() - start))
    return found[1:]


def _median(drawn: Drawn, part: Part) -> float:
    return float(np.median([part(result, wall) for result, wall in drawn]))


def _points(drawn: Mapping[int, Drawn], part: Part) -> Points:
    return tuple((count, _median(draws, part)) for count, draws in drawn.items())


def _stage(result: Result, _: float) -> float:
    return float(np.mean(result.step_seconds))


def _parts(result: Result) -> float:
    return sum(result.seconds[name] for name in ("tokenize", "encode", "decode")) + sum(result.step_seconds)


def _time_batcher(pipe: Pipeline, items: Sequence[Item], served: Served, times: Times) -> Times:
    """Find what a batcher takes between stages, by one picture alone, and what is shared, by bursts."""
    options = msgspec.structs.replace(served.options, waiting=BURST * served.options.most, slo=1e6)
    burst = [msgspec.structs.replace(item, at_s=0.0) for item in items[: options.waiting]]
    longest = max(served.stages, key=lambda kind: served.stages[kind])
    one = next(item for item in items if item.kind == longest)
    with continuous(pipe, options) as submit:
        bursts = []
        for _ in range(BURSTS + 1):
            outcomes = drive(lambda n, item: submit(NUMBERS + n, item), burst, most_s=600, skips_idle=False)
            bursts.append(max(outcome.latency_s or 0.0 for outcome in outcomes))
        alone = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            submit(NUMBERS + number, one).result()
            alone.append(time.perf_counter() - start)
    costs = Costs(times, 1)
    stages = served.stages[longest]
    bare = costs.together(stages, rows_of(longest), 1) - costs.call[1]
    between = max(0.0, float(np.median(alone)) - bare) / stages
    fixed = msgspec.structs.replace(times, between_s=between)
    return fit_shared(fixed, burst, msgspec.structs.replace(served, options=options), float(np.median(bursts[1:])))


def fit_shared(times: Times, burst: Sequence[Item], served: Served, seconds: float) -> Times:
    """Find how much the loop is delayed by what is done beside it: with that, a burst takes what it took."""
    low, high = 0.0, MOST_SHARED
    for _ in range(20):
        middle = (low + high) / 2
        tried = msgspec.structs.replace(times, shared=middle)
        replica = replica_of("continuous", Costs(tried, served.options.most), served.options)
        played = play(asks_of(burst, served), [replica], Router())
        low, high = (middle, high) if played.delivered.max() < seconds else (low, middle)
    return msgspec.structs.replace(times, shared=(low + high) / 2)
