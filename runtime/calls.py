"""Calls of a pipeline: taking turns, deadlines, cancellation, and handing out the steps."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Self

import msgspec

from latentrt.engines.errors import CancelledError, ClosedError, DeadlineError, NestedCallError, RequestError
from latentrt.runtime.draw.step import OnStep, Stages, Step
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result

SLOW_S, SLOW_SHARE = 10.0, 0.8  # a call is slow that takes longer, or with a deadline more than this share of it
logger = logging.getLogger(__name__)


class Cancellation:
    """Ends calls from another thread: give it to them as `cancel`, and call its own `cancel`.

    A call that waits for its turn ends at once, one that draws after the stage it is in; both raise CancelledError.
    """

    def __init__(self) -> None:
        self._cancelled = False
        self._wakes: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Tell whether it was cancelled. That cannot be undone."""
        return self._cancelled

    def cancel(self) -> None:
        """End every call that was given this, now and later. Safe from any thread, and from signal handlers."""
        self._cancelled = True
        for wake in list(self._wakes):
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` if it is cancelled while the block runs."""
        self._wakes.append(wake)
        try:
            yield
        finally:
            self._wakes.remove(wake)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What may end a call before its pictures are finished. deadline: seconds from `began` on."""

    deadline: float | None = None
    cancel: Cancellation | None = None
    began: float = msgspec.field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, request: Request, cancel: Cancellation | None) -> Self:
        """Return those of a call that begins now. Raises RequestError on a deadline that is not a number above 0."""
        deadline = request.deadline
        if deadline is None:
            return cls(cancel=cancel)
        if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not deadline > 0:
            raise RequestError(f"deadline: found {deadline!r}, expected seconds above 0")
        return cls(deadline=deadline, cancel=cancel)

    @property
    def any(self) -> bool:
        """Tell whether there is any limit."""
        return self.deadline is not None or self.cancel is not None

    @property
    def left(self) -> float | None:
        """Return the seconds until the deadline, None if there is none."""
        return None if self.deadline is None else self.deadline - self.spent

    @property
    def spent(self) -> float:
        """Return the seconds since the call began."""
        return time.perf_counter() - self.began

    def check(self, where: str) -> None:
        """Raise CancelledError or DeadlineError if the call must end. where: as in `after stage 2 of 20`"""
        if self.cancel is not None and self.cancel.cancelled:
            raise CancelledError(f"the call was cancelled {where}")
        if self.left is not None and self.left <= 0:
            raise DeadlineError(f"deadline: {self.deadline:g} s had passed {where}")

    def end(self) -> None:
        """Cancel the call."""
        if self.cancel is not None:
            self.cancel.cancel()


class Turn:
    """A lock that is given in the order of asking. Its owner is known: a call from within a call is refused."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may cancel what its own thread waits for
        self._line = deque[threading.Condition]()
        self._owner: int | None = None
        self._process = os.getpid()  # of the owner: a fork has the lock, and not the thread that would give it back
        self._telling = threading.local()  # whether this thread tells somebody of a picture that was drawn

    @property
    def mine(self) -> bool:
        """Tell whether this thread has the turn."""
        return self._owner == threading.get_ident()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Refuse calls of this thread while the block runs: those who are told there must not wait for a turn."""
        self._telling.now = True
        try:
            yield
        finally:
            self._telling.now = False

    def take(self, limits: Limits) -> None:
        """Wait for the turn and take it.

        Raises NestedCallError if this thread has it; CancelledError and DeadlineError if the wait must end; ClosedError
        in a process that was forked while another thread had it.
        """
        self.refuse_nested()
        self._refuse_forked()
        mine = threading.Condition(self._lock)
        wake = partial(self._wake, mine)
        with self._lock, limits.cancel.waking(wake) if limits.cancel else nullcontext():
            self._line.append(mine)
            try:
                while self._owner is not None or self._line[0] is not mine:
                    limits.check("while another call was drawing")
                    mine.wait(limits.left)
                self._owner, self._process = threading.get_ident(), os.getpid()
            finally:
                self._line.remove(mine)
                self._wake_first()

    def _refuse_forked(self) -> None:
        if self._owner is not None and self._process != os.getpid():
            raise ClosedError(
                "this process was forked while a picture was being drawn, which nobody finishes here; load the bundle "
                "again, or fork before anything is drawn"
            )

    def _wake(self, waiting: threading.Condition) -> None:
        with self._lock:
            waiting.notify_all()

    def _wake_first(self) -> None:
        if self._owner is None and self._line:
            self._line[0].notify_all()

    def refuse_nested(self) -> None:
        """Raise NestedCallError if this thread has the turn, or tells somebody of a picture."""
        if self.mine or getattr(self._telling, "now", False):
            raise NestedCallError(
                "the pipeline was called from within one of its own calls on this thread; let on_step, or what a "
                "future calls when it is done, return first, or finish or close the stream"
            )

    def carry(self) -> None:
        """Give the turn to this thread, which continues a stream that another one began."""
        self._owner = threading.get_ident()

    def give_back(self) -> None:
        """Give up the turn."""
        with self._lock:
            self._owner = None
            self._wake_first()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the turn while the block runs. Raises NestedCallError."""
        self.take(Limits())
        try:
            yield
        finally:
            self.give_back()


class Stream(Iterator[Step]):
    """A call that draws while it is iterated: it gives its steps, and at the end its `result`.

    It draws on the thread that iterates, between one step and the next. No other call draws until it ends or is
    closed. Closing it, leaving its `with` block or dropping it ends the call early. One thread at a time may use it.
    """

    def __init__(self, stages: Stages[Result]) -> None:
        self._stages = stages
        self._result: Result | None = None

    def __next__(self) -> Step:
        """Draw the next stage. Raises what `Pipeline.draw` raises; the StopIteration at the end has the result too."""
        try:
            return next(self._stages)
        except StopIteration as end:
            self._result = self._result or end.value
            raise StopIteration(self._result) from None

    @property
    def result(self) -> Result:
        """Return what was drawn. Raises RequestError before the last step, and if it was closed early."""
        if self._result is None:
            raise RequestError("a stream has a result after its last step; iterate over all of them first")
        return self._result

    def close(self) -> None:
        """End the call, and let the next one draw."""
        self._stages.close()

    def leave(self) -> None:
        """Close it if it waits between two steps; a stream that another thread is drawing continues."""
        if inspect.getgeneratorstate(self._stages) == inspect.GEN_SUSPENDED:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finish(stages: Stages[Result], on_step: OnStep | None) -> Result:
    """Draw to the end, each step shown to `on_step`: what it raises ends the call."""
    with Stream(stages) as stream:
        for step in stream:
            if on_step is not None:
                on_step(step)
    return stream.result


def limited(stages: Stages[Result], limits: Limits, turn: Turn) -> Stages[Result]:
    """Draw to the end within limits; the turn belongs to the thread that takes the next step."""
    with Stream(stages) as stream:
        for step in stream:
            limits.check(f"after stage {step.stage} of {step.stages}")
            yield step
            turn.carry()
    return stream.result


def tell(result: Result, limits: Limits, *, waited: float) -> None:
    """Log a call that is done: with INFO where it was slow, else with DEBUG. waited: seconds, for its turn"""
    allowed = SLOW_S if limits.deadline is None else SLOW_SHARE * limits.deadline
    slow = limits.spent > allowed
    size = "x".join(map(str, result.settings[0].size))
    logger.log(
        logging.INFO if slow else logging.DEBUG,
        "%s: %d of %s in %.3f s, %.3f s of them waiting for other calls, %d stages (%s)",
        f"slow call, more than {allowed:g} s" if slow else "drew",
        len(result.pixels),
        size,
        limits.spent,
        waited,
        len(result.step_seconds),
        result.backend,
    )
