"""What is asked for and when: random arrivals of a mix, or a trace that was written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from latentrt.engines.bundle.parsing import ParseError, decode, parse
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Document

GUIDANCE = 7.5
EVEN = 0.01
WORDS = ("circle", "square", "star", "heart", "moon", "cross")


class Kind(NamedTuple):
    """What a picture's time alone depends on, as far as requests differ here. size: None for the bundle's own"""

    steps: int
    size: tuple[int, int] | None
    guidance: float
    sampler: str | None


class Item(Document, frozen=True, kw_only=True):
    """A request for one picture: a line of a trace.

    at_s: when it comes, in seconds from the start
    size: [width, height] in pixels, null for the bundle's own
    prompt, seed: null for ones that follow from the line's number
    slo_ms: within how many milliseconds it must be answered, null for a multiple of its own time alone
    """

    at_s: Annotated[float, Meta(ge=0, le=1e7)]
    steps: Annotated[int, Meta(ge=1, le=1000)] = 20
    size: tuple[Annotated[int, Meta(ge=8)], Annotated[int, Meta(ge=8)]] | None = None
    guidance: Annotated[float, Meta(ge=0, le=1000)] = GUIDANCE
    sampler: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    slo_ms: Annotated[float, Meta(gt=0)] | None = None

    @property
    def kind(self) -> Kind:
        """Return what its time alone depends on."""
        return Kind(self.steps, self.size, self.guidance, self.sampler)


class Share(Document, frozen=True, kw_only=True):
    """A part of a mix: requests with so many steps, and how large a share they are."""

    steps: int
    share: float


def gaps(count: int, rng: np.random.Generator, *, cv: float) -> np.ndarray:
    """Return (count,) float64 seconds between arrivals, 1 in the mean: Gamma, of a coefficient of variation.

    cv: 1 for a Poisson process, more for bursts, under EVEN for even gaps
    """
    return np.ones(count) if cv < EVEN else rng.gamma(1 / cv**2, cv**2, count)


def counts(mix: Sequence[Share], count: int) -> list[int]:
    """Return how many of `count` requests each part of a mix is: its share, to the nearest whole one."""
    ends = np.cumsum([part.share for part in mix]) / sum(part.share for part in mix)
    return [int(part) for part in np.diff(np.round(ends * count).astype(int), prepend=0)]


def moments(mix: Sequence[Share], count: int, seed: int, *, cv: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (count,) float64 moments, one a second in the mean, and (count,) int64 steps, in random order."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(gaps(count, rng, cv=cv))
    return at, rng.permutation(np.repeat([part.steps for part in mix], counts(mix, count)))


def random_items(
    mix: Sequence[Share], count: int, seed: int, *, cv: float = 1.0, size: tuple[int, int] | None = None,
    guidance: float = GUIDANCE, sampler: str | None = None,
) -> tuple[Item, ...]:  # fmt: skip
    """Return requests of a mix in random order, one a second in the mean: each part has exactly its share.

    The same seed gives the same order and, but for their scale, the same gaps at every rate: see `at_rate`.
    """
    at, steps = moments(mix, count, seed, cv=cv)
    return tuple(
        Item(at_s=float(moment), steps=int(some), size=size, guidance=guidance, sampler=sampler)
        for moment, some in zip(at, steps, strict=True)
    )


def rate_of(items: Sequence[Item]) -> float:
    """Return how many requests come in a second, in the mean."""
    return len(items) / max(items[-1].at_s, 1e-9)


def at_rate(items: Sequence[Item], rate: float) -> tuple[Item, ...]:
    """Return the same requests at another rate: all gaps are scaled alike. rate: a second, in the mean"""
    factor = rate_of(items) / rate
    return tuple(msgspec.structs.replace(item, at_s=item.at_s * factor) for item in items)


def prompt_of(item: Item, number: int) -> str:
    """Return an item's prompt: without one, another for each, so that its text is encoded."""
    return item.prompt if item.prompt is not None else f"a red {WORDS[number % len(WORDS)]}, number {number}"


def read_trace(path: Path) -> tuple[Item, ...]:
    """Read a trace: a JSON object a line, in the order of time. Raises RequestError with the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise RequestError(f"trace: {path} cannot be read ({reason}); name a file of JSON lines") from None
    items: list[Item] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(_item(line, f"trace: {path}, line {number}", items[-1].at_s if items else 0.0))
    if not items or items[-1].at_s <= 0:
        raise RequestError(f"trace: {path} holds no request after its start; write a JSON object a line, with at_s")
    return tuple(items)


def _item(line: str, where: str, earlier: float) -> Item:
    try:
        item = parse(Item, decode(line, strict=True))
    except ParseError as error:
        raise RequestError(f"{where}: {error}") from None
    if item.at_s < earlier:
        raise RequestError(f"{where}: at_s is {item.at_s:g}, before the line above it; sort the lines by time")
    return item
