"""Which pictures share the next stage: by what stages take as measured, and what was promised."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

from latentrt.runtime.batching.stage_times import Owed, StageTimes, rank, sharing
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


def rows_now(ticket: Ticket) -> int:
    """Return how many model rows a picture has in its next stage."""
    assert ticket.picture is not None
    return int(ticket.job.guidance.groups[ticket.picture.done])


def own_seconds(ticket: Ticket, times: StageTimes) -> float | None:
    """Return what a picture's stages that are left and its decoding take alone; None before any was measured."""
    stage = seconds_of([ticket], times, ticket.rows)
    return None if stage is None else ticket.stages_left * stage + (times.estimate("decode", 1) or 0.0)


def owed(ticket: Ticket, times: StageTimes) -> Owed:
    """Return what is left to do for a picture."""
    return Owed(
        stages=ticket.stages_left,
        rows=ticket.rows,
        after_s=times.estimate("decode", 1) or 0.0,
        due=ticket.due,
        urgency=ticket.urgency,
        begun=ticket.began is not None,
        alone=ticket.alone,
    )


def order_of(ticket: Ticket, times: StageTimes) -> tuple[int, tuple[float, int]]:
    """Return what puts those that wait in the order in which they may begin."""
    alone_s = seconds_of([ticket], times, ticket.rows) or 0.0
    return rank(owed(ticket, times), alone_s, now=time.perf_counter())


def next_stage(drawn: Sequence[Ticket], ready: Sequence[Ticket], times: StageTimes, *, most: int) -> list[Ticket]:
    """Return those that share the next stage, of the ones that are drawn and the ones that are ready, of one group all.

    most: pictures in all
    """
    if not ready:
        return list(drawn)
    tickets = [*drawn, *ready]

    @cache
    def seconds(rows: int) -> float:
        return seconds_of(tickets, times, rows) or 0.0

    running, waiting = ([owed(ticket, times) for ticket in some] for some in (drawn, ready))
    return [tickets[place] for place in sharing(running, waiting, seconds, now=time.perf_counter(), most=most)]
