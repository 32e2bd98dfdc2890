"""A load's result as text for a terminal, and as a table for a page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from latentrt.runtime.bench.load.figures import Quantiles, Run
from latentrt.runtime.bench.load.result import Goodput, Method, Report, Serving, Spread

TITLES = {"continuous": "stages shared", "one": "one at a time", "static": "static batches", "server": "the server"}


def report_text(report: Report) -> str:
    """Return a result as text."""
    return "\n".join(_lines(report)) + "\n"


def markdown(report: Report) -> str:
    """Return a result as a Markdown table: a row for each way of serving, medians over seeds with their range."""
    head = [
        "requests",
        "served",
        "goodput",
        "stages shared over it",
        "simulated",
        "p95, times alone",
        "first partial",
    ]
    rows = [[mix_words(report.method), *_cells(serving)] for serving in report.servings if serving.goodput is not None]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def mix_words(method: Method) -> str:
    """Return what was asked for in words."""
    if method.trace is not None:
        return method.trace
    whole = sum(part.share for part in method.mix)
    return ", ".join(f"{part.share / whole:.0%} of {part.steps} steps" for part in method.mix)


def _cells(serving: Serving) -> list[str]:
    runs = [best(one).overall for one in serving.seeds]
    slowdown = [one.slowdown.p95 for one in runs if one.slowdown is not None]
    first = [one.first_s.p50 for one in runs if one.first_s is not None]
    return [
        TITLES.get(serving.name, serving.name),
        "–" if serving.goodput is None else _spread(serving.goodput, "/s"),
        "–" if serving.better is None else _spread(serving.better, " times"),
        "–" if serving.prediction is None else _spread(serving.prediction, " of it"),
        f"{np.median(slowdown):.2f}" if slowdown else "–",
        _ms(float(np.median(first))) if first else "–",
    ]


def _lines(report: Report) -> Iterator[str]:
    method = report.method
    seeds = max(len(serving.seeds) for serving in report.servings)
    yield f"{method.target}: {mix_words(method)}; {method.requests} requests, {seeds} seeds, gaps with cv {method.cv:g}"
    yield f"{report.machine.processor}, {report.machine.cores} cores; {report.created}"
    yield "alone: " + ", ".join(f"{name} {_ms(seconds)}" for name, seconds in report.alone_s.items())
    yield ""
    for serving in report.servings:
        yield from _serving(serving, method.multiple)


def _serving(serving: Serving, multiple: float) -> Iterator[str]:
    title = TITLES.get(serving.name, serving.name)
    if serving.goodput is None:
        yield f"{title}:"
        for number in range(len(serving.seeds[0].runs)):
            yield from _runs([one.runs[number] for one in serving.seeds])
        return
    yield f"{title}: goodput at {multiple:g} times alone {_spread(serving.goodput, '/s')}{_bounds(serving)}"
    if serving.better is not None:
        yield f"  sharing stages reaches {_spread(serving.better, ' times')} that"
    if serving.prediction is not None:
        yield f"  the simulator predicts {_spread(serving.prediction, ' times')} what was measured"
    yield from _runs([best(one) for one in serving.seeds])


def _bounds(serving: Serving) -> str:
    open_ended = sum(one.bound != "found" for one in serving.seeds)
    return f" ({open_ended} of {len(serving.seeds)} seeds only bounded)" if open_ended else ""


def best(goodput: Goodput) -> Run:
    """Return the run at the highest rate that kept to its goodput, or that came nearest to it."""
    limit = goodput.rate or 0.0
    below = [run for run in goodput.runs if run.rate <= limit * (1 + 1e-9)]
    return max(below, key=lambda run: run.rate) if below else min(goodput.runs, key=lambda run: run.rate)


def _runs(runs: list[Run]) -> Iterator[str]:
    """Give what runs of several seeds say: the median over them."""
    rate = float(np.median([run.rate for run in runs]))
    attained = [
        f"{one.multiple:g}: {np.median([run.share(one.multiple) for run in runs]):.1%}"
        for one in runs[0].overall.attained
    ]
    yield f"  at {rate:.2f}/s, in time at k = {', '.join(attained)}"
    overall = [run.overall for run in runs]
    yield f"    all: {_quantiles([one.latency_s for one in overall], [one.slowdown for one in overall])}"
    for name in runs[0].kinds:
        parts = [run.kinds[name] for run in runs]
        yield f"    {name}: {_quantiles([one.latency_s for one in parts], [one.slowdown for one in parts])}"
    firsts = [one.first_s.p50 for one in overall if one.first_s is not None]
    lost = sum(one.rejected + one.failed + one.unanswered for one in overall)
    first = f"first partial picture after {_ms(float(np.median(firsts)))} (p50); " if firsts else ""
    yield f"    {first}{lost} of {sum(one.requests for one in overall)} not answered"


def _quantiles(latency: list[Quantiles | None], slowdown: list[Quantiles | None]) -> str:
    def median(some: list[Quantiles | None], name: str) -> float:
        values = [getattr(one, name) for one in some if one is not None]
        return float(np.median(values)) if values else float("nan")

    times = " / ".join(_ms(median(latency, name)) for name in ("p50", "p95", "p99"))
    over = " / ".join(f"{median(slowdown, name):.2f}" for name in ("p50", "p95", "p99"))
    return f"p50 / p95 / p99 {times}, {over} times alone"


def _spread(spread: Spread, unit: str) -> str:
    return f"{spread.median:.2f}{unit} ({spread.lowest:.2f} to {spread.highest:.2f})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"
