"""What becomes of a picture: it is delivered, or answered for with an error, and whoever measures is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from latentrt.engines.errors import CancelledError, DeadlineError, EngineError, LatentrtError
from latentrt.runtime.batching.line import Line
from latentrt.runtime.batching.observer import Cancelled, Delivered, Failed, Promise, Telling
from latentrt.runtime.batching.stage_times import StageTimes
from latentrt.runtime.batching.ticket import Ticket
from latentrt.runtime.calls import Turn
from latentrt.runtime.result import Result

logger = logging.getLogger(__name__)


class Answers:
    """Gives each picture its one answer. Safe to use from many threads.

    finish: decodes a picture; turn: the pipeline's, which nobody who is told of an answer may wait for
    """

    def __init__(
        self, finish: Callable[[Ticket], Result], line: Line, times: StageTimes, tell: Telling, turn: Turn
    ) -> None:
        self._finish, self._line, self._times, self._tell, self._turn = finish, line, times, tell, turn

    def deliver(self, ticket: Ticket) -> None:
        """Decode a picture whose stages are done, and hand it over. Raises EngineError."""
        if (error := over(ticket)) is not None:
            self.fail(ticket, error)
            return
        result = self._finish(ticket)
        self._times.note("decode", 1, result.seconds["decode"])
        if not ticket.done.set_running_or_notify_cancel():  # whoever had the future cancelled it
            self._tell(Cancelled(picture=ticket.number, when=ticket.when, expired=False))
            self._owe_less()
            return
        promise: Promise = "none" if ticket.due is None else "met" if time.perf_counter() <= ticket.due else "missed"
        self._tell(Delivered(picture=ticket.number, promise=promise, seconds=result.seconds))
        self._hand_over(lambda: ticket.done.set_result(result))

    def _hand_over(self, give: Callable[[], None]) -> None:
        """Give an answer, and owe one less, whatever those do who are told of it."""
        try:
            with self._turn.telling():
                give()
        except BaseException:  # a future keeps to itself what is an Exception
            logger.exception("whoever waited for a picture failed when it was handed over")
        self._owe_less()

    def _owe_less(self) -> None:
        with self._line.change:
            self._line.owed -= 1
            self._line.change.notify_all()

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Answer for a picture with an error, unless it has its answer. What is no Exception is an EngineError."""
        with self._line.change:
            if ticket.ended:
                return
            ticket.ended = True
        if not isinstance(error, Exception):  # SystemExit, or a panic in a library: it is not to end who waits, too
            error, cause = EngineError(f"drawing was ended by {type(error).__name__}: {error}"), error
            error.__cause__ = cause
        if isinstance(error, CancelledError | DeadlineError):
            self._tell(Cancelled(picture=ticket.number, when=ticket.when, expired=isinstance(error, DeadlineError)))
        else:
            self._tell(Failed(picture=ticket.number, when=ticket.when, error=error))
        if ticket.done.set_running_or_notify_cancel():
            self._hand_over(lambda: ticket.done.set_exception(error))
        else:
            self._owe_less()


def over(ticket: Ticket) -> LatentrtError | None:
    """Return why nobody waits for a picture any more, or None."""
    if ticket.done.cancelled():
        return CancelledError("its future was cancelled")
    try:
        done = ticket.picture.done if ticket.picture else 0
        ticket.limits.check(f"after stage {done} of {ticket.job.plan.stages}" if done else "before the first stage")
    except LatentrtError as error:
        return error
    return None
