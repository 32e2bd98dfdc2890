"""Pictures that share their stages: each has a slot of one workspace, and they come and go between two stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from latentrt.engines.workspace.contract import STATE, Event, Workspace
from latentrt.runtime.batching.ticket import Ticket
from latentrt.runtime.draw.denoise import Batch, Loop
from latentrt.runtime.draw.draw import Drawing
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.draw.step import Step
from latentrt.runtime.sampling.plan import DenoiserRange

Make = Callable[[int], Workspace]
"""gives a blank workspace with so many slots"""


class SharedLoop:
    """The pictures of one group, on a workspace with as many slots as they need.

    counts: the numbers of slots that a workspace can have, from the least to the most
    """

    def __init__(self, make: Make, drawing: Drawing, counts: Sequence[int]) -> None:
        self._make, self._drawing, self._counts = make, drawing, tuple(counts)
        self._workspace: Workspace | None = None
        self._loop: Loop | None = None
        self._events: list[Event] = []
        self.tickets: list[Ticket] = []

    @property
    def capacity(self) -> int:
        """Return how many pictures there can be."""
        return self._counts[-1]

    @property
    def loose(self) -> bool:
        """Tell whether slots that nobody needs are computed, and a smaller workspace would do."""
        return self._workspace is not None and not self._suits(self._workspace, self._slots_for(len(self.tickets)))

    def _slots_for(self, pictures: int) -> int:
        return next((count for count in self._counts if count >= pictures), self._counts[-1])

    def join(self, tickets: Sequence[Ticket]) -> None:
        """Let pictures take part from the next stage on, and fit the workspace to those that there are.

        Raises EngineError; then `drop` gives them all, those that are not on the workspace yet too.
        """
        slots = self._slots_for(len(self.tickets) + len(tickets))
        if self._workspace is None or not self._suits(self._workspace, slots):
            tickets = [*self.park(), *tickets]
        self.tickets += tickets
        if self._workspace is None and tickets:
            self._workspace = self._make(slots)
        if self._workspace is not None and self._loop is None:
            self._loop = Loop(self._workspace, tickets[0].part.denoiser)
        # Negative prompts' rows come last: the fewer slots lie between the guided ones, the fewer rows are computed.
        for ticket in sorted(tickets, key=lambda ticket: -ticket.job.guidance.most):
            self._place(ticket)

    def _suits(self, workspace: Workspace, slots: int) -> bool:
        """Tell whether a workspace is one for so many pictures: empty slots cost nothing but on a device."""
        return workspace.shape.pictures == slots or (workspace.local and workspace.shape.pictures > slots)

    def _place(self, ticket: Ticket) -> None:
        """Write a picture to a free slot, with the state that it has come to."""
        assert self._workspace is not None and self._loop is not None and ticket.picture is not None
        taken = {batch.slots.start for batch in self._loop.batches}
        slot = next(slot for slot in range(self._workspace.shape.pictures) if slot not in taken)
        picture, part, slots = ticket.picture, ticket.part, slice(slot, slot + 1)
        for name, array in picture.texts[part.denoiser].items():
            write_rows(self._workspace, name, array, slots)
        left = DenoiserRange(denoiser=part.denoiser, stages=range(picture.done, part.stages.stop))
        batch = self._drawing.seat(ticket.job, left, picture.inputs, self._workspace, picture.draw, slots=slots)
        picture.batch = batch
        self._loop.join(batch)

    def advance(self) -> float:
        """Take one stage of every picture. Returns the seconds of the last stage that is known to be done.

        A device is given one stage ahead, so that it never waits. Raises EngineError.
        """
        assert self._workspace is not None and self._loop is not None
        events = self._events
        if not events or not self._workspace.queued:  # what lies between two stages is no part of them
            events.append(self._workspace.event())
        self._loop.advance()
        events.append(self._workspace.event())
        for ticket in self.tickets:
            assert ticket.picture is not None
            ticket.picture.done = batch_of(ticket).done
        del events[:-3]
        later = -2 if self._workspace.queued and len(events) > 2 else -1
        return events[later].since(events[later - 1])

    @property
    def rows(self) -> int:
        """Return how many model rows the last stage computed."""
        assert self._loop is not None
        return self._loop.rows

    def lost(self, ticket: Ticket) -> bool:
        """Tell whether a picture's numbers are known to have left the range of floats."""
        assert self._loop is not None
        return bool(self._loop.lost(batch_of(ticket)))

    @contextmanager
    def step(self, ticket: Ticket) -> Iterator[Step]:
        """Show the stage of a picture that is done."""
        assert self._workspace is not None and ticket.picture is not None
        picture = ticket.picture
        with self._drawing.step(
            ticket.job, batch_of(ticket), self._workspace, picture.draw, keeps="known" in picture.inputs
        ) as step:
            yield step

    def leave(self, ticket: Ticket, *, keep: bool) -> None:
        """Free a picture's slot. keep: its state is read first, so that it can be finished, or go on elsewhere"""
        assert self._workspace is not None and self._loop is not None and ticket.picture is not None
        if keep:
            self._keep(ticket)
        self._loop.leave(batch_of(ticket))
        ticket.picture.batch = None
        self.tickets.remove(ticket)

    def _keep(self, ticket: Ticket) -> None:
        assert self._workspace is not None and ticket.picture is not None
        ticket.picture.inputs[STATE] = self._workspace.read(STATE, batch_of(ticket).slots)

    def park(self) -> list[Ticket]:
        """Take every picture off the workspace, with the state that it has come to; return them.

        Raises EngineError; then none has left.
        """
        for ticket in self.tickets:
            self._keep(ticket)
        return self.drop()

    def drop(self) -> list[Ticket]:
        """Forget the workspace as it is, and return the pictures that were on it: they have to begin again."""
        dropped, self.tickets = self.tickets, []
        self._workspace, self._loop = None, None
        self._events.clear()
        return dropped


def batch_of(ticket: Ticket) -> Batch:
    """Return the way of a picture that is on a workspace."""
    assert ticket.picture is not None and ticket.picture.batch is not None
    return ticket.picture.batch
