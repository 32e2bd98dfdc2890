"""Continuous batching: one thread takes the pictures of many requests from stage to stage together.

Requests join at the next stage and leave when their own plan ends. Prompts are encoded and pictures decoded on threads
of their own, beside the loop. Groups that cannot be drawn together take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import msgspec

from latentrt.engines.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    DrainingError,
    EngineError,
    LatentrtError,
    NotFiniteError,
    OutOfMemoryError,
    QueueFullError,
)
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.runtime.batching.beside import explained, finish, prepare
from latentrt.runtime.batching.observer import (
    Admitted,
    Cancelled,
    Delivered,
    Failed,
    Observer,
    Promise,
    Reason,
    Refused,
    StageDone,
    Started,
    Telling,
    WeightsChanged,
)
from latentrt.runtime.batching.shared_loop import SharedLoop
from latentrt.runtime.batching.stage_times import Owed, StageTimes, may_join
from latentrt.runtime.batching.ticket import Group, Ticket, single
from latentrt.runtime.batching.turns import Turns
from latentrt.runtime.calls import Cancellation, Limits
from latentrt.runtime.draw.finite import LATENTS
from latentrt.runtime.draw.job import resolve
from latentrt.runtime.draw.step import Step
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result

logger = logging.getLogger(__name__)
OnPicture = Callable[[int, Step], None]
LEAST_TURN_S, TURN_OVER_CHANGE = 0.25, 5.0  # a turn lasts so long, and so many times what changing the weights takes


class BatcherOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a batcher keeps to.

    slots: pictures that share stages, at the most; waiting: pictures that may wait, at the most
    slo: how many times a request's own time alone a picture may take, where nothing else is promised; None for no
        promise
    """

    slots: int = 8
    waiting: int = 64
    slo: float | None = None


class Batcher:
    """Draws requests on a pipeline, many at a time. Safe to use from many threads. Close it, or use `with`.

    It has the pipeline's turn while it has anything to draw: the pipeline's own calls wait meanwhile.
    """

    def __init__(
        self, pipe: Pipeline, options: BatcherOptions | None = None, *, observer: Observer | None = None
    ) -> None:
        """Begin to wait for requests. observer: is told what happens, see `observer.Event`"""
        self.options = options or BatcherOptions()
        self.times = StageTimes()
        self._tell = Telling(observer)
        self._loaded = pipe.loaded
        self._change = threading.Condition()
        self._line: list[Ticket] = []  # those that wait, prepared or not
        self._running: dict[Group, list[Ticket]] = {}  # of groups whose turn it is not: their pictures, with states
        self._group: Group | None = None
        self._batch: SharedLoop | None = None
        self._most: dict[Group, int] = {}  # pictures at a time, where more had no room
        self._turns: Turns[Group] = Turns(self._quantum)
        self._adapt_s = 0.0
        self._besides = 0  # encodings and decodings under way
        self._count = 0
        self._draining = self._closed = False
        self._held = 0  # blocks that wait until nothing is drawn, or run then
        self._progress_at: float | None = None  # None while there is nothing to draw
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-encode")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-decode")
        self._thread = threading.Thread(target=self._run, name="latentrt-batch", daemon=True)
        self._thread.start()

    # What callers do, from any thread.

    def submit(
        self, request: Request, *, on_step: OnPicture | None = None, cancel: Cancellation | None = None
    ) -> list[Future[Result]]:
        """Have a request drawn; return what comes of each of its pictures, in order.

        on_step: called after each stage of each picture with the picture's number, from 0, and its step, on the
            batcher's thread: it must be quick
        cancel: ends all of the request's pictures within a stage
        Raises RequestError, of its kinds QueueFullError and DrainingError where nothing is wrong with the request.
        """
        limits = Limits.of(request, cancel)
        job = resolve(request, self._loaded.manifest)
        changes = self._loaded.loras.changes(job.request.loras)
        jobs = [single(job, picture) for picture in range(len(job.prompts))]
        tokens = [self._loaded.tokens(one) for one in jobs]
        tickets = []
        with self._change:
            refused = self._refusal(len(jobs))
            for picture, (one, length) in enumerate(zip(jobs, tokens, strict=True)) if refused is None else ():
                self._count += 1
                ticket = Ticket(
                    number=self._count,
                    job=one,
                    tokens=length,
                    changes=changes,
                    limits=limits,
                    on_step=partial(on_step, picture) if on_step else None,
                )
                ticket.due = self._promise(ticket)
                tickets.append(ticket)
            self._line += tickets
            waiting = len(self._line)
            self._change.notify_all()
        if refused is not None:
            self._tell(Refused(reason=refused[0], pictures=len(jobs)))
            raise refused[1]
        for ticket in tickets:
            self._tell(Admitted(picture=ticket.number, waiting=waiting))
        return [ticket.done for ticket in tickets]

    def _refusal(self, pictures: int) -> tuple[Reason, LatentrtError] | None:
        """Return why a request cannot be taken now, in a word and as the error."""
        if self._closed:
            return "closed", ClosedError("this service is closed")
        if self._draining or self._held:
            words = "this service takes no requests now, and ends those it has; try again, or ask another one"
            return "draining", DrainingError(words)
        if len(self._line) + pictures > self.options.waiting:
            wait = self.expected_wait_s()
            words = f"{len(self._line)} pictures wait and {self.options.waiting} may; try again in {wait:.0f} s"
            return "full", QueueFullError(words, retry_after_s=wait)
        return None

    def _promise(self, ticket: Ticket) -> float | None:
        """Return the moment that a picture is promised for: its own deadline's, or the service's."""
        moments = []
        if ticket.limits.deadline is not None:
            moments.append(ticket.limits.began + ticket.limits.deadline)
        own = self._own_seconds(ticket)
        if self.options.slo is not None and own is not None:
            moments.append(ticket.limits.began + self.options.slo * own)
        return min(moments, default=None)

    def _own_seconds(self, ticket: Ticket) -> float | None:
        """Return what the stages that a picture has left and its decoding take alone, None before any was measured."""
        stage = self.times.estimate(_kind(ticket.group), _rows(ticket))
        return None if stage is None else ticket.stages_left * stage + (self.times.estimate("decode", 1) or 0.0)

    def expected_wait_s(self) -> float:
        """Return the seconds until a place in the line is likely to be free, 1 at the least."""
        ahead = [*self._line, *(ticket for one in self._running.values() for ticket in one)]
        each = [(self.times.estimate(_kind(one.group), _rows(one)) or 0.0) * one.stages_left for one in ahead]
        return max(1.0, sum(each) / max(1, len(each)))

    def estimate(self, request: Request) -> float | None:
        """Return the seconds that drawing a request's pictures one by one would take; None before any was drawn.

        By measured stage times, and without the wait for others. Raises RequestError on what cannot be drawn.
        """
        job = resolve(request, self._loaded.manifest)
        changes = self._loaded.loras.changes(job.request.loras)
        alone = single(job, 0)
        limits, tokens = Limits(), self._loaded.tokens(alone)
        ticket = Ticket(number=0, job=alone, tokens=tokens, changes=changes, limits=limits, on_step=None)
        own = self._own_seconds(ticket)
        return None if own is None else own * len(job.prompts)

    def position(self, future: Future[Result]) -> int | None:
        """Return the place of a picture in the line, from 1 up; None if it does not wait, or not any more.

        Pictures that cannot share stages take turns, so that one may overtake another.
        """
        with self._change:
            line = sorted((one for one in self._line if one.began is None), key=lambda ticket: ticket.urgency)
        return next((place for place, ticket in enumerate(line, start=1) if ticket.done is future), None)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no further requests, and wait until all that were taken are answered.

        timeout_s: how long to wait for that at the most, None for as long as it takes
        Returns whether they are.
        """
        self._draining = True
        return self._quiet(timeout_s)

    def _quiet(self, timeout_s: float | None) -> bool:
        with self._change:
            return self._change.wait_for(lambda: not self._busy(), timeout_s)

    @contextmanager
    def hold(self, timeout_s: float | None = None) -> Iterator[bool]:
        """Take no requests while a block runs, which begins once all that were taken are answered.

        The pipeline is the block's alone: it may be changed, tested, or closed together with the batcher.
        timeout_s: as for `drain`, whose answer the block is given: where it is False, some are still being drawn
        """
        with self._change:
            self._held += 1
        try:
            yield self._quiet(timeout_s)
        finally:
            with self._change:
                self._held -= 1

    def close(self) -> None:
        """End the thread; whatever is not drawn yet is cancelled. The loaded bundle stays open."""
        with self._change:
            self._draining = self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._encoder.shutdown()
        self._decoder.shutdown()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Return how many pictures wait."""
        return len(self._line)

    @property
    def last_stage_at(self) -> float:
        """Return when the loop last finished a stage, or had nothing to do, on the clock of `time.perf_counter`.

        While there is something to draw and this stays, the loop hangs, or another call of the pipeline draws.
        """
        at = self._progress_at
        return time.perf_counter() if at is None else at

    @property
    def drawing(self) -> int:
        """Return how many pictures have begun."""
        return len(self._batch.tickets if self._batch else ()) + sum(map(len, self._running.values()))

    # The batcher's own thread.

    def _busy(self) -> bool:
        return bool(self._line or self._running or self._besides or (self._batch and self._batch.tickets))

    def _run(self) -> None:
        while True:
            with self._change:
                self._progress_at = None
                self._change.notify_all()  # who waits for the last one to end
                self._change.wait_for(lambda: self._closed or self._busy())
                self._progress_at = time.perf_counter()
            if not self._closed:
                with self._loaded.turn.hold():
                    self._draw_all()
            if self._closed:
                self._end_all()
                return

    def _draw_all(self) -> None:
        """Draw until there is nothing to draw. The weights may be others' from one time to the next."""
        self._group, self._batch = None, None
        while self._busy() and not self._closed:
            self._once()

    def _once(self) -> None:
        """Do what there is to do before a stage, and the stage."""
        self._let_go()
        with self._change:
            chosen = self._turns.choose(self._groups())
        if chosen is not None and chosen != self._group:
            self._switch(chosen)
        self._prepare()
        self._join()
        if self._batch is not None and self._batch.tickets:
            self._advance(self._batch)
        else:
            with self._change:  # until something is prepared or decoded, or another request comes
                if self._besides and not self._closed:
                    self._change.wait(0.05)

    def _groups(self) -> list[Group]:
        """Return the groups that have something to draw, in the order in which they came."""
        own = {self._group: None} if self._group and self._batch and self._batch.tickets else {}
        line = sorted(self._line, key=lambda ticket: ticket.urgency)
        return list({**own, **dict.fromkeys(self._running), **dict.fromkeys(ticket.group for ticket in line)})

    def _quantum(self, group: Group) -> float:
        return max(LEAST_TURN_S, TURN_OVER_CHANGE * self._adapt_s)

    def _let_go(self) -> None:
        """End the pictures that nobody waits for any more."""
        for ticket in [*self._tickets(), *(self._batch.tickets if self._batch else ())]:
            if (error := _over(ticket)) is not None:
                self._end(ticket, error)

    def _end(self, ticket: Ticket, error: BaseException) -> None:
        """Take a picture from wherever it is, and answer for it."""
        if self._batch is not None and ticket in self._batch.tickets:
            self._batch.leave(ticket, keep=False)
        with self._change:
            if ticket in self._line:
                self._line.remove(ticket)
            for group, tickets in list(self._running.items()):
                self._running[group] = [other for other in tickets if other is not ticket]
                if not self._running[group]:
                    del self._running[group]
        self._fail(ticket, error)

    def _switch(self, group: Group) -> None:
        """Let another group draw, with its weights: what is under way with others ends first."""
        if self._batch is not None and self._group is not None and (parked := self._batch.park()):
            self._running[self._group] = parked
        weights = None if self._group is None else self._group.weights
        self._group, self._batch = None, None  # nobody draws before the weights are known to be the group's
        if weights != group.weights and not self._change_weights(group):
            return
        self._group = group
        self._batch = self._shared_loop(group)
        try:
            self._batch.join(self._running.pop(group, []))
        except EngineError as error:
            self._failed(self._batch, error)

    def _change_weights(self, group: Group) -> bool:
        """Change the weights to a group's; where that fails, end all that need them and return False."""
        with self._change:
            self._change.wait_for(lambda: not self._besides)
            own = [ticket for ticket in self._tickets() if ticket.group.weights == group.weights]
        try:
            taken = self._loaded.adapt(own[0].changes) if own else 0.0
        except LatentrtError as error:
            for ticket in own:
                self._end(ticket, error)
            return False
        self._adapt_s, self._progress_at = taken or self._adapt_s, time.perf_counter()
        if taken:
            self._tell(WeightsChanged(seconds=taken))
        return bool(own)

    def _tickets(self) -> list[Ticket]:
        return [*self._line, *(ticket for tickets in self._running.values() for ticket in tickets)]

    def _shared_loop(self, group: Group) -> SharedLoop:
        counts = range(1, self._most.get(group, self.options.slots) + 1)
        return SharedLoop(partial(self._workspace, group), self._loaded.drawing, counts)

    def _workspace(self, group: Group, slots: int) -> Workspace:
        width, height = group.size
        shape = WorkspaceShape(pictures=slots, tokens=group.tokens, width=width, height=height)
        return self._loaded.opened.workspace(
            self._loaded.manifest.latents,
            shape,
            state_rows=group.state_rows,
            denoiser=group.denoiser,
            decoder=None,
        )

    def _prepare(self) -> None:
        """Have the next pictures encoded beside the loop, as many as can join soon."""
        if self._group is None:
            return
        own = [one for one in self._line if one.group.weights == self._group.weights]
        for ticket in sorted(own, key=lambda ticket: ticket.urgency)[: 2 * self.options.slots]:
            if not ticket.preparing:
                ticket.preparing = True
                self._beside(self._encoder, partial(prepare, self._loaded), ticket)

    def _beside(self, pool: ThreadPoolExecutor, work: Callable[[Ticket], None], ticket: Ticket) -> None:
        """Have something done for a picture beside the loop; where it fails, the picture alone does."""
        with self._change:
            self._besides += 1

        def run() -> None:
            try:
                work(ticket)
            except Exception as error:
                with self._change:
                    if ticket in self._line:
                        self._line.remove(ticket)
                self._fail(ticket, error)
            finally:
                with self._change:
                    self._besides -= 1
                    self._change.notify_all()

        pool.submit(run)

    def _join(self) -> None:
        """Let those join that are prepared, as far as promises allow."""
        batch, group = self._batch, self._group
        if batch is None or group is None:
            return
        ready = [one for one in self._line if one.picture is not None and one.group == group]
        ready.sort(key=lambda ticket: ticket.urgency)
        joining = ready[: self._may_join(batch, ready, group)]
        now = time.perf_counter()
        for ticket in joining:
            with self._change:
                self._line.remove(ticket)
            if ticket.began is None:
                ticket.began = now
                self._tell(Started(picture=ticket.number, wait_s=now - ticket.limits.began))
        try:
            batch.join(joining)
        except EngineError as error:
            self._failed(batch, error, further=joining)

    def _may_join(self, batch: SharedLoop, ready: Sequence[Ticket], group: Group) -> int:
        if any(ticket.alone for ticket in batch.tickets):
            return 0
        if ready and ready[0].alone:
            return int(not batch.tickets)
        sociable = next((i for i, ticket in enumerate(ready) if ticket.alone), len(ready))
        running, waiting = ([self._owed(one) for one in some] for some in (batch.tickets, ready[:sociable]))
        most = self._most.get(group, self.options.slots)
        estimate = self.times.estimate
        return may_join(
            running,
            waiting,
            lambda rows: estimate(_kind(group), rows) or 0.0,
            now=time.perf_counter(),
            most=most,
        )

    def _owed(self, ticket: Ticket) -> Owed:
        after = self.times.estimate("decode", 1) or 0.0
        return Owed(stages=ticket.stages_left, rows=_rows(ticket), after_s=after, due=ticket.due)

    def _advance(self, batch: SharedLoop) -> None:
        rows = sum(_rows_now(ticket) for ticket in batch.tickets)
        try:
            seconds = batch.advance()
        except Exception as error:
            self._failed(batch, error)
            return
        assert self._group is not None
        self.times.note(_kind(self._group), rows, seconds)
        self._turns.charge(seconds)
        self._progress_at = time.perf_counter()
        self._tell(
            StageDone(
                pictures=len(batch.tickets),
                used=rows,
                padded=batch.rows - rows,
                capacity=2 * self.options.slots,
                seconds=seconds,
            )
        )
        for ticket in list(batch.tickets):
            ticket.step_seconds.append(seconds)
            self._after_stage(batch, ticket)

    def _after_stage(self, batch: SharedLoop, ticket: Ticket) -> None:
        """Show a picture's stage, and send it on where its stages, or those of its part, are done."""
        assert ticket.picture is not None
        picture = ticket.picture
        if batch.lost(ticket):
            batch.leave(ticket, keep=False)
            error = NotFiniteError(LATENTS, (0,), stage=picture.done, stages=ticket.job.plan.stages)
            self._fail(ticket, explained(self._loaded, ticket, error))
            return
        if ticket.on_step is not None:
            try:
                with batch.step(ticket) as step:
                    ticket.on_step(step)
            except Exception as error:
                batch.leave(ticket, keep=False)
                self._fail(ticket, error)
                return
        if picture.done < ticket.part.stages.stop:
            return
        batch.leave(ticket, keep=True)
        if picture.part + 1 < len(ticket.job.ranges):
            picture.part += 1
            with self._change:
                self._line.append(ticket)
        else:
            self._beside(self._decoder, self._deliver, ticket)

    def _deliver(self, ticket: Ticket) -> None:
        if (error := _over(ticket)) is not None:
            self._fail(ticket, error)
            return
        result = finish(self._loaded, ticket)
        self.times.note("decode", 1, result.seconds["decode"])
        promise: Promise = "none" if ticket.due is None else "met" if time.perf_counter() <= ticket.due else "missed"
        with suppress(InvalidStateError):  # whoever had it cancelled the future meanwhile
            ticket.done.set_result(result)
            self._tell(Delivered(picture=ticket.number, promise=promise, seconds=result.seconds))

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        """Answer for a picture with an error."""
        when = ticket.when
        with suppress(InvalidStateError):
            ticket.done.set_exception(error)
        if isinstance(error, CancelledError | DeadlineError):
            self._tell(Cancelled(picture=ticket.number, when=when, expired=isinstance(error, DeadlineError)))
        else:
            self._tell(Failed(picture=ticket.number, when=when, error=error))

    def _failed(self, batch: SharedLoop, error: Exception, *, further: Sequence[Ticket] = ()) -> None:
        """A workspace failed: its pictures begin again, fewer at a time or one by one; one alone fails for good."""
        assert self._group is not None
        tickets = list(dict.fromkeys([*batch.drop(), *further]))
        logger.warning("%d pictures were drawn together when an engine failed: %s", len(tickets), error)
        if len(tickets) == 1:
            self._fail(tickets[0], error)
            return
        if isinstance(error, OutOfMemoryError):
            self._most[self._group] = (len(tickets) + 1) // 2 if len(tickets) > 2 else 1
            self._batch = self._shared_loop(self._group)
        for ticket in tickets:
            ticket.begin_again()
            ticket.alone = not isinstance(error, OutOfMemoryError)
        with self._change:
            self._line += tickets

    def _end_all(self) -> None:
        """Cancel whatever has not been drawn."""
        tickets = [*self._tickets(), *(self._batch.tickets if self._batch else ())]
        self._line.clear()
        self._running.clear()
        for ticket in tickets:
            self._fail(ticket, ClosedError("this service was closed before the picture was drawn"))


def _kind(group: Group) -> tuple[str, tuple[int, int], int, tuple[str, ...]]:
    """Return what a stage's time depends on beside its rows."""
    return group.denoiser, group.size, group.tokens, group.controls


def _rows(ticket: Ticket) -> int:
    return 2 if ticket.job.guidance.needed else 1


def _rows_now(ticket: Ticket) -> int:
    assert ticket.picture is not None
    return 2 if ticket.job.guidance.stages[ticket.picture.done] else 1


def _over(ticket: Ticket) -> LatentrtError | None:
    """Return why nobody waits for a picture any more, or None."""
    if ticket.done.cancelled():
        return CancelledError("its future was cancelled")
    try:
        done = ticket.picture.done if ticket.picture else 0
        ticket.limits.check(f"after stage {done} of {ticket.job.plan.stages}" if done else "before the first stage")
    except LatentrtError as error:
        return error
    return None
