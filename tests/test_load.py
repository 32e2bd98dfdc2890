"""`latentrt bench-serve`: arrivals are what they are called, traces are read strictly, every request is counted."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from latentrt.__main__ import cli
from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.errors import QueueFullError, RequestError
from latentrt.runtime.bench.load.arrivals import Item, Share, at_rate, counts, gaps, random_items, rate_of, read_trace
from latentrt.runtime.bench.load.drive import Outcome, Submit, drive
from latentrt.runtime.bench.load.figures import figures_of, run_of
from latentrt.runtime.bench.load.measure import serving_of, spread
from latentrt.runtime.bench.load.result import Goodput, Report, read_report
from latentrt.runtime.bench.load.search import ENOUGH, Bound, find_goodput
from latentrt.runtime.bench.load.serving import together

MIX = (Share(steps=4, share=40), Share(steps=20, share=40), Share(steps=50, share=20))


# --- arrivals ---


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gaps_have_their_mean_and_their_variation(cv: float) -> None:
    found = gaps(200_000, np.random.default_rng(1), cv=cv)
    assert found.mean() == pytest.approx(1, abs=0.02 * max(cv, 0.1))
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.02)


def test_gaps_of_a_poisson_process_are_exponential_and_have_no_memory() -> None:
    found = gaps(100_000, np.random.default_rng(2), cv=1.0)
    grid = np.linspace(0.1, 5, 50)
    empirical = (found[:, None] <= grid).mean(axis=0)
    assert np.abs(empirical - (1 - np.exp(-grid))).max() < 1.63 / np.sqrt(len(found)) * 1.5  # Kolmogorov, with room
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True), st.data(), st.integers(1, 400))
def test_a_mix_has_its_shares(steps: list[int], data: Any, count: int) -> None:
    shares = data.draw(st.lists(st.floats(0.1, 100), min_size=len(steps), max_size=len(steps)))
    mix = [Share(steps=some, share=share) for some, share in zip(steps, shares, strict=True)]
    found = counts(mix, count)
    assert sum(found) == count
    assert all(abs(part - share / sum(shares) * count) <= 1 for part, share in zip(found, shares, strict=True))


def test_a_seed_gives_the_same_requests_and_another_seed_others() -> None:
    assert random_items(MIX, 50, 3) == random_items(MIX, 50, 3)
    assert random_items(MIX, 50, 3) != random_items(MIX, 50, 4)
    assert Counter(item.steps for item in random_items(MIX, 50, 3)) == {4: 20, 20: 20, 50: 10}


@given(st.floats(0.01, 1000), st.floats(0, 4))
def test_another_rate_changes_nothing_but_the_scale(rate: float, cv: float) -> None:
    items = random_items(MIX, 30, 5, cv=cv)
    faster = at_rate(items, rate)
    assert rate_of(faster) == pytest.approx(rate)
    ratio = np.array([item.at_s for item in items]) / np.array([item.at_s for item in faster])
    assert np.allclose(ratio, ratio[0])
    assert [item.kind for item in faster] == [item.kind for item in items]


def trace(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = {"at_s": 0, "steps": 4, "size": [64, 32], "guidance": 1, "slo_ms": 500, "prompt": "a circle", "seed": 7}
    first, second = read_trace(trace(tmp_path / "a.jsonl", one, "", {"at_s": 1.5}))
    assert (first.size, first.slo_ms, first.prompt, first.seed) == ((64, 32), 500, "a circle", 7)
    assert second == Item(at_s=1.5)


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (['{"at_s": 1}', '{"at_s": "x"}'], 2),
        (['{"at_s": 1}', "", '{"at_s": 0.5}'], 3),
        (["{"], 1),
        (['{"at_s": 1, "steps": 0}'], 1),
        (['{"at_s": 1, "steps": true}'], 1),
        (['{"at_s": -1}'], 1),
        (['{"at_s": NaN}'], 1),
        (['{"at_s": 1, "at_s": 2}'], 1),
        (['{"at_s": 1, "step": 4}'], 1),
        (['{"at_s": 1, "slo_ms": 0}'], 1),
        (['{"at_s": 1, "size": [64]}'], 1),
        (["[1]"], 1),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, lines: list[str], line: int) -> None:
    with pytest.raises(RequestError) as found:
        read_trace(trace(tmp_path / "a.jsonl", *lines))
    assert found.value.field == "trace"
    assert f"line {line}:" in str(found.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"at_s": 0}\n', b"\xff\xfe", None])
def test_a_trace_without_requests_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(RequestError) as found:
        read_trace(tmp_path / "a.jsonl")
    assert found.value.field == "trace"


# --- the driver ---


def after(seconds: float) -> Submit:
    """Answer every request on a thread of its own after some seconds."""

    def submit(number: int, item: Item) -> Future[float | None]:
        future: Future[float | None] = Future()
        threading.Timer(seconds, lambda: future.set_result(seconds / 2)).start()
        return future

    return submit


def even(count: int, gap: float) -> list[Item]:
    return [Item(at_s=gap * number, steps=1) for number in range(count)]


def test_requests_come_at_their_moments_whatever_becomes_of_those_before() -> None:
    asked: list[float] = []
    never: list[Future[float | None]] = []

    def submit(number: int, item: Item) -> Future[float | None]:
        asked.append(time.perf_counter())
        never.append(Future())
        if number == 9:
            for future in never:
                future.set_result(None)
        return never[-1]

    outcomes = drive(submit, even(10, 0.02), most_s=60, skips_idle=True)
    assert all(later - earlier > 0.001 for earlier, later in itertools.pairwise(asked))
    assert asked[-1] - asked[0] > 0.15
    assert [outcome.status for outcome in outcomes] == ["answered"] * 10
    latencies = [outcome.latency_s for outcome in outcomes]
    assert latencies == sorted(latencies, reverse=True)  # all were answered at once


def test_time_in_which_nothing_is_drawn_is_skipped_and_changes_no_latency() -> None:
    start = time.perf_counter()
    outcomes = drive(after(0.01), even(5, 1000.0), most_s=1e5, skips_idle=True)
    assert time.perf_counter() - start < 500
    assert all(outcome.status == "answered" and outcome.latency_s > 0.009 for outcome in outcomes)  # type: ignore[operator]
    assert all(outcome.first_s is not None and outcome.first_s < outcome.latency_s for outcome in outcomes)  # type: ignore[operator]


def test_what_is_refused_fails_or_is_not_answered_in_time_is_told_apart() -> None:
    seen: list[BaseException] = []

    def submit(number: int, item: Item) -> Future[float | None]:
        future: Future[float | None] = Future()
        if number == 0:
            raise QueueFullError("full", retry_after_s=1)
        if number == 1:
            raise RequestError("steps: wrong")
        if number == 2:
            future.set_exception(ValueError("broken"))
        if number == 3:
            future.cancel()
            future.set_running_or_notify_cancel()
        if number == 4:
            future.set_result(None)
        return future

    outcomes = drive(submit, even(6, 0.0), most_s=0.3, skips_idle=False, error=seen.append)
    assert [one.status for one in outcomes] == ["rejected", "failed", "failed", "unanswered", "answered", "unanswered"]
    assert [type(error) for error in seen] == [QueueFullError, RequestError, ValueError]


def test_a_static_batch_is_the_first_and_those_like_it() -> None:
    line = [Item(at_s=0, steps=steps) for steps in (4, 20, 4, 4, 20, 4)]
    assert together(line, 3) == [0, 2, 3]
    assert together(line, 1) == [0]
    assert together(line[1:], 8) == [0, 3]
    other = msgspec.structs.replace(line[0], negative_prompt="blue")
    assert together([line[0], other], 8) == [0]


# --- figures ---

OUTCOMES = [
    Outcome(status="answered", latency_s=0.1, first_s=0.05),
    Outcome(status="answered", latency_s=0.4),
    Outcome(status="rejected"),
    Outcome(status="failed"),
    Outcome(status="unanswered"),
]


def test_what_was_not_answered_was_not_in_time() -> None:
    items = even(5, 1.0)
    figures = figures_of(items, OUTCOMES, {items[0].kind: 0.1}, (1.5, 5.0))
    assert [one.share for one in figures.attained] == [0.2, 0.4]
    assert all(one.low <= one.share <= one.high for one in figures.attained)
    assert (figures.requests, figures.rejected, figures.failed, figures.unanswered) == (5, 1, 1, 1)
    assert figures.latency_s is not None and figures.slowdown is not None and figures.first_s is not None
    assert figures.latency_s.p50 == pytest.approx(0.25)
    assert figures.slowdown.p50 == pytest.approx(2.5)


def test_a_traces_own_promise_is_what_counts() -> None:
    items = [msgspec.structs.replace(item, slo_ms=450.0) for item in even(5, 1.0)]
    figures = figures_of(items, OUTCOMES, {items[0].kind: 0.1}, (1.5,))
    assert figures.attained[0].share == 0.4


def test_figures_by_kind_add_up_to_all() -> None:
    items = random_items(MIX, 40, 1)
    outcomes = [OUTCOMES[number % 5] for number in range(40)]
    run = run_of(2.0, items, outcomes, {item.kind: 0.1 for item in items}, (2.0, 5.0))
    assert set(run.kinds) == {"4 steps", "20 steps", "50 steps"}
    assert sum(part.requests for part in run.kinds.values()) == run.overall.requests == 40
    kept = sum(part.requests * part.attained[0].share for part in run.kinds.values())
    assert kept == pytest.approx(40 * run.share(2.0))


# --- the search ---


@given(st.floats(0.05, 500), st.floats(0.05, 500), st.floats(0.05, 2))
def test_the_search_finds_where_the_share_falls(edge: float, start: float, slope: float) -> None:
    def share(rate: float) -> float:
        return float(np.clip(ENOUGH - slope * np.log(rate / edge), 0, 1))

    found = find_goodput(share, start, most=60)
    assert found.bound == "found"
    assert found.rate == pytest.approx(edge, rel=0.13)


@pytest.mark.parametrize(("always", "bound"), [(1.0, "at least"), (0.0, "at most")])
def test_a_goodput_that_was_not_reached_is_called_a_bound(always: float, bound: str) -> None:
    found = find_goodput(lambda _: always, 1.0, most=4)
    assert (found.bound, len(found.tried)) == (bound, 4)


def test_a_search_that_runs_out_of_time_has_tried_once() -> None:
    assert len(find_goodput(lambda _: 1.0, 1.0, go_on=lambda: False).tried) == 1


def test_a_spread_is_from_the_lowest_to_the_highest_with_its_confidence() -> None:
    found = spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (found.median, found.lowest, found.highest, found.confidence) == (3.0, 1.0, 5.0, 1 - 2 / 32)


# --- the command ---

Invoke = Callable[..., Any]


@pytest.fixture
def bench_serve() -> Invoke:
    def invoke(*arguments: object, code: int = 0) -> Any:
        done = CliRunner().invoke(cli, ["bench-serve", *map(str, arguments)])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout) if "--json" in arguments else done.output

    return invoke


@pytest.fixture(scope="module")
def measured(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("load") / "a.json"
    options = ("--mix", "1:2,3:1", "--requests", "9", "--seeds", "2", "--rate", "40", "--json", str(file))
    done = CliRunner().invoke(cli, ["bench-serve", str(sd1_bundle), *options])
    assert done.exit_code == 0, done.output
    return file


def test_a_real_run_answers_every_request_in_every_way(measured: Path) -> None:
    report = read_report(measured)
    assert [serving.name for serving in report.servings] == ["continuous", "one", "static"]
    for serving in report.servings:
        assert [one.seed for one in serving.seeds] == [0, 1]
        for run in (run for one in serving.seeds for run in one.runs):
            assert run.overall.requests == 9
            assert run.overall.rejected == run.overall.failed == run.overall.unanswered == 0
            assert run.overall.first_s is not None and run.overall.latency_s is not None
            assert 0 < run.overall.first_s.p50 < run.overall.latency_s.p99
            assert {name: part.requests for name, part in run.kinds.items()} == {"1 step": 6, "3 steps": 3}


def test_the_result_is_what_the_schema_says(measured: Path, bench_serve: Invoke) -> None:
    schema = json.loads(bench_serve("--schema"))
    assert schema == json.loads(json.dumps(json_schema(Report)))
    jsonschema.validate(json.loads(measured.read_text()), schema)
    assert [name for name, part in schema["$defs"].items() if not part["description"]] == []


def test_a_goodput_is_looked_for_and_predicted(sd1_bundle: Path, bench_serve: Invoke) -> None:
    options = ("--mix", "2:1,4:1", "--requests", 8, "--seeds", 1, "--slots", 2, "--seconds", 3, "--simulate")
    found = bench_serve(sd1_bundle, *options, "--serving", "continuous,one", "--json", "-")
    times = found["times"]
    assert [rows for rows, _ in times["stage_s"]] == [2, 4]
    assert all(seconds > 0 for _, seconds in [*times["stage_s"], *times["encode_s"], *times["decode_s"]])
    for serving in found["servings"]:
        (one,), (predicted,) = serving["seeds"], serving["predicted"]
        assert one["rate"] > 0 and predicted > 0
        assert one["bound"] in ("found", "at least", "at most")


def test_ways_are_compared_where_both_goodputs_were_found() -> None:
    def one(rate: float, bound: Bound) -> Goodput:
        return Goodput(seed=0, rate=rate, bound=bound, runs=())

    shared = [one(4.0, "found"), one(6.0, "found"), one(5.0, "at least")]
    alone = [one(2.0, "found"), one(1.0, "at most"), one(1.0, "found")]
    assert serving_of("one", alone, shared).better == spread([2.0])
    assert serving_of("one", alone[1:], shared[1:]).better is None
    assert serving_of("continuous", shared, shared).better is None


def test_a_saved_result_is_shown(measured: Path, bench_serve: Invoke) -> None:
    text = bench_serve("--show", measured)
    assert all(word in text for word in ("stages shared", "one at a time", "static batches", "times alone"))


def test_a_trace_is_measured_at_its_own_pace(sd1_bundle: Path, tmp_path: Path, bench_serve: Invoke) -> None:
    lines = [{"at_s": 0.05 * number, "steps": 1 + number % 2, "slo_ms": 60_000} for number in range(1, 5)]
    file = trace(tmp_path / "a.jsonl", *lines)
    found = bench_serve(
        sd1_bundle, "--trace", file, "--seeds", 1, "--serving", "continuous", "--waiting", 8, "--json", "-"
    )
    ((goodput,),) = (serving["seeds"] for serving in found["servings"])
    (run,) = goodput["runs"]
    assert goodput["rate"] is None and run["rate"] == pytest.approx(20)
    assert {one["share"] for one in run["overall"]["attained"]} == {1.0}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--mix", "4:40,4:2"), "mix"),
        (("--mix", "4:-1"), "mix"),
        (("--mix", "0:1"), "mix"),
        (("--mix", "4:nan"), "mix"),
        (("--mix", "four"), "mix"),
        (("--mix", ""), "mix"),
        (("--trace", "/nowhere/a.jsonl"), "trace"),
        (("--burst", "-1"), "cv"),
        (("--rate", "0"), "rates"),
        (("--serving", "magic"), "servings"),
        (("--requests", "0"), "requests"),
        (("--slo", "0"), "multiple"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_field(
    sd1_bundle: Path, bench_serve: Invoke, options: tuple[str, str], field: str
) -> None:
    assert bench_serve(sd1_bundle, *options, "--json", "-", code=2)["error"]["field"] == field


def test_a_request_that_the_bundle_cannot_draw_is_refused(sd1_bundle: Path, bench_serve: Invoke) -> None:
    error = bench_serve(sd1_bundle, "--sampler", "magic", "--json", "-", code=2)["error"]
    assert (error["type"], error["field"]) == ("RequestError", "sampler")


@pytest.mark.parametrize("arguments", [(), ("a", "--schema"), ("--show", "/nowhere.json")])
def test_nothing_or_too_much_to_do_is_refused(bench_serve: Invoke, arguments: tuple[str, ...]) -> None:
    bench_serve(*arguments, code=2)
