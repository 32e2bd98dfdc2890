"""The batcher's own thread: groups take turns, and the pictures of one go from stage to stage together."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from latentrt.engines.errors import (
    ClosedError,
    DeadlineError,
    DeviceLostError,
    LatentrtError,
    NotFiniteError,
    OutOfMemoryError,
)
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.runtime.batching.answers import Answers, over
from latentrt.runtime.batching.beside import Beside, InTurn, explained, finish, prepare
from latentrt.runtime.batching.joining import kind_of, next_stage, order_of, rows_now
from latentrt.runtime.batching.line import Line
from latentrt.runtime.batching.observer import StageDone, Started, Telling, WeightsChanged
from latentrt.runtime.batching.shared_loop import SharedLoop
from latentrt.runtime.batching.stage_times import StageTimes
from latentrt.runtime.batching.ticket import Group, Ticket
from latentrt.runtime.batching.turns import Turns
from latentrt.runtime.calls import Limits
from latentrt.runtime.draw.finite import LATENTS
from latentrt.runtime.loaded import Loaded

logger = logging.getLogger(__name__)
LOOK_S = 0.05  # while there is nothing to draw, those whose time is over are looked for so often
LEAST_TURN_S, TURN_OVER_CHANGE = 0.25, 5.0  # a turn lasts so long, and so many times what changing the weights takes


class DrawingLoop:
    """Draws what is in its line, on a thread of its own, while it has the pipeline's turn.

    slots: pictures that share stages, at the most
    lost: why the device is of no use any more
    """

    def __init__(self, loaded: Loaded, tell: Telling, *, slots: int) -> None:
        self.line, self.times = Line(), StageTimes()
        self.answers = Answers(partial(finish, loaded), self.line, self.times, tell, loaded.turn)
        self.lost: DeviceLostError | None = None
        self._stage_at: float | None = None  # when a stage was finished last, None while it is idle
        self._loaded, self._tell, self._slots = loaded, tell, slots
        self._cores: Callable[[], AbstractContextManager[None]] = InTurn() if loaded.opened.fills_cores else nullcontext
        self._beside = Beside(self.line.change, self._end, self._cores)
        self._group: Group | None = None
        self._batch: SharedLoop | None = None
        self._most: dict[Group, int] = {}  # pictures at a time, where more had no room
        self._turns: Turns[Group] = Turns(lambda _: max(LEAST_TURN_S, TURN_OVER_CHANGE * self._adapt_s))
        self._adapt_s = 0.0
        self._closed, self._process = False, os.getpid()
        self._thread = threading.Thread(target=self._run, name="latentrt-batch", daemon=True)
        self._thread.start()

    @property
    def drawn(self) -> list[Ticket]:
        """Return the pictures that share their stages now."""
        batch = self._batch  # read once: other threads ask too
        return list(batch.tickets) if batch else []

    @property
    def progress_at(self) -> float | None:
        """Return when a stage, or something beside the stages, was finished last; None while it is idle."""
        at = self._stage_at
        return None if at is None else max(at, self._beside.ended_at)

    @property
    def forked(self) -> bool:
        """Tell whether this process was forked from the one that draws: then a lock may be held for ever here."""
        return os.getpid() != self._process

    @property
    def busy(self) -> bool:
        """Tell whether a picture is owed, or something is done for one that was."""
        return bool(self.line.owed or self._beside.under_way)

    def close(self) -> None:
        """End the thread; whatever is not drawn yet is cancelled."""
        with self.line.change:
            self._closed = True
            self.line.change.notify_all()
        self._thread.join()
        self._beside.close()

    def _run(self) -> None:
        change = self.line.change
        while not self._closed:
            with change:
                self._stage_at = None
                change.notify_all()  # who waits until nothing is owed
                change.wait_for(lambda: self._closed or self.busy)
                self._stage_at = time.perf_counter()
            if self._take_turn():
                try:
                    self._draw_all()
                finally:
                    self._loaded.turn.give_back()
        self._end_all(ClosedError("this service was closed before the picture was drawn"))

    def _take_turn(self) -> bool:
        """Wait for the pipeline's turn and take it; return False where nobody waits for a picture any more.

        Another call may have it for long: whose time is over meanwhile is told so.
        """
        while self.busy and not self._closed:
            self._end_those_over(self.line.tickets)
            with suppress(DeadlineError):
                self._loaded.turn.take(Limits(deadline=LOOK_S))
                return True
        return False

    def _end_those_over(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if (error := over(ticket)) is not None:
                self._end(ticket, error)

    def _draw_all(self) -> None:
        """Draw until there is nothing to draw. The weights may be others' from one time to the next."""
        self._group, self._batch = None, None
        while self.busy and not self._closed:
            try:
                if self.lost is None:
                    self._once()
            except BaseException as error:
                self._failed(error)
            if self.lost is not None:
                self._end_all(self.lost)
                self._wait()

    def _once(self) -> None:
        """Do what there is to do before a stage, and the stage."""
        self._end_those_over([*self.line.tickets, *self.drawn])
        chosen = self._turns.choose(self._groups())
        if chosen is not None and chosen != self._group:
            self._switch(chosen)
        self._prepare()
        self._join()
        if self._batch is not None and self._batch.tickets:
            self._advance(self._batch)
        else:
            self._wait()

    def _wait(self) -> None:
        """Wait until something is prepared or decoded, or another request comes."""
        with self.line.change:
            if self._beside.under_way and not self._closed:
                self.line.change.wait(LOOK_S)

    # Weights and turns.

    def _groups(self) -> list[Group]:
        """Return the groups that have something to draw, the one that is drawn first."""
        own = [self._group] if self._group and self.drawn else []
        return list(dict.fromkeys([*own, *self.line.groups()]))

    def _switch(self, group: Group) -> None:
        """Let another group draw, with its weights: what is under way with others ends first."""
        if self._batch is not None:
            self.line.add(*self._batch.park())
        weights = None if self._group is None else self._group.weights
        self._group, self._batch = None, None  # nobody draws before the weights are known to be the group's
        if weights != group.weights and not self._change_weights(group):
            return
        self._group, self._batch = group, self._shared_loop(group)

    def _change_weights(self, group: Group) -> bool:
        """Change the weights to a group's; where that fails, end all that need them and return False."""
        with self.line.change:
            self.line.change.wait_for(lambda: not self._beside.under_way)
            own = [ticket for ticket in self.line.tickets if ticket.group.weights == group.weights]
        try:
            taken = self._loaded.adapt(own[0].changes) if own else 0.0
        except LatentrtError as error:
            for ticket in own:
                self._end(ticket, error)
            return False
        self._adapt_s, self._stage_at = taken or self._adapt_s, time.perf_counter()
        if taken:
            self._tell(WeightsChanged(seconds=taken))
        return bool(own)

    def _shared_loop(self, group: Group) -> SharedLoop:
        counts = self._loaded.opened.slot_counts(_shape(group, self._most_of(group)))
        counts = counts or doubling(self._most_of(group))
        return SharedLoop(partial(self._workspace, group), self._loaded.drawing, counts)

    def _most_of(self, group: Group) -> int:
        return self._most.get(group, self._slots)

    def _workspace(self, group: Group, slots: int) -> Workspace:
        return self._loaded.opened.workspace(
            self._loaded.manifest.latents,
            _shape(group, slots),
            state_rows=group.state_rows,
            denoiser=group.denoiser,
            decoder=None,
        )

    # Joining.

    def _prepare(self) -> None:
        """Have the next pictures encoded beside the loop, as many as can join soon; first the group that draws.

        Others come after them, however urgent: their turn may only come once the group has had its own.
        """
        if self._group is None:
            return
        group = self._group
        own = [one for one in self.line.tickets if not paused(one) and one.group.weights == group.weights]
        if all(ticket.preparing for ticket in own):
            return
        own.sort(key=lambda ticket: (ticket.group != group, order_of(ticket, self.times)))
        for ticket in own[: 2 * self._slots]:
            if not ticket.preparing:
                ticket.preparing = True
                self._beside.encode(partial(prepare, self._loaded), ticket)

    def _join(self) -> None:
        """Have those share the next stage that promises allow: some join, and some may have to make way for them."""
        if self._batch is None or self._group is None:
            return
        most, drawn = min(self._most_of(self._group), self._batch.capacity), self.drawn
        chosen = next_stage(drawn, self.line.of(self._group), self.times, most=most)
        for ticket in drawn:
            if ticket not in chosen:
                self._batch.leave(ticket, keep=True)
                self.line.add(ticket)
        joining, now = [one for one in chosen if one not in drawn], time.perf_counter()
        for ticket in joining:
            if ticket.began is None:
                ticket.began = now
                self._tell(Started(picture=ticket.number, wait_s=now - ticket.limits.began))
        if joining or self._batch.loose:
            self._take(self._batch, joining)

    def _take(self, batch: SharedLoop, tickets: Sequence[Ticket]) -> None:
        """Have pictures of the line share stages from the next one on."""
        self.line.remove(*tickets)
        try:
            batch.join(tickets)
        except BaseException as error:
            self._failed(error, further=tickets)

    # Stages.

    def _advance(self, batch: SharedLoop) -> None:
        kind, rows = kind_of(batch.tickets), sum(rows_now(ticket) for ticket in batch.tickets)
        with self._cores():
            seconds = batch.advance()
        self.times.note(kind, rows, seconds)
        self._turns.charge(seconds)
        self._stage_at = time.perf_counter()
        pictures, padded = len(batch.tickets), batch.rows - rows
        groups = self._loaded.manifest.row_groups(batch.tickets[0].group.denoiser)
        capacity = groups * min(self._slots, batch.capacity)
        self._tell(StageDone(pictures=pictures, used=rows, padded=padded, capacity=capacity, seconds=seconds))
        for ticket in list(batch.tickets):
            ticket.step_seconds.append(seconds)
            if self._shown(batch, ticket):
                self._send_on(batch, ticket)

    def _shown(self, batch: SharedLoop, ticket: Ticket) -> bool:
        """Show a picture's stage; where nothing can become of the picture, answer for it and return False."""
        assert ticket.picture is not None
        if batch.lost(ticket):
            lost = NotFiniteError(LATENTS, (0,), stage=ticket.picture.done, stages=ticket.job.plan.stages)
            self._end(ticket, explained(self._loaded, ticket, lost))
            return False
        if ticket.on_step is None:
            return True
        try:
            with batch.step(ticket) as step:
                ticket.on_step(step)
        except BaseException as error:
            self._end(ticket, error)
            return False
        return True

    def _send_on(self, batch: SharedLoop, ticket: Ticket) -> None:
        """Send a picture on where its stages, or those of its part, are done."""
        assert ticket.picture is not None
        if ticket.picture.done < ticket.part.stages.stop:
            return
        batch.leave(ticket, keep=True)
        if ticket.picture.part + 1 < len(ticket.job.ranges):
            ticket.picture.part += 1
            self.line.add(ticket)
        else:
            self._beside.decode(self.answers.deliver, ticket)

    # Failures.

    def _end(self, ticket: Ticket, error: BaseException) -> None:
        """Take a picture from wherever it is, and answer for it."""
        batch = self._batch  # read once: the threads beside the loop end pictures too
        if isinstance(error, DeviceLostError):
            self.lost = self.lost or error
        elif batch is not None and ticket in batch.tickets:
            batch.leave(ticket, keep=False)
        self.line.remove(ticket)
        self.answers.fail(ticket, error)

    def _failed(self, error: BaseException, *, further: Sequence[Ticket] = ()) -> None:
        """An engine failed: who drew on it begins again, fewer at a time or one by one; one alone fails for good.

        Where nobody drew, it is nobody's in particular, and everybody's.
        """
        tickets = list(dict.fromkeys([*(self._batch.drop() if self._batch else ()), *further]))
        logger.warning("%d pictures were drawn together when an engine failed: %s", len(tickets), error)
        if isinstance(error, DeviceLostError):
            self.lost = self.lost or error
        if isinstance(error, DeviceLostError) or len(tickets) == 1:
            for ticket in tickets:
                self.answers.fail(ticket, error)
        elif tickets:
            self._draw_again(tickets, fewer=isinstance(error, OutOfMemoryError))
        else:
            self._end_all(error)

    def _draw_again(self, tickets: Sequence[Ticket], *, fewer: bool) -> None:
        """Let pictures begin again. fewer: half as many at a time; else each is tried alone, once"""
        if fewer and self._group is not None:
            self._most[self._group] = (len(tickets) + 1) // 2 if len(tickets) > 2 else 1
            self._group, self._batch = None, None  # it is looked for a workspace for fewer when they have their turn
        for ticket in tickets:
            ticket.begin_again()
            ticket.alone = not fewer
        self.line.add(*tickets)

    def _end_all(self, error: BaseException) -> None:
        """Answer for whatever has not been drawn."""
        dropped = self._batch.drop() if self._batch else []
        for ticket in [*dropped, *self.line.tickets]:
            self.line.remove(ticket)
            self.answers.fail(ticket, error)


def paused(ticket: Ticket) -> bool:
    """Tell whether a picture of the line has begun, and can go on as it is."""
    return ticket.began is not None and ticket.picture is not None


def _shape(group: Group, slots: int) -> WorkspaceShape:
    width, height = group.size
    return WorkspaceShape(pictures=slots, tokens=group.tokens, width=width, height=height)


def doubling(most: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … and `most`: where any number of slots will do, few are in use, and few workspaces are made."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)
