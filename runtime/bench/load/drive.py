"""The driver: it asks at the moments that were drawn, whatever becomes of the requests before (an open loop)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Literal

import msgspec

from latentrt.engines.errors import LatentrtError, QueueFullError
from latentrt.runtime.bench.load.arrivals import Item

Submit = Callable[[int, Item], "Future[float | None]"]
"""takes a request, with its number, and gives the seconds from then on to its first partial picture, None if unknown.

It raises LatentrtError at once where it refuses; the future is done when the picture is there.
"""
Status = Literal["answered", "rejected", "failed", "unanswered"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request.

    latency_s: from the moment that it was to be asked at to its picture; first_s: to its first partial picture
    """

    status: Status
    latency_s: float | None = None
    first_s: float | None = None


def drive(
    submit: Submit, items: Sequence[Item], *, most_s: float, skips_idle: bool,
    error: Callable[[BaseException], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Ask for each item at its moment; return what became of them, in order, when all are answered or time is over.

    most_s: after so many seconds those that are not answered are given up
    skips_idle: where nothing is being drawn, the next item is asked for at once and all later ones earlier by as much:
        what a request meets is the same, and a quiet service takes no longer to measure than a busy one
    error: is told of failures
    """
    run = _Run(len(items), error)
    start = time.perf_counter()
    end = start + most_s
    for number, item in enumerate(items):
        due = run.wait_until(min(start + item.at_s, end), skips_idle=skips_idle)
        if due >= end:
            break
        start = due - item.at_s
        run.ask(submit, number, item, due)
    run.wait_for_all(end)
    return run.outcomes()


class _Run:
    def __init__(self, count: int, error: Callable[[BaseException], None]) -> None:
        self._change = threading.Condition()
        self._open = 0
        self._error = error
        self._outcomes = [Outcome(status="unanswered")] * count

    def wait_until(self, due: float, *, skips_idle: bool) -> float:
        """Wait for a moment, or only until nothing is being drawn; return the moment that it then is for the run."""
        with self._change:
            while (left := due - time.perf_counter()) > 0:
                if skips_idle and not self._open:
                    return time.perf_counter()
                self._change.wait(left)
        return due

    def ask(self, submit: Submit, number: int, item: Item, due: float) -> None:
        with self._change:
            self._open += 1
        late = time.perf_counter() - due
        try:
            future = submit(number, item)
        except LatentrtError as error:
            self._error(error)
            self._close(number, Outcome(status="rejected" if isinstance(error, QueueFullError) else "failed"))
            return
        future.add_done_callback(partial(self._answered, number, due, late))

    def _answered(self, number: int, due: float, late: float, future: Future[float | None]) -> None:
        latency = time.perf_counter() - due
        if future.cancelled():
            self._close(number, Outcome(status="unanswered"))
        elif (error := future.exception()) is not None:
            self._error(error)
            self._close(number, Outcome(status="rejected" if isinstance(error, QueueFullError) else "failed"))
        else:
            first = future.result()
            self._close(
                number,
                Outcome(status="answered", latency_s=latency, first_s=None if first is None else first + late),
            )

    def _close(self, number: int, outcome: Outcome) -> None:
        with self._change:
            self._outcomes[number] = outcome
            self._open -= 1
            self._change.notify_all()

    def wait_for_all(self, end: float) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._open, timeout=max(0.0, end - time.perf_counter()))

    def outcomes(self) -> list[Outcome]:
        with self._change:
            return list(self._outcomes)
