"""What the simulator says of requests that are measured too: it is given times of parts, and never a goodput."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.runtime.bench.load.arrivals import Item, Kind, at_rate
from latentrt.runtime.bench.load.figures import limits_of
from latentrt.runtime.bench.load.search import Found, find_goodput
from latentrt.runtime.bench.load.serving import Options, request_of
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

ROUNDS = 5  # of which the median counts
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


def measure_times(pipe: Pipeline, items: Sequence[Item], served: Served, known: Times | None = None) -> Times:
    """Time a bundle's parts each by itself, and how much what is done beside the loop delays it.

    items: what will be asked for
    known: what was measured before, of which the batcher's share is taken, which takes longest
    Raises RequestError where they differ in more than their steps.
    """
    if len({kind[1:] for kind in served.stages}) > 1:
        raise RequestError("simulate: it takes requests that differ in steps alone; give them one size and guidance")
    most, first = served.options.most, items[0]
    counts = sorted({1, 2, most, *(2**power for power in range(most.bit_length()))} & set(range(1, most + 1)))
    numbers = itertools.count(NUMBERS)  # a prompt that was read before would be remembered
    _draws(pipe, first, most, numbers, rounds=1)  # what is done for the first time takes longer
    # In turn, so that what disturbs the machine for a second disturbs no count's median.
    rounds = [{count: _draws(pipe, first, count, numbers, rounds=1) for count in counts} for _ in range(ROUNDS)]
    drawn = {count: [draw for one in rounds for draw in one[count]] for count in counts}
    rows = rows_of(first.kind)
    alone = Times(
        stage_s=tuple((rows * count, _median(drawn[count], _stage)) for count in counts),
        encode_s=_points(drawn, lambda result, _: result.seconds["tokenize"] + result.seconds["encode"]),
        decode_s=_points(drawn, lambda result, _: result.seconds["decode"]),
        call_s=_points(drawn, lambda result, wall: max(0.0, wall - _parts(result))),
        between_s=0.0,
        shared=0.0,
    )
    if known is not None:
        return msgspec.structs.replace(alone, between_s=known.between_s, shared=known.shared)
    return _time_batcher(pipe, items, served, alone, numbers)


def typical(measured: Sequence[Times]) -> Times | None:
    """Return the medians of several measurements of the same parts; None of none."""
    if not measured:
        return None

    def middle(name: str) -> Points:
        points = [getattr(one, name) for one in measured]
        return tuple(
            (each[0][0], float(np.median([seconds for _, seconds in each]))) for each in zip(*points, strict=True)
        )

    shared = [one.shared for one in measured if one.shared is not None]
    return Times(
        stage_s=middle("stage_s"),
        encode_s=middle("encode_s"),
        decode_s=middle("decode_s"),
        call_s=middle("call_s"),
        between_s=float(np.median([one.between_s for one in measured])),
        shared=float(np.median(shared)) if shared else None,
    )


Drawn = Sequence[tuple["Result", float]]
Part = Callable[["Result", float], float]


def _draws(pipe: Pipeline, item: Item, count: int, numbers: Iterator[int], *, rounds: int) -> Drawn:
    """Draw a batch some times; return results with the seconds of each call."""
    one, found = msgspec.structs.replace(item, steps=STEPS), []
    for _ in range(rounds):
        request = request_of([one] * count, [next(numbers) for _ in range(count)])
        start = time.perf_counter()
        result = pipe.draw(request)
        found.append((result, time.perf_counter() - start))
    return found


def _median(drawn: Drawn, part: Part) -> float:
    return float(np.median([part(result, wall) for result, wall in drawn]))


def _points(drawn: Mapping[int, Drawn], part: Part) -> Points:
    return tuple((count, _median(draws, part)) for count, draws in drawn.items())


def _stage(result: Result, _: float) -> float:
    return float(np.mean(result.step_seconds))


def _parts(result: Result) -> float:
    return sum(result.seconds[name] for name in ("tokenize", "encode", "decode")) + sum(result.step_seconds)


def _time_batcher(pipe: Pipeline, items: Sequence[Item], served: Served, times: Times, numbers: Iterator[int]) -> Times:
    """Find what a batcher takes between stages, and what is shared, by bursts and batches of the pipeline in turn.

    Where stages, encodings and decodings take turns at the cores, what is shared is known.
    """
    from latentrt.runtime.batching.batcher import Batcher, BatcherOptions
    from latentrt.runtime.batching.observer import Event, StageDone

    options, stages = served.options, list[Stage]()
    alone = list[tuple["Result", float]]()
    burst = items[: BURST * options.most]

    def observe(event: Event) -> None:
        if isinstance(event, StageDone):
            stages.append(Stage(time.perf_counter(), event.pictures, event.seconds))

    for round_ in range(BURSTS + 1):
        if round_ == 1:
            stages.clear()
        alone += _draws(pipe, items[0], options.most, numbers, rounds=1)
        with Batcher(pipe, BatcherOptions(slots=options.most, waiting=len(burst)), observer=observe) as batcher:
            asked = [batcher.submit(request_of([item], [next(numbers)])) for item in burst]
            for (future,) in asked:
                future.result()
    if pipe.loaded.opened.fills_cores:
        between_s = between_stages(stages, below=times.encode_s[0][1])
        return msgspec.structs.replace(times, between_s=between_s, shared=None)
    beside_s = BURSTS * len(burst) * (times.encode_s[0][1] + times.decode_s[0][1])
    shared = shared_part(stages, _median(alone[1:], _stage), options.most, beside_s)
    return msgspec.structs.replace(times, between_s=between_stages(stages), shared=shared)


class Stage(NamedTuple):
    """A stage of a batcher: when it was done, of how many pictures, and the seconds that it took."""

    at: float
    pictures: int
    seconds: float


def between_stages(stages: Sequence[Stage], *, below: float = math.inf) -> float:
    """Return the median seconds from the end of a stage to the beginning of the next.

    below: longer ones are left out, if there are others: something else had its turn at the cores then
    """
    gaps = [later.at - later.seconds - one.at for one, later in itertools.pairwise(stages)]
    return max(0.0, float(np.median([gap for gap in gaps if gap < below] or gaps)))


def shared_part(stages: Sequence[Stage], alone_s: float, most: int, beside_s: float) -> float:
    """Return by how much of what is done beside it a loop is delayed.

    Stages of `most` pictures took longer than `alone_s`, which one takes with nothing beside it; so did all others.
    beside_s: what was done beside all stages, in seconds of each by itself
    """
    full = float(np.mean([stage.seconds for stage in stages if stage.pictures == most] or [alone_s]))
    delayed = max(0.0, 1 - alone_s / full) * sum(stage.seconds for stage in stages)
    return min(MOST_SHARED, delayed / beside_s)
