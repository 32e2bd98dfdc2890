"""Whose turn it is where groups of pictures cannot be drawn together: deficit round robin.

M. Shreedhar, G. Varghese: Efficient Fair Queuing Using Deficit Round Robin, SIGCOMM 1995.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, TypeVar

Group = TypeVar("Group")


class Turns(Generic[Group]):
    """Gives groups their turns so that, over time, each that has work gets the same seconds.

    quantum: the seconds that a turn of a group gives it
    """

    def __init__(self, quantum: Callable[[Group], float]) -> None:
        self._quantum = quantum
        self._deficits: dict[Group, float] = {}  # in the order of the next turns
        self.current: Group | None = None

    def choose(self, groups: Collection[Group]) -> Group | None:
        """Return the group that draws next, of those that have work: the current one until its turn is over.

        groups: in the order in which they came; None where there are none
        """
        for group in [known for known in self._deficits if known not in groups]:
            del self._deficits[group]  # who has nothing to do saves nothing up
        for group in groups:
            self._deficits.setdefault(group, 0.0)
        if not groups:
            self.current = None
        elif self.current is None or self.current not in groups or self._is_over(self.current, groups):
            self._next()
        return self.current

    def _is_over(self, group: Group, groups: Collection[Group]) -> bool:
        return len(groups) > 1 and self._deficits[group] <= 0

    def _next(self) -> None:
        while True:
            group = next(iter(self._deficits))
            deficit = self._deficits.pop(group) + self._quantum(group)
            self._deficits[group] = deficit
            if deficit > 0:
                self.current = group
                return

    def charge(self, seconds: float) -> None:
        """Count seconds that the current group was drawn for."""
        if self.current is not None and self.current in self._deficits:
            self._deficits[self.current] -= seconds
