"""Traced graphs are kept without their weights: what decides a graph is in its key, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.bundle.weight_map import AS_NAMED, TRANSPOSED, arrange
from latentrt.engines.spec import Array
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import _job, _tokenizers, _with_tokens
from latentrt.export.graphs import kept_traces
from latentrt.export.networks.weight_places import COUNT, Place, StandIns
from latentrt.export.work.finished import MARKERS, Finished, graph_path
from latentrt.export.work.worker import Worker, start_worker
from tests.conftest import MakeControlled
from tests.tiny import save_tiny

CONFIG: dict[str, Any] = {"_class_name": "UNet", "_name_or_path": "a", "layers_per_block": 2, "torch_dtype": "float16"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own. Returns the folder of traces, which is not there yet."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / kept_traces.FOLDER


def made(worker: Worker, checkpoint: Path, root: Path, *, precision: Any = "fp32") -> tuple[Finished, bytes]:
    """Have the smallest network of a checkpoint exported, and return its graph."""
    opened = open_checkpoint(str(checkpoint))
    (root / MARKERS).mkdir(parents=True)
    job = _job(_with_tokens(opened, _tokenizers(opened)), "text_encoder", root, precision)
    finished = worker.run(job)
    return finished, (root / graph_path("text_encoder")).read_bytes()


def test_another_checkpoint_of_the_same_config_has_the_graph_that_tracing_it_would_give(
    sd1_checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    with start_worker("torch") as worker:
        first, graph = made(worker, sd1_checkpoint, tmp_path / "first")
        (entry,) = cache.iterdir()
        kept, theirs = made(worker, other, tmp_path / "kept")
        half, _ = made(worker, other, tmp_path / "half", precision="fp16")
        assert list(cache.iterdir()) == [entry]
        damaged = bytearray(entry.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        entry.write_bytes(damaged)
        fresh, again = made(worker, other, tmp_path / "fresh")
        threads = len(list(Path(f"/proc/{worker._process.pid}/task").iterdir()))
    assert [each.graph for each in (first, kept, half, fresh)] == ["traced", "kept", "kept", "traced"]
    assert theirs == again
    assert theirs != graph  # the weights are its own
    assert kept.error == fresh.error and half.error is not None
    assert threads == 1  # where a library's threads run, a fork may wait for a lock that nobody gives back


def test_networks_that_did_not_change_are_kept_when_a_controlnet_is_added(
    controlled: MakeControlled, tmp_path: Path
) -> None:
    """The bundle of one ControlNet after that of two: its UNet takes the same, and its ControlNets are of one kind."""
    two = controlled("sd1", "")
    given = f"third={two.networks['edges']}"
    command = ["export", str(two.checkpoint), str(tmp_path / "bundle"), "--controlnet", given, "--no-build", "--json"]
    result = subprocess.run([sys.executable, "-m", "latentrt", *command], check=True, capture_output=True, text=True)
    components = json.loads(result.stdout)["components"]
    assert {name: row["graph"] for name, row in components.items()} == dict.fromkeys(components, "kept")
    assert {"unet", "controlnet_third"} < set(components)
    assert all(row["error"] < 1e-5 for row in components.values())


def test_a_key_holds_what_decides_the_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key(config: dict[str, Any] = CONFIG, told: object = (1, "x")) -> str:
        return kept_traces.key_of(config, told)

    plain = key()
    assert key(CONFIG | {"_name_or_path": "b", "torch_dtype": "float32", "transformers_version": "9"}) == plain
    others = {key(CONFIG | {"layers_per_block": 3}), key(CONFIG | {"_class_name": "VAE"}), key(told=(2, "x"))}
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces.importlib.metadata, "version", lambda name: "0")
        others.add(key())
    (tmp_path / "trace.py").write_text("changed = 1")
    with monkeypatch.context() as patch:
        patch.setattr(kept_traces, "CODE", (tmp_path,))
        others.add(key())
        (tmp_path / "trace.py").write_text("changed = 2")
        others.add(key())
    assert len(others | {plain}) == 7


def test_what_is_kept_is_whole_and_the_oldest_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_traces.kept_graph("a") is None
    monkeypatch.setattr(kept_traces, "LARGEST_BYTES", 3000)
    for age, key in enumerate("abc"):
        kept_traces.keep_graph(key, key.encode() * 1000)
        os.utime(cache / key, (age, age))
    assert kept_traces.kept_graph("a") is None
    assert kept_traces.kept_graph("b") == b"b" * 1000  # which makes it the youngest
    kept_traces.keep_graph("d", b"d" * 1000)
    assert {key for key in "abcd" if kept_traces.kept_graph(key)} == {"b", "d"}
    (cache / "d").write_bytes((cache / "d").read_bytes()[:-1])
    assert kept_traces.kept_graph("d") is None


def test_a_cache_that_cannot_be_written_keeps_nothing_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "below"))
    kept_traces.keep_graph("a", b"a")
    assert kept_traces.kept_graph("a") is None


MOVES: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda array: array,
    "turned": lambda array: array.T,
    "a copy of it": lambda array: array.T.copy(),
    "one row": lambda array: array[-1],
    "flipped": lambda array: array[::-1],
    "another axis": lambda array: array[None, ..., None],
    "expanded": lambda array: np.broadcast_to(array, (2, *array.shape)),
    "every other": lambda array: array[..., ::2],
}


@given(shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4), data=st.data())
def test_a_place_gives_of_any_weight_what_was_moved_of_its_stand_in(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    stand_ins = StandIns()
    numbers = [stand_ins.numbers(f"w{at}", shape) for at, shape in enumerate(shapes)]
    at = data.draw(st.integers(0, len(shapes) - 1))
    move = MOVES[data.draw(st.sampled_from(sorted(MOVES)))]
    stand_in = numbers[at]
    assert stand_in is not None and np.isnan(stand_in).all()
    place = stand_ins.find(move(stand_in))
    weight = np.random.default_rng(0).standard_normal(shapes[at], dtype=np.float32)
    assert place is not None and place.weight == f"w{at}"
    np.testing.assert_array_equal(place.of(weight), move(weight))
    if (layout := place.layout(shapes[at])) is not None:
        np.testing.assert_array_equal(arrange(weight, layout), move(weight))


@pytest.mark.parametrize("move", sorted(MOVES.keys() - {"a copy of it"}))
def test_a_view_of_memory_that_stands_for_a_weight_tells_its_part_of_it(move: str) -> None:
    stand_ins = StandIns()
    memories = {name: np.empty((4, 6), np.float32) for name in ("first", "second")}
    for name, memory in memories.items():
        stand_ins.memory(name, memory.__array_interface__["data"][0], memory.size)
    weight = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    for name, memory in memories.items():
        place = stand_ins.find(MOVES[move](memory))
        assert place is not None and place.weight == name
        np.testing.assert_array_equal(place.of(weight), MOVES[move](weight))
    assert stand_ins.find(np.zeros((4, 6), np.float32)) is None


def test_a_layout_is_that_of_the_whole_weight() -> None:
    place = Place(weight="w", shape=(3, 2), strides=(2, 1))
    assert place.layout((3, 2)) == AS_NAMED
    assert replace(place, shape=(2, 3), strides=(1, 2)).layout((3, 2)) == TRANSPOSED
    assert replace(place, strides=(1, 3)).layout((3, 2)) is None
    assert place.layout((6, 2)) is None
    assert place.layout((6,)) is None


def _graph(array: Array) -> ir.Model:
    value = ir.Value(name="x", const_value=ir.tensor(array), type=ir.TensorType(ir.DataType.FLOAT))
    return ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)


def test_a_graph_with_numbers_that_were_computed_from_weights_is_refused() -> None:
    stand_ins = StandIns()
    first, second = stand_ins.numbers("first", (4,)), stand_ins.numbers("second", (4,))
    assert first is not None and second is not None
    assert stand_ins.places(_graph(np.ones(4, np.float32))) == {}
    assert stand_ins.places(_graph(second))["x"].weight == "second"
    with np.errstate(invalid="ignore"):
        raised = first + 1
    for computed in (raised, np.concatenate([first, second]), first[[0, 2, 1, 3]]):
        with pytest.raises(RuntimeError, match="x"):
            stand_ins.places(_graph(computed))


def test_weights_for_which_no_numbers_are_left_stay_unnumbered() -> None:
    stand_ins = StandIns()
    assert stand_ins.numbers("most", (COUNT - 1,)) is not None
    assert stand_ins.numbers("too many", (2,)) is None
    last = stand_ins.numbers("last", (1,))
    assert last is not None and np.isnan(last).all()
