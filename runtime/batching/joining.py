"""Which pictures may join those that share stages: by what stages take as measured, and what was promised."""

from __future__ import annotations

import time
from collections.abc import Sequence

from latentrt.runtime.batching.stage_times import Owed, StageTimes, may_join
from latentrt.runtime.batching.ticket import Ticket

Kind = tuple[str, tuple[int, int], int, tuple[str, ...]]


def kind_of(tickets: Sequence[Ticket]) -> Kind:
    """Return what the time of a stage of these pictures, of one group all, depends on beside its rows."""
    group, followed = tickets[0].group, {name for ticket in tickets for name in ticket.controls}
    return group.denoiser, group.size, group.tokens, tuple(sorted(followed))


def seconds_of(tickets: Sequence[Ticket], times: StageTimes, rows: int) -> float | None:
    """Return the seconds of a stage of these pictures with some model rows; None before any was measured.

    What it takes to follow ControlNets counts once that was measured.
    """
    *plain, _ = kind = kind_of(tickets)
    found = times.estimate(kind, rows)
    return times.estimate((*plain, ()), rows) if found is None else found


def rows_of(ticket: Ticket) -> int:
    """Return how many model rows a picture has in most of its stages."""
    return 2 if ticket.job.guidance.needed else 1


def rows_now(ticket: Ticket) -> int:
    """Return how many model rows a picture has in its next stage."""
    assert ticket.picture is not None
    return 2 if ticket.job.guidance.stages[ticket.picture.done] else 1


def own_seconds(ticket: Ticket, times: StageTimes) -> float | None:
    """Return what a picture's stages that are left and its decoding take alone; None before any was measured."""
    stage = seconds_of([ticket], times, rows_of(ticket))
    return None if stage is None else ticket.stages_left * stage + (times.estimate("decode", 1) or 0.0)


def owed(ticket: Ticket, times: StageTimes) -> Owed:
    """Return what is left to do for a picture."""
    after = times.estimate("decode", 1) or 0.0
    return Owed(stages=ticket.stages_left, rows=rows_of(ticket), after_s=after, due=ticket.due)


def joining(drawn: Sequence[Ticket], ready: Sequence[Ticket], times: StageTimes, *, most: int) -> Sequence[Ticket]:
    """Return those that join the ones that are drawn, of one group all.

    ready: in the order in which they should; most: pictures in all
    """
    if not ready or any(ticket.alone for ticket in drawn):
        return ()
    if ready[0].alone:
        return () if drawn else ready[:1]
    sociable = next((place for place, ticket in enumerate(ready) if ticket.alone), len(ready))
    count = may_join(
        [owed(ticket, times) for ticket in drawn],
        [owed(ticket, times) for ticket in ready[:sociable]],
        lambda rows: seconds_of([*drawn, *ready], times, rows) or 0.0,
        now=time.perf_counter(),
        most=most,
    )
    return ready[:count]
