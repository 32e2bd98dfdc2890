"""Rows are capped by the tightest promise that can be kept: as a batcher draws, and in a line that is played.

Stage times are given, so that what is decided depends on no machine.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt import Batcher, BatcherOptions, Pipeline, Step
from latentrt.runtime.batching.observer import Event, StageDone, Started
from latentrt.runtime.batching.stage_times import Owed, StageTimes, may_share, sharing
from tests.test_batcher import WAIT_S, answer, asked, together


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def measured(monkeypatch: pytest.MonkeyPatch, per_row: float) -> None:
    """Let stages have been measured: ten seconds, and so many for each row. No promise is near what the test takes."""
    monkeypatch.setattr(StageTimes, "estimate", lambda _, kind, rows: 0.0 if kind == "decode" else 10 + per_row * rows)


def third_stage(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: BatcherOptions, **asks: Any) -> int:
    """Draw five pictures, all prepared by the first one's second stage; return how many share its third."""
    told: list[Event] = []
    with Batcher(pipe, options, observer=told.append) as batcher:
        together(monkeypatch, batcher, [asked(seed, steps=12, sampler="euler", **asks) for seed in range(5)])
    return [event.pictures for event in told if isinstance(event, StageDone)][2]


@pytest.mark.parametrize(
    ("per_row", "slo", "most"),
    [
        (10.0, 1.2, 1),  # a stage of two takes 50 s, of one 30: with ten stages left nobody else may join
        (10.0, 1.7, 2),  # of three it takes 70
        (0.0, 1.2, 4),  # others cost nothing
        (10.0, None, 4),  # nothing is promised
        (10.0, 0.5, 4),  # what cannot be kept binds nobody
    ],
)
def test_rows_stay_below_the_slots_where_a_promise_would_break(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, per_row: float, slo: float | None, most: int
) -> None:
    measured(monkeypatch, per_row)
    assert third_stage(pipe, monkeypatch, BatcherOptions(slots=4, slo=slo)) == most


@pytest.mark.parametrize(("slack_s", "most"), [(60.0, 1), (260.0, 2), (-120.0, 4)])
def test_a_deadline_is_a_promise_too(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, slack_s: float, most: int
) -> None:
    measured(monkeypatch, 10.0)
    assert third_stage(pipe, monkeypatch, BatcherOptions(slots=4), deadline=12 * 30 + slack_s) == most


def test_a_short_picture_overtakes_the_long_ones_that_wait(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones came first: one is drawn, the others wait for the other slot, and the short one gets it."""
    measured(monkeypatch, 0.0)
    begun, all_asked, told = threading.Event(), threading.Event(), list[Event]()

    def hold(_: int, step: Step) -> None:
        begun.set()
        assert all_asked.wait(WAIT_S)

    with Batcher(pipe, BatcherOptions(slots=2, slo=5), observer=told.append) as batcher:
        futures = batcher.submit(asked(1, steps=50), on_step=hold)
        assert begun.wait(WAIT_S)
        for seed, steps in ((2, 50), (3, 20), (4, 4), (5, 50)):
            futures += batcher.submit(asked(seed, steps=steps))
        assert [batcher.position(future) for future in futures[1:]] == [3, 2, 1, 4]
        all_asked.set()
        for future in futures:
            answer(future)
    assert [event.picture for event in told if isinstance(event, Started)] == [1, 4, 3, 2, 5]


def seconds(rows: int) -> float:
    """What a guided stage of the demo takes on a CPU, measured at 1 to 8 pictures: 7.4 ms alone, 38 ms of eight."""
    return 0.003 + 0.00437 * rows / 2


class Played:
    """A line of pictures with steps, promised after k times their own time, played stage by stage in seconds."""

    def __init__(self, arrivals: list[tuple[float, int]], *, slots: int, k: float) -> None:
        self.came = arrivals
        self.own = [steps * seconds(2) for _, steps in arrivals]
        self.due = [at + k * own for (at, _), own in zip(arrivals, self.own, strict=True)]
        self.ended: dict[int, float] = {}
        self.most = 0
        left, now = {number: steps for number, (_, steps) in enumerate(arrivals)}, 0.0
        drawn: list[int] = []
        while left:
            waiting = [i for i in left if i not in drawn and self.came[i][0] <= now]
            running, ready = (
                [Owed(stages=left[i], rows=2, due=self.due[i], urgency=(self.due[i], i)) for i in some]
                for some in (drawn, waiting)
            )
            places = sharing(running, ready, seconds, now=now, most=slots)
            drawn = [[*drawn, *waiting][place] for place in places]
            self.most = max(self.most, len(drawn))
            if not drawn:
                now = min(self.came[i][0] for i in left)
                continue
            now += seconds(2 * len(drawn))
            for i in list(drawn):
                left[i] -= 1
                if not left[i]:
                    self.ended[i] = now
                    drawn.remove(i)
                    del left[i]

    def kept(self, steps: int) -> float:
        """Return the share of the pictures of so many steps whose promise was kept."""
        own = [i for i, (_, found) in enumerate(self.came) if found == steps]
        return sum(self.ended[i] <= self.due[i] for i in own) / len(own)


def test_short_pictures_do_not_wait_behind_long_ones_in_a_mix() -> None:
    """4, 20 and 50 steps, 40, 40 and 20 in a hundred, at a tenth more than what one at a time could do."""
    chance, at, arrivals = random.Random(1), 0.0, list[tuple[float, int]]()
    for steps in chance.choices((4, 20, 50), (40, 40, 20), k=600):
        at += chance.expovariate(1.1 / (19.6 * seconds(2)))
        arrivals.append((at, steps))
    for k in (5, 10):
        found = Played(arrivals, slots=8, k=k)
        assert min(found.kept(steps) for steps in (4, 20, 50)) >= 0.95
    assert Played(arrivals, slots=1, k=5).kept(50) < 0.8  # which is what is gained


def test_fewer_share_where_promises_are_tighter() -> None:
    def share(k: float) -> int:
        waiting = [Owed(stages=20, rows=2, due=k * 20 * seconds(2))] * 8
        return may_share(waiting, seconds, now=0.0, most=8)

    most = [share(k) for k in (1.01, 2, 3, 4, 10)]
    assert most == sorted(set(most)) and most[0] == 1 and most[-1] == 8
