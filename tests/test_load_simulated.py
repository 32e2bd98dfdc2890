"""The simulator's laws: nothing is lost, nothing is early, and where theory has an answer it is that one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from latentrt.__main__ import cli
from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.errors import RequestError
from latentrt.runtime.bench.load.arrivals import Kind, Share, random_items
from latentrt.runtime.bench.load.result import read_times
from latentrt.runtime.bench.load.serving import Options
from latentrt.runtime.bench.load.simulator.fleet import Router, RouterName, Store, play, ready_times
from latentrt.runtime.bench.load.simulator.predict import (
    Served,
    Stage,
    asks_of,
    between_stages,
    predict,
    replica_of,
    shared_part,
)
from latentrt.runtime.bench.load.simulator.replica import Ask, BatchReplica, Costs, Replica, SharedReplica, Times
from latentrt.runtime.bench.load.simulator.survey import Assumed, Fleet, Survey

TIMES = Times(
    stage_s=((2, 0.007), (4, 0.012), (8, 0.021), (16, 0.038)),
    encode_s=((1, 0.003), (8, 0.005)),
    decode_s=((1, 0.010), (8, 0.070)),
    call_s=((1, 0.001), (8, 0.002)),
    between_s=0.0003,
    shared=0.7,
)
COSTS = Costs(TIMES, 8)
IN_TURN = Costs(msgspec.structs.replace(TIMES, shared=None), 8)
MIX = (Share(steps=4, share=40), Share(steps=20, share=40), Share(steps=50, share=20))
Make = Callable[[int], Replica]
MACHINES: dict[str, Make] = {
    "continuous": lambda waiting: SharedReplica(COSTS, waiting=waiting, multiple=5.0),
    "in turn": lambda waiting: SharedReplica(IN_TURN, waiting=waiting, multiple=5.0),
    "no promise": lambda waiting: SharedReplica(COSTS, waiting=waiting, multiple=None),
    "one": lambda waiting: BatchReplica(COSTS, waiting=waiting, together=1),
    "static": lambda waiting: BatchReplica(COSTS, waiting=waiting, together=8),
}
ROUTERS: tuple[RouterName, ...] = ("round robin", "least loaded", "two choices")


def asked(gaps: Sequence[float], stages: Sequence[int]) -> list[Ask]:
    moments = itertools.accumulate(gaps)
    return [
        Ask(number=number, at=at, stages=count, rows=2, like=count)
        for number, (at, count) in enumerate(zip(moments, stages, strict=False))
    ]


some = st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 30)), min_size=1, max_size=40).map(
    lambda pairs: asked([gap for gap, _ in pairs], [stages for _, stages in pairs])
)


@pytest.mark.parametrize("machine", MACHINES)
@given(asks=some, waiting=st.sampled_from([1, 3, 64]), count=st.integers(1, 3), name=st.sampled_from(ROUTERS))
@budget(max_examples=60)
def test_every_request_is_delivered_once_or_rejected_and_none_too_early(
    machine: str, asks: list[Ask], waiting: int, count: int, name: RouterName
) -> None:
    replicas = [MACHINES[machine](waiting) for _ in range(count)]
    played = play(asks, replicas, Router(name=name))
    least = np.array([ask.stages * COSTS.known[2] + COSTS.encode[1] + COSTS.decode[1] for ask in asks])
    latency = played.delivered - np.array([ask.at for ask in asks])
    assert (latency >= least - 1e-9).all()  # what was rejected is delivered never
    assert all(replica.next_at == np.inf and not replica._line and not replica._drawn for replica in replicas)  # type: ignore[attr-defined]
    if waiting >= len(asks):
        assert np.isfinite(played.delivered).all()


@pytest.mark.parametrize("machine", MACHINES)
def test_a_request_by_itself_takes_its_own_time(machine: str) -> None:
    for stages in (1, 7, 50):
        played = play(asked([1.0], [stages]), [MACHINES[machine](64)], Router())
        alone = COSTS.encode[1] + stages * COSTS.known[2] + COSTS.decode[1]
        more = COSTS.call[1] if machine in ("one", "static") else stages * TIMES.between_s
        assert played.delivered[0] - 1.0 == pytest.approx(alone + more)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_first_come_first_served_waits_as_an_m_d_1_queue(load: float) -> None:
    """Pollaczek and Khinchine: with one fixed service time s, the mean wait is rho s / (2 (1 - rho))."""
    service = COSTS.together(20, 2, 1)
    rng = np.random.default_rng(3)
    asks = asked(rng.exponential(service / load, 60_000).tolist(), [20] * 60_000)
    played = play(asks, [BatchReplica(COSTS, waiting=10**6, together=1)], Router())
    waits = played.delivered - np.array([ask.at for ask in asks]) - service
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


@pytest.mark.parametrize("costs", [COSTS, IN_TURN], ids=["beside", "in turn"])
def test_stages_that_are_jumped_over_are_those_that_are_taken_one_by_one(costs: Costs) -> None:
    """With boundaries forced by a picture that waits for ever, deliveries of the others stay where they are."""

    class Slow(SharedReplica):
        def happen(self) -> list[tuple[int, float]]:
            found = super().happen()
            if self._drawn:  # look again at the next boundary, always
                self._stages = 1
                self.next_at = self._boundary + self._delay + self._costs.stage[self._rows]
            return found

    rng = np.random.default_rng(1)
    asks = asked(rng.exponential(0.15, 400).tolist(), rng.choice([4, 20, 50], 400).tolist())
    jumped, stepped = (
        play(asks, [kind(costs, waiting=64, multiple=5.0)], Router()).delivered for kind in (SharedReplica, Slow)
    )
    assert np.allclose(jumped, stepped)


def test_a_stage_waits_for_one_encoding_and_one_decoding_at_the_most() -> None:
    """Eight come at once: the others' texts are read one by one before its stages, and their pictures decoded so."""
    encode, decode = IN_TURN.encode[1], IN_TURN.decode[1]

    class Watched(SharedReplica):
        def __init__(self) -> None:
            super().__init__(IN_TURN, waiting=64, multiple=None)
            self.delays = list[float]()

        def happen(self) -> list[tuple[int, float]]:
            found = super().happen()
            if self._drawn:
                self.delays.append(self._delay)
            return found

    machine = Watched()
    play(asked([0.0] * 8, [9] * 8), [machine], Router())
    assert sum(machine.delays[:7]) == pytest.approx(7 * encode)  # the first one's was before all stages
    assert max(machine.delays) <= encode + decode + 1e-9
    assert sum(machine.delays) == pytest.approx(7 * encode + 7 * decode)  # the last one's is after them


def test_a_more_urgent_request_has_another_make_way() -> None:
    """A long one is drawn with others that leave no room for a short one: it comes first all the same."""
    asks = asked([0.0] * 8 + [0.2], [50] * 8 + [4])
    delivered = play(asks, [MACHINES["in turn"](64)], Router()).delivered
    assert delivered[8] - asks[8].at <= 5 * (4 * IN_TURN.known[2] + IN_TURN.decode[1])
    assert np.argmin(delivered) == 8


def test_sharing_stages_ends_the_wait_behind_long_requests() -> None:
    served = Served(
        stages={Kind(steps, None, 7.5, None): steps for steps in (4, 20, 50)},
        alone={Kind(steps, None, 7.5, None): COSTS.together(steps, 2, 1) for steps in (4, 20, 50)},
        options=Options(),
    )
    items = random_items(MIX, 600, 0)
    rates = {name: predict(name, items, served, TIMES, start=3.0).rate for name in ("continuous", "one", "static")}
    assert rates["continuous"] > 2.3 * rates["one"]
    assert rates["continuous"] > 2.3 * rates["static"]


def test_a_full_line_rejects_and_a_longer_one_takes_more() -> None:
    asks = asked([0.0] * 50, [20] * 50)
    taken = [
        int(np.isfinite(play(asks, [MACHINES["one"](waiting)], Router()).delivered).sum()) for waiting in (1, 5, 64)
    ]
    assert taken == [2, 6, 50]


# --- many machines ---


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_store_gives_no_more_than_it_has(starts: list[float], link: float, total: float) -> None:
    store = Store(bytes=5.0, link_s=link, total_s=total, open_s=0.5)
    ready = ready_times(starts, store) - store.open_s
    begin = np.sort(starts)
    assert np.isfinite(ready).all() and (np.diff(ready) >= -1e-9).all()
    assert (ready - begin >= store.bytes / min(link, total) - 1e-6).all()
    for until in ready:  # what has left the store by then
        assert (ready <= until).sum() * store.bytes <= total * (until - begin[0]) * (1 + 1e-6) + 1e-6


def test_machines_that_load_at_once_share_the_store() -> None:
    store = Store(bytes=2.0, link_s=1.0, total_s=4.0, open_s=1.0)
    assert ready_times([0.0] * 4, store) == pytest.approx([3.0] * 4)
    assert ready_times([0.0] * 16, store) == pytest.approx([9.0] * 16)
    assert ready_times([0.0, 100.0], store) == pytest.approx([3.0, 103.0])


def test_a_cold_machine_is_given_nothing_before_it_is_ready() -> None:
    asks = asked([0.01] * 200, [4] * 200)
    replicas = [MACHINES["one"](1000) for _ in range(3)]
    given: list[list[float]] = [[], [], []]
    for place, replica in enumerate(replicas):
        taking = replica.arrive

        def arrive(ask: Ask, at: float, place: int = place, taking: Any = taking) -> bool:
            given[place].append(at)
            return bool(taking(ask, at))

        replica.arrive = arrive  # type: ignore[method-assign]
    play(asks, replicas, Router(name="round robin"), available=np.array([0.0, 0.5, 1.5]))
    assert given[0][0] < 0.5 <= given[1][0] and given[2][0] >= 1.5


def test_choosing_the_less_loaded_is_better_than_taking_turns_at_random_lengths() -> None:
    rng = np.random.default_rng(0)
    asks = asked(rng.exponential(0.025, 4000).tolist(), rng.choice([4, 20, 50], 4000, p=[0.4, 0.4, 0.2]).tolist())

    def p95(name: RouterName) -> float:
        played = play(asks, [MACHINES["no promise"](64) for _ in range(8)], Router(name=name))
        own = np.array([COSTS.together(ask.stages, 2, 1) for ask in asks])
        return float(np.quantile((played.delivered - np.array([ask.at for ask in asks])) / own, 0.95))

    assert p95("least loaded") <= p95("two choices") < p95("round robin")


def test_a_router_that_takes_too_long_is_the_bottleneck() -> None:
    rng = np.random.default_rng(0)
    asks = asked(rng.exponential(0.01, 1000).tolist(), [4] * 1000)

    def waited(decide_s: float) -> float:
        played = play(asks, [MACHINES["one"](64) for _ in range(8)], Router(decide_s=decide_s))
        return float(np.mean(played.routed - np.array([ask.at for ask in asks])))

    assert waited(0.001) < 0.002
    assert waited(0.012) > 0.5


def test_what_the_simulator_is_given_are_times_and_no_goodput(tmp_path: Path) -> None:
    """With everything twice as slow, half as much is predicted."""
    kind = Kind(20, None, 7.5, None)
    items = random_items((Share(steps=20, share=1),), 300, 1)

    def rate(factor: float) -> float:
        scaled = {
            name: tuple((count, factor * seconds) for count, seconds in getattr(TIMES, name))
            for name in ("stage_s", "encode_s", "decode_s", "call_s")
        }
        times = msgspec.structs.replace(TIMES, **scaled, between_s=factor * TIMES.between_s)
        own = {kind: Costs(times, 8).together(20, 2, 1)}
        served = Served(stages={kind: 20}, alone=own, options=Options())
        return predict("continuous", items, served, times, start=4.0 / factor).rate

    assert rate(2.0) == pytest.approx(rate(1.0) / 2, rel=1e-6)


@given(st.floats(0, 2), st.floats(0.001, 0.05), st.integers(1, 40), st.integers(0, 10))
def test_what_is_shared_and_what_lies_between_is_found_from_stages(
    shared: float, between: float, full: int, fewer: int
) -> None:
    """Each stage is delayed by the same share: the more is done beside all of them."""
    delay, at, stages = 0.25, 0.0, []
    for pictures in [8] * full + [3] * fewer:
        seconds = (0.005 * pictures) * (1 + delay)
        at += between + seconds
        stages.append(Stage(at, pictures, seconds))
    delayed = sum(stage.seconds for stage in stages) * delay / (1 + delay)
    beside = delayed / shared if shared else 1e9
    assert shared_part(stages, 0.04, 8, beside) == pytest.approx(shared, abs=1e-6)
    if len(stages) > 1:
        assert between_stages(stages) == pytest.approx(between)
        later = [Stage(stage.at + 0.5 * (place // 2), *stage[1:]) for place, stage in enumerate(stages)]
        assert between_stages(later, below=0.1) == pytest.approx(between)  # half of them waited for something


def test_a_machine_of_each_way_is_what_its_name_says() -> None:
    kinds = {name: type(replica_of(name, COSTS, Options())) for name in ("continuous", "one", "static")}
    assert kinds == {"continuous": SharedReplica, "one": BatchReplica, "static": BatchReplica}
    items = random_items((Share(steps=4, share=1),), 3, 0, guidance=1.0)
    kind = items[0].kind
    served = Served(stages={kind: 4}, alone={kind: 1.0}, options=Options())
    assert [ask.rows for ask in asks_of(items, served)] == [1, 1, 1]


def saved(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_fleet_is_simulated_from_saved_times(tmp_path: Path) -> None:
    file = saved(tmp_path / "times.json", {"times": msgspec.to_builtins(TIMES)})
    assert read_times(file) == TIMES
    command = [
        "bench-serve",
        "--fleet",
        "2,1",
        "--times",
        str(file),
        "--mix",
        "4:1",
        "--slots",
        "2",
        "--requests",
        "800",
    ]
    command += ["--requests", "800", "--json", "-"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    jsonschema.validate(found, json_schema(Survey))
    assert [row["machines"] for row in found["rows"]] == [1, 2]
    one, two = found["rows"]
    assert all(rate == pytest.approx(one["goodput"]["two choices"], rel=0.12) for rate in one["goodput"].values())
    assert all(two["goodput"][name] > 1.7 * one["goodput"][name] for name in ("two choices", "least loaded"))


@pytest.mark.parametrize("document", [None, [], {}, {"times": None}, {"times": {"stage_s": []}}])
def test_what_holds_no_times_is_refused(tmp_path: Path, document: object) -> None:
    file = tmp_path / "a.json" if document is None else saved(tmp_path / "a.json", document)
    with pytest.raises(RequestError) as found:
        read_times(file)
    assert found.value.field == "times"


def test_a_fleet_without_times_is_refused() -> None:
    done = CliRunner().invoke(cli, ["bench-serve", "--fleet", "8", "--json", "-"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["field"] == "times"


def test_more_requests_than_the_machines_can_draw_are_not_in_time() -> None:
    fleet = Fleet(4, MIX, TIMES, Assumed(requests=1500, seconds=1))
    router = Router(name="two choices")
    assert fleet.in_time(0.2 * fleet.full, router) > 0.99
    assert fleet.in_time(1.5 * fleet.full, router) < 0.8
