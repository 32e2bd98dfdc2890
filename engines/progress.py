"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # only a terminal needs rich; a service that imports the runtime does not load it
    from rich.progress import Progress, TaskID

Report = Callable[[str, int, int], None]
"""Called with (what, done, total): with done = 0 when a unit of work starts, and with done = total at its end."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def terminal_report(*, quiet: bool = False) -> Iterator[Report]:
    """Give a report that draws bars on stderr if it is a terminal, and otherwise writes a line for each unit."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield _bar_report(progress)
    else:
        yield _line_report()


def _bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _bar_report(progress: Progress) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    return report


def _line_report() -> Report:
    started: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in started:
            started[what] = time.perf_counter()
            sys.stderr.write(f"{what} …\n")
        if done >= total:
            sys.stderr.write(f"{what}: done in {time.perf_counter() - started.pop(what):.1f} s\n")
        sys.stderr.flush()

    return report
