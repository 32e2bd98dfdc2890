"""How measurements are taken: warm up until steady, then rounds in which the candidates take turns in random order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from latentrt.engines.spec import Document

CALM = 3  # draws in a row that bring nothing new
FASTER = 0.05
MOST_WARMUP = 20
FEWEST_ROUNDS = 3
RULE = (
    f"a candidate is steady once {CALM} draws in a row are none of them over {FASTER:.0%} faster than the fastest "
    f"before them; at most {MOST_WARMUP} draws, or the warm-up's share of the time"
)

T = TypeVar("T")


class Warmup(Document, frozen=True, kw_only=True):
    """What came before the first measured round. `steady` is false where a limit ended it, not the rule.

    seconds: of each draw, in order
    """

    steady: bool
    seconds: tuple[float, ...]


def warm_up(draw: Callable[[], float], *, most_seconds: float) -> Warmup:
    """Call `draw`, which returns the seconds it took, until it gets no faster, or until a limit."""
    seconds: list[float] = []
    while not is_steady(seconds) and len(seconds) < MOST_WARMUP and (not seconds or sum(seconds) < most_seconds):
        seconds.append(draw())
    return Warmup(steady=is_steady(seconds), seconds=tuple(seconds))


def is_steady(seconds: Sequence[float]) -> bool:
    """Tell whether the last three draws brought nothing that the ones before had not."""
    if len(seconds) <= CALM:
        return False
    return min(seconds[-CALM:]) >= (1 - FASTER) * min(seconds[:-CALM])


def take_turns(
    candidates: Sequence[T], *, rounds: int, most_seconds: float, seed: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[tuple[int, T]]:
    """Yield (round, candidate): in each round every candidate once, in a new random order.

    Ends after `rounds` rounds, or after the round in which `most_seconds` have passed, but not before three.
    """
    order, start = np.random.default_rng(seed), clock()
    for round_ in range(rounds):
        if round_ >= FEWEST_ROUNDS and clock() - start > most_seconds:
            return
        for i in order.permutation(len(candidates)):
            yield round_, candidates[i]
