"""The statistics of the benchmark: intervals that hold what they promise, against SciPy and against chance itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from latentrt.runtime.bench.rounds import FEWEST_ROUNDS, MOST_WARMUP, is_steady, take_turns, warm_up
from latentrt.runtime.bench.samples import (
    drift,
    median_interval,
    normal_quantile,
    share_interval,
    summarise,
    unpaired_ratio,
)

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


@given(times)
def test_a_summary_is_ordered_and_keeps_every_measurement(samples: list[float]) -> None:
    summary = summarise(samples)
    ordered = [summary.lowest, summary.p50, summary.p90, summary.p95, summary.p99, summary.highest]
    assert ordered == sorted(ordered)
    assert (summary.count, summary.lowest, summary.highest) == (len(samples), min(samples), max(samples))


@given(times, st.floats(0.01, 100))
def test_a_summary_scales_with_the_unit(samples: list[float], factor: float) -> None:
    one, other = summarise(samples), summarise([factor * sample for sample in samples])
    assert other.p95 == pytest.approx(factor * one.p95)
    assert other.spread == pytest.approx(one.spread)
    assert other.count == one.count


def test_a_far_measurement_is_counted_and_stays_in_the_figures() -> None:
    summary = summarise([1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 50.0])
    assert summary.outliers == 1
    assert summary.highest == 50.0
    assert summary.mean > 7


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="nothing"):
        summarise([])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_measurements_have_no_interval(count: int) -> None:
    assert median_interval([1.0] * count) is None


@pytest.mark.parametrize("count", [6, 7, 10, 30, 101])
def test_the_interval_of_the_median_is_scipys_for_a_quantile(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    oracle = stats.quantile_test(samples, p=0.5).confidence_interval(confidence_level=0.95)
    assert median_interval(samples.tolist()) == pytest.approx((oracle.low, oracle.high))


@pytest.mark.parametrize("count", [6, 15, 40])
def test_the_interval_holds_the_true_median_as_often_as_promised(count: int) -> None:
    generator = np.random.default_rng(1)
    intervals = [median_interval(generator.exponential(size=count).tolist()) for _ in range(2000)]
    held = sum(low <= math.log(2) <= high for low, high in (pair for pair in intervals if pair))
    assert held / 2000 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize("sizes", [(8, 8), (12, 30), (40, 25)])
def test_the_unpaired_interval_is_where_scipys_mann_whitney_test_changes_its_mind(sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(sum(sizes))
    before, after = (generator.lognormal(sigma=0.3, size=size) for size in sizes)
    ratio = unpaired_ratio(before.tolist(), after.tolist(), 0.99)
    assert ratio.low is not None and ratio.high is not None

    def p_value(factor: float) -> float:
        test = stats.mannwhitneyu(after / factor, before, method="asymptotic", use_continuity=False)
        return float(test.pvalue)

    inside, outside = 1 + 1e-9, 1 - 1e-9
    for end in (ratio.low * inside, ratio.high * outside, ratio.estimate):
        assert p_value(end) > 0.01 * 0.8  # the ranks are whole numbers: the test may jump past 0.01 at one of them
    for end in (ratio.low * 0.99 * outside, ratio.high * 1.01 * inside):
        assert p_value(end) < 0.01 * 1.6


@given(st.floats(0.2, 5))
def test_the_unpaired_ratio_finds_the_factor(factor: float) -> None:
    before = np.random.default_rng(3).lognormal(sigma=0.05, size=20)
    ratio = unpaired_ratio(before.tolist(), (factor * before).tolist(), 0.95)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.estimate == pytest.approx(factor, rel=0.02)
    assert ratio.low <= factor <= ratio.high


def test_three_rounds_each_are_too_few_for_an_unpaired_interval() -> None:
    assert unpaired_ratio([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], 0.95).low is None


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 10), (198, 200)])
def test_the_interval_of_a_share_is_scipys_wilson_interval(right: int, count: int) -> None:
    oracle = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert share_interval(right, count) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_the_normal_quantile_is_scipys() -> None:
    assert normal_quantile(0.995) == pytest.approx(stats.norm.ppf(0.995), abs=1e-12)


def test_drift_is_the_distance_of_the_halves() -> None:
    assert drift([1.0, 1.0, 1.2, 1.2]) == pytest.approx(0.2)
    assert drift([1.2, 1.2, 1.0, 1.0]) == pytest.approx(0.2)
    assert drift([1.0, 2.0]) == 0.0


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=30))
def test_warm_up_ends_as_soon_as_three_draws_bring_nothing_new(seconds: list[float]) -> None:
    draws = iter(seconds + [seconds[-1]] * MOST_WARMUP)
    warmup = warm_up(lambda: next(draws), most_seconds=math.inf)
    assert all(not is_steady(warmup.seconds[:n]) for n in range(len(warmup.seconds)))
    assert warmup.steady == is_steady(warmup.seconds)
    assert warmup.steady or len(warmup.seconds) == MOST_WARMUP


def test_a_warm_up_that_a_limit_ended_is_not_called_steady() -> None:
    warmup = warm_up(lambda: 1.0, most_seconds=0.5)
    assert (warmup.steady, warmup.seconds) == (False, (1.0,))


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 99))
def test_every_round_holds_every_candidate_once(candidates: int, rounds: int, seed: int) -> None:
    turns = list(take_turns(range(candidates), rounds=rounds, most_seconds=math.inf, seed=seed))
    assert len(turns) == candidates * rounds
    assert {(round_, candidate) for round_, candidate in turns} == {
        (round_, candidate) for round_ in range(rounds) for candidate in range(candidates)
    }


def test_the_order_changes_from_round_to_round_and_is_the_same_for_a_seed() -> None:
    one, again, other = (
        [c for _, c in take_turns("abcd", rounds=8, most_seconds=math.inf, seed=seed)] for seed in (0, 0, 1)
    )
    assert one == again != other
    assert len({tuple(one[i : i + 4]) for i in range(0, 32, 4)}) > 1


def test_rounds_end_with_the_time_but_not_before_three() -> None:
    clock = iter(range(100))
    turns = take_turns("ab", rounds=50, most_seconds=0.5, seed=0, clock=lambda: float(next(clock)))
    assert max(round_ for round_, _ in turns) + 1 == FEWEST_ROUNDS
