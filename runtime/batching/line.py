"""The pictures that are owed and share no stages now: those that wait, and those of groups whose turn it is not."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from latentrt.runtime.batching.ticket import Group, Ticket
from latentrt.runtime.result import Result


class Line:
    """Where pictures wait. `change` is held while it is changed, and notified when something is to be looked at.

    waiting: prepared or not, in the order in which they came; parked: with the states that they have come to
    owed: how many pictures have no answer yet, wherever they are
    """

    def __init__(self) -> None:
        self.change = threading.Condition()
        self.owed = 0
        self.waiting: list[Ticket] = []
        self.parked: dict[Group, list[Ticket]] = {}

    @property
    def tickets(self) -> list[Ticket]:
        """Return all of them."""
        return [*self.waiting, *(ticket for tickets in self.parked.values() for ticket in tickets)]

    def add(self, *tickets: Ticket) -> None:
        """Let pictures wait."""
        with self.change:
            self.waiting += tickets
            self.change.notify_all()

    def park(self, group: Group, tickets: list[Ticket]) -> None:
        """Keep the pictures of a group whose turn is over."""
        with self.change:
            self.parked[group] = tickets

    def remove(self, *tickets: Ticket) -> None:
        """Take pictures out, wherever they are."""
        with self.change:
            self.waiting = [one for one in self.waiting if one not in tickets]
            parked = {group: [one for one in others if one not in tickets] for group, others in self.parked.items()}
            self.parked = {group: others for group, others in parked.items() if others}

    def groups(self) -> list[Group]:
        """Return the groups that there are pictures of, the one that comes first first."""
        with self.change:
            line = sorted(self.waiting, key=lambda ticket: ticket.urgency)
            return list(dict.fromkeys([*self.parked, *(ticket.group for ticket in line)]))

    def of(self, group: Group) -> list[Ticket]:
        """Return the pictures of a group that can be drawn as they are, the one that comes first first."""
        with self.change:
            own = [one for one in self.waiting if one.picture is not None and one.group == group]
        return sorted(own, key=lambda ticket: ticket.urgency)

    def position(self, future: Future[Result]) -> int | None:
        """Return the place of a picture that has not begun, from 1 up; None if it is not there."""
        with self.change:
            line = [one for one in self.waiting if one.began is None]
        line.sort(key=lambda ticket: ticket.urgency)
        return next((place for place, ticket in enumerate(line, start=1) if ticket.done is future), None)
