"""Who may share stages: promises that can be kept are kept, and turns are fair."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.batching.stage_times import (
    BEGUN,
    PATIENCE_S,
    Owed,
    StageTimes,
    delivery_times,
    may_share,
    sharing,
)
from latentrt.runtime.batching.turns import Turns


def seconds(rows: int) -> float:
    return 0.01 + 0.004 * rows


owed = st.builds(
    Owed,
    stages=st.integers(1, 60),
    rows=st.integers(1, 2),
    after_s=st.floats(0, 0.1),
    due=st.none() | st.floats(0, 5),
)
some = st.lists(owed, max_size=6)


def played(pictures: list[Owed]) -> list[float]:
    """Play the stages one by one."""
    at, left, times = 0.0, {i: picture.stages for i, picture in enumerate(pictures)}, {}
    while left:
        at += seconds(sum(pictures[i].rows for i in left))
        for i in list(left):
            left[i] -= 1
            if not left[i]:
                times[i] = at + pictures[i].after_s
                del left[i]
    return [times[i] for i in range(len(pictures))]


@given(some)
def test_deliveries_are_those_of_stages_played_one_by_one(pictures: list[Owed]) -> None:
    assert delivery_times(pictures, seconds, now=0.0) == pytest.approx(played(pictures))


@given(some, st.integers(1, 8))
def test_whoever_shares_breaks_no_promise_of_those_before_that_could_be_kept(pictures: list[Owed], most: int) -> None:
    count = may_share(pictures, seconds, now=0.0, most=most)
    assert min(1, len(pictures)) <= count <= min(most, len(pictures))
    for first in range(count):
        before, after = (delivery_times(pictures[:some], seconds, now=0.0) for some in (first, first + 1))
        for picture, early, late in zip(pictures, before, after, strict=False):
            assert picture.due is None or early > picture.due or late <= picture.due


@given(some)
def test_without_promises_there_is_room_for_all(pictures: list[Owed]) -> None:
    free = [Owed(stages=one.stages, rows=one.rows) for one in pictures]
    assert may_share(free, seconds, now=0.0, most=12) == len(pictures)


def in_line(pictures: list[Owed], *, begun: bool) -> list[Owed]:
    return [
        msgspec.structs.replace(
            one, begun=begun or one.begun, urgency=(one.due if one.due is not None else 60.0, number)
        )
        for number, one in enumerate(pictures)
    ]


@given(some, some, st.integers(1, 8), st.floats(0, 100))
def test_somebody_is_always_drawn_and_nobody_without_a_promise_is_paused(
    drawn: list[Owed], ready: list[Owed], most: int, now: float
) -> None:
    drawn, ready = in_line(drawn[:most], begun=True), in_line(ready, begun=False)
    places = sharing(drawn, ready, seconds, now=now, most=most)
    assert len(set(places)) == len(places) <= most
    assert bool(places) is bool(drawn or ready)
    assert {place for place, one in enumerate(drawn) if one.due is None} <= set(places)
    if not ready:
        assert places == list(range(len(drawn)))


def one(due: float | None, *, stages: int = 10, number: int = 0, begun: bool = True, alone: bool = False) -> Owed:
    return Owed(
        stages=stages, rows=2, due=due, urgency=(60.0 if due is None else due, number), begun=begun, alone=alone
    )


STAGE = seconds(2)


@pytest.mark.parametrize(
    ("drawn", "ready", "found"),
    [
        ([one(9.0)], [one(1.0)], [1]),  # the later promise makes way
        ([one(1.0)], [one(9.0)], [0]),
        ([one(0.01)], [one(9.0, begun=False)], [1]),  # who cannot be in time any more makes way for who can
        ([one(0.01)], [one(0.02)], [0]),
        ([one(-PATIENCE_S - 0.01)], [one(9.0)], [0]),  # not for ever
        ([one(9.0)], [one(-PATIENCE_S - 0.01)], [1]),
        ([one(None)], [one(9.0, begun=False)], [0]),  # one without a promise goes on
        ([], [one(None), one(9.0, begun=False)], [0]),  # also after a pause, as when another group had its turn
        ([], [one(9.0), one(None, begun=False)], [0]),
        ([], [one(61.0, begun=False), one(None, begun=False)], [1]),
        ([one(9.0, alone=True)], [one(1.0)], [0]),  # who may share no stage is not paused
        ([one(9.0)], [one(1.0, alone=True)], [0]),  # and begins when nothing is drawn
        ([], [one(1.0, alone=True), one(0.9, begun=False)], [1]),
        ([], [one(1.0, alone=True), one(2.0)], [0]),
    ],
)
def test_who_is_drawn_is_decided_by_promises(drawn: list[Owed], ready: list[Owed], found: list[int]) -> None:
    assert sharing(drawn, ready, seconds, now=0.0, most=1) == found


def test_those_that_share_are_the_most_urgent_that_keep_all_promises() -> None:
    drawn = [one(3.0, number=1), one(10 * STAGE + 0.001, number=2)]  # one has room for none beside it
    assert sharing(drawn, [one(9.0, number=3)], seconds, now=0.0, most=8) == [1]
    assert sharing(drawn[:1], [one(9.0, number=3)], seconds, now=0.0, most=8) == [0, 1]


def test_no_more_begin_than_can_be_kept() -> None:
    paused = [one(0.01, number=number) for number in range(BEGUN * 2)]
    new = [one(9.0, number=100, begun=False)]
    assert sharing([], [*paused[1:], *new], seconds, now=0.0, most=2)[0] == len(paused) - 1
    assert set(sharing([], [*paused, *new], seconds, now=0.0, most=2)) <= set(range(len(paused)))


def test_who_begins_and_who_is_paused_is_decided_anew_only_by_what_changes() -> None:
    """Played without new ones, nobody is paused who was not at first: no stage is spent on going to and fro."""
    left = {number: 10 + 7 * number for number in range(12)}
    due = {number: 0.35 + 0.33 * number for number in left}
    drawn, begun, now, changes = list[int](), set[int](), 0.0, 0
    while left:
        waiting = [number for number in left if number not in drawn]
        running, ready = (
            [one(due[number], stages=left[number], number=number, begun=number in begun) for number in some]
            for some in (drawn, waiting)
        )
        places = sharing(running, ready, seconds, now=now, most=4)
        chosen = [[*drawn, *waiting][place] for place in places]
        changes += len(set(drawn) - set(chosen))
        drawn = chosen
        begun |= set(drawn)
        now += seconds(2 * len(drawn))
        for number in list(drawn):
            left[number] -= 1
            if not left[number]:
                del left[number]
                drawn.remove(number)
    assert changes <= 12


@pytest.mark.parametrize("known", [(1,), (1, 2), (2, 8), (1, 4, 16)])
def test_what_was_not_measured_is_estimated_from_what_was(known: tuple[int, ...]) -> None:
    times = StageTimes()
    assert times.estimate("unet", 4) is None
    for rows in known:
        times.note("unet", rows, seconds(rows))
    for rows in known:
        assert times.estimate("unet", rows) == pytest.approx(seconds(rows))
    found = [times.estimate("unet", rows) for rows in range(1, 20)]
    assert all(a is not None and b is not None and a <= b + 1e-12 for a, b in itertools.pairwise(found))
    if len(known) > 1:
        assert times.estimate("unet", 12) == pytest.approx(seconds(12))


def test_a_new_measurement_moves_the_average() -> None:
    times = StageTimes()
    times.note("unet", 2, 1.0)
    times.note("unet", 2, 2.0)
    found = times.estimate("unet", 2)
    assert found is not None and 1.0 < found < 2.0


@given(st.lists(st.floats(0.01, 0.5), min_size=2, max_size=5), st.lists(st.floats(0.01, 0.4), min_size=40, max_size=80))
def test_groups_that_always_have_work_get_the_seconds_of_their_quanta(quanta: list[float], costs: list[float]) -> None:
    turns: Turns[int] = Turns(lambda group: quanta[group])
    groups = list(range(len(quanta)))
    spent = dict.fromkeys(groups, 0.0)
    for cost in costs * 20:
        group = turns.choose(groups)
        assert group is not None
        spent[group] += cost
        turns.charge(cost)
    rounds = [spent[group] / quanta[group] for group in groups]
    slack = max(max(costs) / min(quanta), 1.0)
    assert max(rounds) - min(rounds) <= 2 * slack + 1


def test_the_only_group_goes_on_and_one_without_work_saves_nothing_up() -> None:
    turns: Turns[str] = Turns(lambda _: 1.0)
    for _ in range(10):
        assert turns.choose(["a"]) == "a"
        turns.charge(1.0)
    assert turns.choose(["a", "b"]) == "b"
    turns.charge(0.5)
    assert turns.choose(["a", "b"]) == "b"
    assert turns.choose(["a"]) == "a"
    assert turns.choose([]) is None
