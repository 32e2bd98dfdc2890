"""Measuring a load: each seed's requests are served in every way, at rates that find its goodput."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.progress import Report as Progress
from latentrt.runtime.bench.load.arrivals import GUIDANCE, Item, Kind, Share, at_rate, random_items, rate_of
from latentrt.runtime.bench.load.drive import Submit, drive
from latentrt.runtime.bench.load.figures import MULTIPLES, Run, kind_names, run_of
from latentrt.runtime.bench.load.remote import server
from latentrt.runtime.bench.load.result import SCHEMA_VERSION, Goodput, Method, Report, Serving, Spread
from latentrt.runtime.bench.load.search import NEAR, STEP, find_goodput
from latentrt.runtime.bench.load.serving import SERVINGS, Options, request_of
from latentrt.runtime.bench.load.simulator.predict import Served, measure_times, predict, typical
from latentrt.runtime.bench.load.simulator.replica import Times
from latentrt.runtime.bench.machine import Watch, describe_machine, now

if TYPE_CHECKING:
    from latentrt.runtime.pipeline import Pipeline

ALONE_DRAWS = 7  # of each kind, of which the median counts, after one that does not
GUESS = 0.6  # of what one at a time could do: where the first search begins
RUN_S = 120.0  # beside its own length: what is not answered by then is not in time
WARM = 10**6  # numbers of requests that warm up begin here: their prompts are no others'

Way = Callable[[], AbstractContextManager[Submit]]
"""opens one way of serving"""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure.

    simulate: whether to predict the goodput too
    rates: a second, to measure at; empty to look for the goodput, or of a trace for its own
    seconds: in all; no seed is begun that would take longer, and no rate is tried after
    """

    mix: tuple[Share, ...] = (Share(steps=20, share=1.0),)
    trace: tuple[Item, ...] = ()
    trace_name: str | None = None
    cv: float = 1.0
    requests: int = 100
    seeds: int = 5
    first_seed: int = 0
    multiple: float = 5.0
    rates: tuple[float, ...] = ()
    servings: tuple[str, ...] = tuple(SERVINGS)
    most: int = 8
    waiting: int = 64
    size: tuple[int, int] | None = None
    guidance: float = GUIDANCE
    sampler: str | None = None
    seconds: float = 540.0
    simulate: bool = False

    def items(self, seed: int) -> tuple[Item, ...]:
        """Return a seed's requests: those of the trace, or of the mix, one a second in the mean."""
        if self.trace:
            return self.trace
        return random_items(
            self.mix, self.requests, seed, cv=self.cv, size=self.size, guidance=self.guidance, sampler=self.sampler
        )

    def served(self, target: Target) -> Served:
        """Return what the simulator is told of how requests are served."""
        options = Options(most=self.most, waiting=self.waiting, slo=self.multiple)
        return Served(stages=target.stages, alone=target.alone, options=options)

    @property
    def multiples(self) -> tuple[float, ...]:
        """Return the multiples of a request's own time that are counted."""
        return tuple(sorted({*MULTIPLES, self.multiple}))


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured.

    ways: of serving, by name; alone: seconds of a request by itself, by kind
    skips_idle: whether time in which nothing is drawn is left out; nobody else may use what is measured then
    stages: of each kind
    time_parts: times a bundle's parts with some requests, given what it found before, where the goodput is to be
        predicted; it is called before each search, since a machine is not as quick at one moment as at another
    """

    name: str
    ways: Mapping[str, Way]
    alone: Mapping[Kind, float]
    skips_idle: bool
    stages: Mapping[Kind, int] = {}
    time_parts: Callable[[Sequence[Item], Times | None], Times] | None = None


@contextmanager
def bundle_target(pipe: Pipeline, asked: Asked) -> Iterator[Target]:
    """Measure a bundle in this process, in the ways that are asked for."""
    options = Options(most=asked.most, waiting=asked.waiting, slo=asked.multiple)
    stages = dict[Kind, int]()

    def draw(number: int, item: Item) -> None:
        stages[item.kind] = len(pipe.draw(request_of([item], [number])).step_seconds)

    alone = alone_s(draw, one_of_each(asked))
    served = Served(stages=stages, alone=alone, options=options)
    yield Target(
        name=pipe.bundle.root.name,
        ways={name: partial(SERVINGS[name], pipe, options) for name in asked.servings},
        alone=alone,
        skips_idle=True,
        stages=stages,
        time_parts=(lambda items, known: measure_times(pipe, items, served, known)) if asked.simulate else None,
    )


@contextmanager
def server_target(url: str, key: str | None, asked: Asked) -> Iterator[Target]:
    """Measure a server, which others may ask too. Raises RequestError where none answers, or nothing is drawn."""
    with server(url, key) as submit:
        alone = alone_s(lambda number, item: submit(number, item).result(), one_of_each(asked))
    yield Target(name=url, ways={"server": partial(server, url, key)}, alone=alone, skips_idle=False)


def one_of_each(asked: Asked) -> dict[Kind, Item]:
    """Return a request of each kind that will be asked for."""
    return {item.kind: item for item in asked.items(asked.first_seed)}


def alone_s(draw: Callable[[int, Item], object], items: Mapping[Kind, Item]) -> dict[Kind, float]:
    """Return the median seconds of a request of each kind that is drawn by itself. draw: one, of a number

    In turn, so that what is slow at first, or for a second, is no kind's alone.
    """
    rounds: list[dict[Kind, float]] = []
    for number in range(WARM, WARM + ALONE_DRAWS + 1):
        rounds.append({})
        for kind, item in items.items():
            start = time.perf_counter()
            draw(number, item)
            rounds[-1][kind] = time.perf_counter() - start
    return {kind: float(np.median([one[kind] for one in rounds[1:]])) for kind in items}


def run_load(asked: Asked, target: Target, *, command: str, progress: Progress) -> Report:
    """Measure, seed by seed, the ways in random order. Raises RequestError where nothing is answered."""
    watch, start, longest = Watch(), time.monotonic(), 0.0
    found: dict[str, list[Goodput]] = {name: [] for name in target.ways}
    times: dict[str, list[Times]] = {name: [] for name in target.ways}
    order = np.random.default_rng(asked.first_seed)
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        began = time.monotonic()
        if longest and began - start + longest > asked.seconds:
            break
        for name in order.permutation(list(target.ways)):
            progress(f"seed {seed}, {name}", 0, 1)
            parts = None
            if target.time_parts is not None:
                first = next((one for each in times.values() for one in each), None)
                parts = target.time_parts(asked.items(seed), first)
                times[name].append(parts)
            found[name].append(
                measure_seed(asked, target, str(name), seed, found[name], parts, end=start + asked.seconds)
            )
            progress(f"seed {seed}, {name}", 1, 1)
        longest = max(longest, time.monotonic() - began)
    names = kind_names(list(target.alone))
    return Report(
        kind="latentrt bench-serve",
        schema_version=SCHEMA_VERSION,
        created=now(),
        command=command,
        machine=describe_machine(),
        conditions=watch.conditions(),
        method=_method(asked, target),
        alone_s={name: target.alone[kind] for kind, name in names.items()},
        times=typical([one for each in times.values() for one in each]),
        servings=tuple(
            _predicted(serving_of(name, seeds, found.get("continuous", [])), asked, target, times[name])
            for name, seeds in found.items()
        ),
    )


def _predicted(serving: Serving, asked: Asked, target: Target, times: Sequence[Times]) -> Serving:
    """Return what one way of serving gave with what the simulator says of the same requests. times: by seed"""
    if not times or serving.goodput is None:
        return serving
    rates, parts = [], []
    for one, timed in zip(serving.seeds, times, strict=True):
        assert one.rate is not None
        items = asked.items(one.seed)
        rates.append(predict(serving.name, items, asked.served(target), timed, start=one.rate).rate)
        if one.bound == "found":
            parts.append(rates[-1] / one.rate)
    return msgspec.structs.replace(serving, predicted=tuple(rates), prediction=spread(parts) if parts else None)


def _method(asked: Asked, target: Target) -> Method:
    return Method(
        target=target.name,
        mix=() if asked.trace else asked.mix,
        trace=asked.trace_name,
        cv=asked.cv,
        requests=len(asked.trace) or asked.requests,
        first_seed=asked.first_seed,
        multiple=asked.multiple,
        most=asked.most,
        waiting=asked.waiting,
        skips_idle=target.skips_idle,
    )


def measure_seed(
    asked: Asked,
    target: Target,
    name: str,
    seed: int,
    before: Sequence[Goodput],
    times: Times | None = None,
    *,
    end: float,
) -> Goodput:
    """Serve one seed's requests in one way, at each rate or, until `end`, at those that find its goodput.

    before: what was found with other seeds; times: of the parts, by which the search begins near where it will end
    """
    items = asked.items(seed)
    runs: list[Run] = []
    with target.ways[name]() as submit:
        _warm_up(submit, items[: 2 * asked.most])

        def share(rate: float) -> float:
            asked_for = at_rate(items, rate)
            most_s = asked_for[-1].at_s + RUN_S
            outcomes = drive(submit, asked_for, most_s=most_s, skips_idle=target.skips_idle)
            runs.append(run_of(rate, asked_for, outcomes, target.alone, asked.multiples))
            return runs[-1].share(asked.multiple)

        rates = asked.rates or ((rate_of(items),) if asked.trace else ())
        if rates:
            for rate in rates:
                share(rate)
            return Goodput(seed=seed, rate=None, bound=None, runs=tuple(runs))
        start, step = _start(asked, target, name, items, before, times)
        goodput = find_goodput(share, start, step=step, go_on=lambda: time.monotonic() < end)
    return Goodput(seed=seed, rate=goodput.rate, bound=goodput.bound, runs=tuple(runs))


def _start(
    asked: Asked, target: Target, name: str, items: Sequence[Item], before: Sequence[Goodput], times: Times | None
) -> tuple[float, float]:
    """Return the rate to begin with, and the step to the next: near what is predicted or was found, or a guess."""
    guess = GUESS / float(np.mean([target.alone[item.kind] for item in items]))
    if times is not None:
        return predict(name, items, asked.served(target), times, start=guess).rate, NEAR
    known = [one.rate for one in before if one.rate is not None]
    return (float(np.median(known)) if known else guess), STEP


def _warm_up(submit: Submit, items: Sequence[Item]) -> None:
    """Ask for some requests at once, and wait. Raises RequestError if none is answered."""
    at_once = [msgspec.structs.replace(item, at_s=0.0) for item in items]
    errors: list[BaseException] = []

    def numbered(number: int, item: Item) -> object:
        return submit(WARM + number, item)

    outcomes = drive(numbered, at_once, most_s=RUN_S, skips_idle=False, error=errors.append)  # type: ignore[arg-type]
    if not any(outcome.status == "answered" for outcome in outcomes):
        raise errors[0] if errors else RequestError(f"none of {len(items)} requests was answered within {RUN_S:g} s")


def serving_of(name: str, seeds: Sequence[Goodput], continuous: Sequence[Goodput]) -> Serving:
    """Return what one way of serving gave, and how it compares with sharing stages, where both were found."""
    rates = [one.rate for one in seeds if one.rate is not None]
    pairs = [] if name == "continuous" else list(zip(continuous, seeds, strict=False))
    better = [
        theirs.rate / own.rate
        for theirs, own in pairs
        if theirs.bound == own.bound == "found" and own.rate and theirs.rate
    ]
    return Serving(
        name=name,
        seeds=tuple(seeds),
        goodput=spread(rates) if rates else None,
        better=spread(better) if better else None,
    )


def spread(values: Sequence[float]) -> Spread:
    """Return the median of one value a seed, between the lowest and the highest."""
    return Spread(
        median=float(np.median(values)),
        lowest=min(values),
        highest=max(values),
        confidence=1 - 2.0 ** (1 - len(values)),
    )
