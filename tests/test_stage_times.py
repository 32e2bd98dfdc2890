"""Who may share stages: promises that can be kept are kept, and turns are fair."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.batching.stage_times import Owed, StageTimes, delivery_times, may_join
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


@given(some, some, st.integers(1, 8))
def test_whoever_joins_breaks_no_promise_that_could_be_kept(
    running: list[Owed], waiting: list[Owed], most: int
) -> None:
    running = running[:most]
    joined = may_join(running, waiting, seconds, now=0.0, most=most)
    assert joined <= max(0, most - len(running))
    if not running and waiting:
        assert joined >= 1
    before = delivery_times(running, seconds, now=0.0)
    after = delivery_times([*running, *waiting[:joined]], seconds, now=0.0)
    for picture, early, late in zip(running, before, after, strict=False):
        assert picture.due is None or early > picture.due or late <= picture.due


@given(some, some)
def test_without_promises_there_is_room_for_all(running: list[Owed], waiting: list[Owed]) -> None:
    def free(pictures: list[Owed]) -> list[Owed]:
        return [Owed(stages=one.stages, rows=one.rows) for one in pictures]

    assert may_join(free(running), free(waiting), seconds, now=0.0, most=12) == len(waiting)


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
