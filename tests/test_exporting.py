"""The run of an export: resuming, locking, targets that are taken, full disks. Mostly from ONNX graphs: quick."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, CheckpointError, EngineError, NotInstalledError, RequestError
from latentrt.export import export as exporting
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.external_data import read_graph
from latentrt.export.sources.hub import download
from latentrt.export.work.finished import MARKERS
from latentrt.runtime.pipeline import Pipeline
from tests.conftest import Make
from tests.refused import about, caused_by
from tests.tiny import NETWORKS

# As on a machine that has neither: not to be found, and not to be imported.
BLOCK_TORCH = """
import importlib.util, sys
def hidden(name):
    return name.split(".")[0] in ("torch", "diffusers")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if hidden(name) else find(name, package)
class Block:
    def find_spec(self, name, path=None, target=None):
        if hidden(name):
            raise ModuleNotFoundError(f"{name} is not here", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def graphs(sd1_bundle: Path) -> str:
    """A directory in optimum's layout: the graphs of a bundle."""
    return str(sd1_bundle / "onnx")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "latentrt", "export", *map(str, arguments)]


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_a_killed_export_leaves_nothing_and_the_next_run_resumes(sd1_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    running = subprocess.Popen(command(sd1_checkpoint, target), stderr=subprocess.DEVNULL, start_new_session=True)
    marker = f".bundle.partial-*/{MARKERS}/text_encoder.json"
    while not list(tmp_path.glob(marker)):
        assert running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not target.exists()
    assert _ends(running.pid), "a process of the killed export is still running"
    again = subprocess.run(command(sd1_checkpoint, target, "--json"), check=True, capture_output=True, text=True)
    summary = json.loads(again.stdout)
    resumed = {name: row["resumed"] for name, row in summary["components"].items()}
    assert resumed["text_encoder"]
    assert not resumed["vae_encoder"]
    assert set(Bundle.open(target).manifest.components) == set(NETWORKS)
    assert leftovers(target) == []


def _ends(session: int, seconds: float = 10.0) -> bool:
    """Tell whether every process of a session is gone within a time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True)
        if not [line for line in listed.stdout.splitlines() if " Z" not in line]:
            return True
        time.sleep(0.1)
    return False


def test_a_damaged_part_of_an_earlier_run_is_made_again(
    graphs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_publish", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            export_checkpoint(graphs, tmp_path / "b", backends=())
    (staged,) = tmp_path.glob(".b.partial-*")
    with (staged / "onnx" / "unet" / "model.onnx").open("ab") as file:
        file.write(b"x")
    exported = export_checkpoint(graphs, tmp_path / "b", backends=())
    assert set(exported.resumed) == set(NETWORKS) - {"unet"}


def test_the_same_export_again_does_nothing(graphs: str, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    export_checkpoint(graphs, target)
    before = (target / "manifest.json").stat().st_mtime_ns
    exported = export_checkpoint(graphs, target)
    assert exported.already_there
    assert (target / "manifest.json").stat().st_mtime_ns == before
    assert leftovers(target) == []
    again = subprocess.run(command(graphs, target, "--json"), check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["already_there"]


def test_another_bundle_is_replaced_only_when_asked(graphs: str, sd2_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    export_checkpoint(str(sd2_bundle / "onnx"), target, backends=())
    with pytest.raises(BundleError, match="--overwrite"):
        export_checkpoint(graphs, target, backends=())
    assert Bundle.open(target).manifest.family == "sd2"
    export_checkpoint(graphs, target, backends=(), overwrite=True)
    assert Bundle.open(target).manifest.family == "sd1"
    assert leftovers(target) == []


def test_what_is_not_a_bundle_is_never_replaced(graphs: str, tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.txt").write_text("years of work")
    with pytest.raises(BundleError, match=r"'.*/thesis'"):
        export_checkpoint(graphs, target, overwrite=True)
    assert (target / "chapter.txt").read_text() == "years of work"


def test_an_empty_directory_is_a_good_target(graphs: str, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    export_checkpoint(graphs, tmp_path / "bundle", backends=())
    Bundle.open(tmp_path / "bundle")


def test_two_exports_at_once_make_one_bundle(graphs: str, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    both = [subprocess.Popen(command(graphs, target, "--json"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    summaries = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(summary["already_there"] for summary in summaries) == [False, True]
    assert leftovers(target) == []


def test_a_backend_that_cannot_build_here_is_refused_before_anything_is_exported(
    graphs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "staged", None)
    with pytest.raises(EngineError, match="'cuda'"):
        export_checkpoint(graphs, tmp_path / "bundle", precision="fp32", backends=("cuda",))
    assert not (tmp_path / "bundle").exists()


def test_graphs_of_another_precision_name_the_option(graphs: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--precision fp32"):
        export_checkpoint(graphs, tmp_path / "bundle", precision="fp16", backends=())


def test_a_full_disk_is_one_sentence(graphs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_configs", full)
    with pytest.raises(BundleError, check=caused_by(errno.ENOSPC)):
        export_checkpoint(graphs, tmp_path / "bundle", backends=())
    assert not (tmp_path / "bundle").exists()


def test_a_disk_that_fills_up_under_the_graphs_is_one_sentence(
    graphs: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes what was free before the export."""
    monkeypatch.setattr(exporting, "require_room", lambda *_: "")
    with pytest.raises(BundleError, match="full"):  # another process has met it, and only its sentence comes here
        export_checkpoint(graphs, small_disk / "bundle")


def test_a_disk_that_is_too_small_is_one_sentence(graphs: str, small_disk: Path) -> None:
    result = subprocess.run(command(graphs, small_disk / "bundle"), capture_output=True, text=True, check=False)
    assert list(small_disk.iterdir()) == []
    assert result.returncode == 2
    assert re.search(r"\d GB .*--no-build", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr


def test_missing_libraries_name_the_extra(
    sd1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name))
    with pytest.raises(NotInstalledError, match="diffusers") as caught:
        export_checkpoint(str(sd1_checkpoint), tmp_path / "bundle")
    assert caught.value.install == "pip install 'latentrt[export]'"


def test_a_missing_library_is_no_fault_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "onnx", None)
    for read in (lambda: download("user/model", revision=None), lambda: read_graph(tmp_path / "model.onnx")):
        with pytest.raises(NotInstalledError) as caught:
            read()
        assert caught.value.install == "pip install 'latentrt[export]'"


def test_graphs_are_adopted_without_torch(graphs: str, sd1_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK_TORCH)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert blocked.returncode != 0
    subprocess.run(command(graphs, tmp_path / "bundle"), env=environment, check=True, capture_output=True)
    ours, theirs = Bundle.open(tmp_path / "bundle").manifest, Bundle.open(sd1_bundle).manifest
    assert (ours.family, ours.latents, ours.schedule) == (theirs.family, theirs.latents, theirs.schedule)
    assert {n: (c.inputs, c.outputs) for n, c in ours.components.items()} == {
        n: (c.inputs, c.outputs) for n, c in theirs.components.items()
    }
    assert "torch" not in ours.provenance.tools


def test_what_a_graph_does_not_give_is_not_promised(graphs: str, sd1_bundle: Path, tmp_path: Path) -> None:
    """As optimum exports it: without the layers that clip-skip chooses among."""
    shutil.copytree(graphs, tmp_path / "onnx")
    file = tmp_path / "onnx" / "text_encoder" / "model.onnx"
    model = onnx.load(str(file))
    model.graph.output.remove(next(value for value in model.graph.output if value.name == "skipped_hidden_states"))
    onnx.save(model, str(file))
    ours = export_checkpoint(str(tmp_path / "onnx"), tmp_path / "bundle").manifest.components["text_encoder"]
    full = Bundle.open(sd1_bundle).manifest.components["text_encoder"].outputs
    assert [spec for spec in full if spec not in ours.outputs] == [
        spec for spec in full if spec.name == "skipped_hidden_states"
    ]
    with Pipeline.load(tmp_path / "bundle", "cpu") as pipe:
        assert pipe("a red circle", steps=2, seed=0).pixels.any()
        with pytest.raises(RequestError, check=about("clip_skip")):
            pipe("a red circle", steps=2, clip_skip=1)


def give_each_layer(file: Path) -> None:
    """Have a text encoder's graph give the states of each layer by itself, as optimum exports SDXL's."""
    model = onnx.load(str(file))
    skipped = next(value for value in model.graph.output if value.name == "skipped_hidden_states")
    layers = skipped.type.tensor_type.shape.dim[1].dim_value + 1
    model.graph.output.remove(skipped)
    for layer in range(layers + 1):
        number = np.array(min(max(layers - 1 - layer, 0), layers - 2), dtype=np.int64)
        place = onnx.numpy_helper.from_array(number, f"place.{layer}")
        name = f"hidden_states.{layer}"  # the first and the last are read by nobody
        model.graph.initializer.append(place)
        model.graph.node.append(onnx.helper.make_node("Gather", [skipped.name, place.name], [name], axis=1))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 3))
    for node in model.graph.node:  # whose name the joined ones shall have
        for names in (node.input, node.output):
            names[:] = ["stacked" if name == skipped.name else name for name in names]
    onnx.save(model, str(file))


def test_states_of_each_layer_become_those_that_sdxl_reads(made: Make, tmp_path: Path) -> None:
    _, original = made("sdxl", "")
    shutil.copytree(original / "onnx", tmp_path / "onnx")
    for name in ("text_encoder", "text_encoder_2"):
        give_each_layer(tmp_path / "onnx" / name / "model.onnx")
    export_checkpoint(str(tmp_path / "onnx"), tmp_path / "bundle")
    call = {"steps": 2, "seed": 3, "guidance": 3.0, "clip_skip": 1}
    pictures = []
    for bundle in (original, tmp_path / "bundle"):
        with Pipeline.load(bundle, "cpu") as pipe:
            pictures.append(pipe("a red circle", **call).pixels)
    assert np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "'demo'"),
        (lambda path: path.mkdir(), "model_index.json"),
        (lambda path: path.write_bytes(b"x"), "safetensors"),
    ],
)
def test_the_command_refuses_with_one_sentence_and_code_2(tmp_path: Path, make: Any, told: str) -> None:
    make(tmp_path / "checkpoint")
    result = subprocess.run(
        command(tmp_path / "checkpoint", tmp_path / "bundle"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert told in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not (tmp_path / "bundle").exists()


def test_the_summary_is_plain_data_and_a_table(graphs: str, tmp_path: Path) -> None:
    result = subprocess.run(command(graphs, tmp_path / "a", "--json"), capture_output=True, text=True, check=True)
    assert result.stderr == ""
    unet = json.loads(result.stdout)["components"]["unet"]
    assert unet["error"] is None  # optimum's layout holds no weights to compare the graph with
    assert set(unet) >= {"weights_bytes", "seconds", "peak_rss_bytes", "peak_rss_over_weights", "error", "resumed"}
    result = subprocess.run(command(graphs, tmp_path / "b"), capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in (*NETWORKS, f"'{tmp_path / 'b'}'"))
    assert re.search(r"\bunet: .*\d", result.stderr)


def test_a_moved_bundle_still_opens(sd1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_bundle, tmp_path / "elsewhere")
    bundle = Bundle.open(tmp_path / "elsewhere")
    for name in bundle.manifest.files:
        bundle.path(name, check="hash")
