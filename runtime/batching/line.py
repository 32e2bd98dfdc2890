"""The pictures that are owed and share no stages now: those that wait to begin, and those that are paused."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from latentrt.runtime.batching.ticket import Group, Ticket
from latentrt.runtime.result import Result


class Line:
    """Where pictures wait. `change` is held while it is changed, and notified when something is to be looked at.

    tickets: all of them, prepared or not, in the order in which they came; paused ones with the state they have come to
    owed: how many pictures have no answer yet, wherever they are
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.owed = 0
        self.tickets: list[Ticket] = []

    @property
    def waiting(self) -> list[Ticket]:
        """Return those that have not begun, in the order in which they came."""
        return [ticket for ticket in self.tickets if ticket.began is None]

    @property
    def paused(self) -> int:
        """Return how many have begun: others were more urgent, or their group's turn is over."""
        return sum(ticket.began is not None for ticket in self.tickets)

    def add(self, *tickets: Ticket) -> None:
        """Let pictures wait."""
        with self.change:
            self.tickets = [*self.tickets, *tickets]  # other threads read it meanwhile
            self.change.notify_all()

    def remove(self, *tickets: Ticket) -> None:
        """Take pictures out."""
        with self.change:
            self.tickets = [one for one in self.tickets if one not in tickets]

    def groups(self) -> list[Group]:
        """Return the groups that there are pictures of, the one that comes first first."""
        line = sorted(self.tickets, key=lambda ticket: ticket.urgency)
        return list(dict.fromkeys(ticket.group for ticket in line))

    def of(self, group: Group) -> list[Ticket]:
        """Return the pictures of a group that can be drawn as they are."""
        return [one for one in self.tickets if one.picture is not None and one.group == group]

    def position(self, future: Future[Result]) -> int | None:
        """Return the place of a picture that has not begun, from 1 up; None if it is not there."""
        line = sorted(self.waiting, key=lambda ticket: ticket.urgency)
        return next((place for place, ticket in enumerate(line, start=1) if ticket.done is future), None)
