"""Which pictures may join those that share stages: by what stages take as measured, and what was promised."""

from __future__ import annotations

import time
from collections.abc import Sequence

from latentrt.runtime.batching.stage_times import Owed, StageTimes, may_join
from latentrt.runtime.batching.ticket import Group, Ticket

Kind = tuple[str, tuple[int, int], int, tuple[str, ...]]


def kind_of(group: Group) -> Kind:
    """Return what a stage's time depends on beside its rows."""
    return group.denoiser, group.size, group.tokens, group.controls


def rows_of(ticket: Ticket) -> int:
    """Return how many model rows a picture has in most of its stages."""
    return 2 if ticket.job.guidance.needed else 1


def rows_now(ticket: Ticket) -> int:
    """Return how many model rows a picture has in its next stage."""
    assert ticket.picture is not None
    return 2 if ticket.job.guidance.stages[ticket.picture.done] else 1


def own_seconds(ticket: Ticket, times: StageTimes) -> float | None:
    """Return what a picture's stages that are left and its decoding take alone; None before any was measured."""
    stage = times.estimate(kind_of(ticket.group), rows_of(ticket))
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
    kind = kind_of(ready[0].group)
    count = may_join(
        [owed(ticket, times) for ticket in drawn],
        [owed(ticket, times) for ticket in ready[:sociable]],
        lambda rows: times.estimate(kind, rows) or 0.0,
        now=time.perf_counter(),
        most=most,
    )
    return ready[:count]
