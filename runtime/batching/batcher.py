"""Continuous batching: one thread takes the pictures of many requests from stage to stage together.

Requests join at the next stage and leave when their own plan ends. Prompts are encoded and pictures decoded on threads
of their own, beside the loop. Groups that cannot be drawn together take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import msgspec

from latentrt.engines.errors import (
    ClosedError,
    DeviceLostError,
    DrainingError,
    EngineError,
    LatentrtError,
    QueueFullError,
    RequestError,
)
from latentrt.engines.lora.weight_changes import Changes
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.runtime.batching.drawing_loop import DrawingLoop
from latentrt.runtime.batching.joining import owed, own_seconds, seconds_of
from latentrt.runtime.batching.observer import Admitted, Observer, Reason, Refused, Telling
from latentrt.runtime.batching.stage_times import delivery_times
from latentrt.runtime.batching.ticket import Ticket, single
from latentrt.runtime.calls import Cancellation, Limits
from latentrt.runtime.draw.job import Job, resolve
from latentrt.runtime.draw.step import OnStep, Step
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result

OnPicture = Callable[[int, Step], None]


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
        """Begin to wait for requests. observer: is told what happens, see `observer.Event`

        Raises RequestError on options that leave no room for a picture.
        """
        self.options = options or BatcherOptions()
        if min(self.options.slots, self.options.waiting) < 1:
            raise RequestError(
                f"slots, waiting: found {self.options.slots} and {self.options.waiting}, expected 1 or more of each"
            )
        self._loaded = pipe.loaded
        self._tell = Telling(observer)
        self._loop = DrawingLoop(pipe.loaded, self._tell, slots=self.options.slots)
        self._line, self.times = self._loop.line, self._loop.times
        self._count = 0
        self._draining = self._closed = False
        self._held = 0  # blocks that wait until nothing is drawn, or run then

    def submit(
        self, request: Request, *, on_step: OnPicture | None = None, cancel: Cancellation | None = None
    ) -> list[Future[Result]]:
        """Have a request drawn; return what comes of each of its pictures, in order.

        on_step: called after each stage of each picture with the picture's number, from 0, and its step, on the
            batcher's thread: it must be quick
        cancel: ends all of the request's pictures within a stage
        Raises RequestError, of its kinds QueueFullError and DrainingError where nothing is wrong with the request, and
        ClosedError, also in a process that was forked from the one that draws.
        """
        if self._loop.forked:
            raise ClosedError("this service draws in the process that this one was forked from; make a new one here")
        limits = Limits.of(request, cancel)
        job = resolve(request, self._loaded.manifest)
        if len(job.prompts) > self.options.waiting:
            raise RequestError(f"n: found {len(job.prompts)} pictures, expected {self.options.waiting} at the most")
        changes = self._loaded.loras.changes(job.request.loras)
        jobs = [single(job, picture) for picture in range(len(job.prompts))]
        tokens = [self._loaded.tokens(one) for one in jobs]
        self._check_engines(jobs[0], tokens[0])
        with self._line.change:
            refused = self._refusal(len(jobs))
            tickets = [
                self._ticket(one, length, changes, limits, partial(on_step, picture) if on_step else None)
                for picture, (one, length) in enumerate(zip(jobs, tokens, strict=True))
                if refused is None
            ]
            waiting = len(self._line.waiting) + len(tickets)
            for ticket in tickets:  # before anything can become of them
                self._tell(Admitted(picture=ticket.number, waiting=waiting))
            self._line.owed += len(tickets)
            self._line.add(*tickets)
        if refused is not None:
            self._tell(Refused(reason=refused[0], pictures=len(jobs)))
            raise refused[1]
        return [ticket.done for ticket in tickets]

    def _check_engines(self, job: Job, tokens: Mapping[str, int]) -> None:
        """Refuse a picture for which no engine is compiled, whatever number of slots it has."""
        (width, height), pictures = job.size, self.options.slots
        for part in job.ranges:
            length = tokens[part.denoiser]
            shape = WorkspaceShape(pictures=pictures, tokens=length, width=width, height=height)
            try:
                self._loaded.opened.slot_counts(shape)
            except EngineError as error:
                raise RequestError(f"size: {error}") from None

    def _ticket(
        self,
        job: Job,
        tokens: Mapping[str, int],
        changes: Mapping[str, Changes],
        limits: Limits,
        on_step: OnStep | None,
    ) -> Ticket:
        self._count += 1
        ticket = Ticket(
            number=self._count,
            job=job,
            tokens=tokens,
            changes=changes,
            limits=limits,
            on_step=on_step,
            mixes=self._loaded.opened.picks_rows,
        )
        ticket.due = self._promise(ticket)
        return ticket

    def _refusal(self, pictures: int) -> tuple[Reason, LatentrtError] | None:
        """Return why a request cannot be taken now, in a word and as the error."""
        waiting = len(self._line.waiting)
        if self._closed:
            return "closed", ClosedError("this service is closed")
        if self._loop.lost is not None:
            return "lost", DeviceLostError(str(self._loop.lost))
        if self._draining or self._held:
            words = "this service takes no requests now, and ends those it has; try again, or ask another one"
            return "draining", DrainingError(words)
        if waiting + pictures > self.options.waiting:
            wait = self.expected_wait_s()
            words = f"{waiting} pictures wait and {self.options.waiting} may; try again in {wait:.0f} s"
            return "full", QueueFullError(words, retry_after_s=wait)
        return None

    def _promise(self, ticket: Ticket) -> float | None:
        """Return the moment that a picture is promised for: its own deadline's, or the service's."""
        moments = []
        if ticket.limits.deadline is not None:
            moments.append(ticket.limits.began + ticket.limits.deadline)
        own = own_seconds(ticket, self.times)
        if self.options.slo is not None and own is not None:
            moments.append(ticket.limits.began + self.options.slo * own)
        return min(moments, default=None)

    def expected_wait_s(self) -> float:
        """Return the seconds until a place in the line is likely to be free, 1 at the least.

        That is when the first of those that are drawn ends, by measured stage times.
        """
        drawn = self._loop.drawn
        if not drawn:
            return 1.0
        ends = delivery_times(
            [owed(ticket, self.times) for ticket in drawn],
            lambda rows: seconds_of(drawn, self.times, rows) or 0.0,
            now=0.0,
        )
        return max(1.0, min(ends))

    def estimate(self, request: Request) -> float | None:
        """Return the seconds that drawing a request's pictures one by one would take; None before any was drawn.

        By measured stage times, and without the wait for others. Raises RequestError on what cannot be drawn.
        """
        job = resolve(request, self._loaded.manifest)
        changes = self._loaded.loras.changes(job.request.loras)
        one = single(job, 0)
        ticket = Ticket(number=0, job=one, tokens=self._loaded.tokens(one), changes=changes, limits=Limits())
        own = own_seconds(ticket, self.times)
        return None if own is None else own * len(job.prompts)

    def position(self, future: Future[Result]) -> int | None:
        """Return the place of a picture in the line, from 1 up; None if it does not wait, or not any more.

        Pictures that cannot share stages take turns, so that one may overtake another.
        """
        return self._line.position(future)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no further requests, and wait until all that were taken are answered.

        timeout_s: how long to wait for that at the most, None for as long as it takes
        Returns whether they are.
        """
        self._draining = True
        return self._quiet(timeout_s)

    def _quiet(self, timeout_s: float | None) -> bool:
        with self._line.change:
            return self._line.change.wait_for(lambda: not self._loop.busy, timeout_s)

    @contextmanager
    def hold(self, timeout_s: float | None = None) -> Iterator[bool]:
        """Take no requests while a block runs, which begins once all that were taken are answered.

        The pipeline is the block's alone: it may be changed, tested, or closed together with the batcher.
        timeout_s: as for `drain`, whose answer the block is given: where it is False, some are still being drawn
        """
        with self._line.change:
            self._held += 1
        try:
            yield self._quiet(timeout_s)
        finally:
            with self._line.change:
                self._held -= 1

    def close(self) -> None:
        """End the thread; whatever is not drawn yet is cancelled. The loaded bundle stays open."""
        if self._loop.forked:
            return
        with self._line.change:
            self._closed = True
        self._loop.close()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Return how many pictures wait to begin."""
        return len(self._line.waiting)

    @property
    def lost(self) -> DeviceLostError | None:
        """Return why the device is of no use any more, None while it is."""
        return self._loop.lost

    @property
    def last_stage_at(self) -> float:
        """Return when a stage was last finished, or a picture encoded or decoded, or there was nothing to do.

        On the clock of `time.perf_counter`. While there is something to draw and this stays, drawing hangs, or another
        call of the pipeline draws.
        """
        at = self._loop.progress_at
        return time.perf_counter() if at is None else at

    @property
    def busy(self) -> bool:
        """Tell whether a picture is owed: one that waits, is being drawn, or is decoded."""
        return self._loop.busy

    @property
    def drawing(self) -> int:
        """Return how many pictures have begun: those that share stages, and those that are paused."""
        return len(self._loop.drawn) + self._line.paused
