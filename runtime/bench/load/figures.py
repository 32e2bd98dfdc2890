"""What the outcomes of a run say: who was in time, and how long it took, overall and by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from latentrt.engines.spec import Document
from latentrt.runtime.bench.load.arrivals import Item, Kind
from latentrt.runtime.bench.load.drive import Outcome
from latentrt.runtime.bench.samples import share_interval

MULTIPLES = (1.5, 2.0, 3.0, 5.0, 10.0)  # of a request's own time alone


class Quantiles(Document, frozen=True, kw_only=True):
    """Of those that were answered, interpolated between neighbours."""

    p50: float
    p95: float
    p99: float


class Attained(Document, frozen=True, kw_only=True):
    """The share of all requests that were answered within `multiple` times their own time alone, or their slo_ms.

    low, high: its 95 % interval (Wilson); what was rejected, failed or not answered was not in time
    """

    multiple: float
    share: float
    low: float
    high: float


class Figures(Document, frozen=True, kw_only=True):
    """What became of some requests.

    latency_s: from the moment of asking to the picture; slowdown: that, over the request's own time alone
    first_s: from the moment of asking to the first partial picture; null where none is known
    """

    requests: int
    rejected: int
    failed: int
    unanswered: int
    attained: tuple[Attained, ...]
    latency_s: Quantiles | None
    slowdown: Quantiles | None
    first_s: Quantiles | None


class Run(Document, frozen=True, kw_only=True):
    """Requests that were asked for at one rate. kinds: by name, where there are several"""

    rate: float
    overall: Figures
    kinds: Mapping[str, Figures]

    def share(self, multiple: float) -> float:
        """Return the share that was in time at a multiple."""
        return next(one.share for one in self.overall.attained if one.multiple == multiple)


def run_of(
    rate: float,
    items: Sequence[Item],
    outcomes: Sequence[Outcome],
    alone: Mapping[Kind, float],
    multiples: Sequence[float],
) -> Run:
    """Return what the outcomes of items say. alone: seconds of a request by itself"""
    names = kind_names([item.kind for item in items])
    parts = {
        name: [place for place, item in enumerate(items) if item.kind == kind]
        for kind, name in (names.items() if len(names) > 1 else ())
    }

    def figures(places: Sequence[int]) -> Figures:
        return figures_of([items[place] for place in places], [outcomes[place] for place in places], alone, multiples)

    return Run(
        rate=rate,
        overall=figures(range(len(items))),
        kinds={name: figures(places) for name, places in parts.items()},
    )


def figures_of(
    items: Sequence[Item], outcomes: Sequence[Outcome], alone: Mapping[Kind, float], multiples: Sequence[float]
) -> Figures:
    """Return what became of one or more requests."""
    status = Counter(outcome.status for outcome in outcomes)
    own = np.array([alone[item.kind] for item in items])
    latency = np.array([np.inf if outcome.latency_s is None else outcome.latency_s for outcome in outcomes])
    answered = np.isfinite(latency)
    return Figures(
        requests=len(items),
        rejected=status["rejected"],
        failed=status["failed"],
        unanswered=status["unanswered"],
        attained=tuple(_attained(items, latency, own, multiple) for multiple in multiples),
        latency_s=_quantiles(latency[answered]),
        slowdown=_quantiles(latency[answered] / own[answered]),
        first_s=_quantiles(np.array([one.first_s for one in outcomes if one.first_s is not None])),
    )


def limits_of(items: Sequence[Item], own: np.ndarray, multiple: float) -> np.ndarray:
    """Return (n,) float64 seconds within which each request must be answered. own: each one's seconds alone"""
    asked = np.array([np.nan if item.slo_ms is None else item.slo_ms / 1e3 for item in items])
    return np.where(np.isnan(asked), multiple * own, asked)


def _attained(items: Sequence[Item], latency: np.ndarray, own: np.ndarray, multiple: float) -> Attained:
    kept = int(np.sum(latency <= limits_of(items, own, multiple)))
    low, high = share_interval(kept, len(items))
    return Attained(multiple=multiple, share=kept / len(items), low=low, high=high)


def _quantiles(values: np.ndarray) -> Quantiles | None:
    if not len(values):
        return None
    p50, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99]).tolist()
    return Quantiles(p50=p50, p95=p95, p99=p99)


def kind_names(kinds: Sequence[Kind]) -> dict[Kind, str]:
    """Return a name for each of the kinds: its steps, and whatever else differs between them."""
    found = list(dict.fromkeys(kinds))
    differs = [len({kind[field] for kind in found}) > 1 for field in range(4)]
    return {kind: ", ".join(_words(kind, differs)) for kind in sorted(found, key=str)}


def _words(kind: Kind, differs: Sequence[bool]) -> list[str]:
    size = "its own size" if kind.size is None else "x".join(map(str, kind.size))
    further = (size, f"guidance {kind.guidance:g}", kind.sampler or "its own sampler")
    steps = f"{kind.steps} step{'' if kind.steps == 1 else 's'}"
    return [steps, *(word for word, differ in zip(further, differs[1:], strict=True) if differ)]
