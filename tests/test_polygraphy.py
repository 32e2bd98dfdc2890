"""Bundles in NVIDIA's Polygraphy, the real one: golden pairs, the page's commands, and the first layer that differs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from latentrt.__main__ import cli
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError, NotInstalledError
from latentrt.engines.find import find_engines
from latentrt.engines.verify.layers import NAMED, verify_layers
from latentrt.engines.verify.polygraphy import Exchange, write_golden

PAGE = Path(__file__).parent.parent / "docs" / "polygraphy.md"
POLYGRAPHY = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
# What tensorrt-rtx-cu13, which is a source archive alone, would install beside its bindings.
SHELL = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"


def page_lines() -> list[tuple[dict[str, str], list[str]]]:
    """Return the page's calls of Polygraphy: what is set before it, and the words after it."""
    blocks = PAGE.read_text().split("```sh\n")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].replace("\\\n", " ").splitlines()]
    found = []
    for words in map(shlex.split, lines):
        place = next((i for i, word in enumerate(words) if "=" not in word), 0)
        if words[place : place + 1] == ["polygraphy"]:
            found.append((dict(word.split("=") for word in words[:place]), words[place + 1 :]))
    return found


def needs_gpu(words: list[str]) -> bool:
    return "--trt" in words or words[0] == "debug"


@dataclass(frozen=True)
class Desk:
    """A folder with the demo's bundle as demo/shapes, its golden pairs in golden, and TensorRT-RTX's shell."""

    root: Path
    written: tuple[Exchange, ...]

    def call(self, *words: str, **setting: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.root / "shell"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, **setting}
        return subprocess.run(
            [*POLYGRAPHY, *words], cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def desk(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("desk")
    shutil.copytree(demo_bundle, root / "demo" / "shapes")
    (root / "shell" / "tensorrt_rtx").mkdir(parents=True)
    (root / "shell" / "tensorrt_rtx" / "__init__.py").write_text(SHELL)
    before = Path.cwd()
    os.chdir(root)
    try:
        written = write_golden(Bundle.open("demo/shapes"), Path("golden"))
    finally:
        os.chdir(before)
    return Desk(root, written)


@pytest.mark.parametrize("number", range(len(page_lines())))
def test_a_command_of_the_page_runs_or_has_options_that_there_are(desk: Desk, number: int) -> None:
    setting, words = page_lines()[number]
    if setting:
        pytest.importorskip("tensorrt_rtx_bindings")
    if needs_gpu(words):
        tool = words[: next(i for i, word in enumerate(words) if "/" in word)]
        known = set(desk.call(*tool, "--help").stdout.replace(",", " ").split())
        own = words[: words.index("--check") + 1] if "--check" in words else words
        assert {word for word in own if word.startswith("--")} <= known
        return
    done = desk.call(*words, **setting)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_shows_the_commands_that_are_printed_for_the_unet(desk: Desk) -> None:
    (unet,) = (one for one in desk.written if one.component == "unet")
    shown = [["polygraphy", *words] for _, words in page_lines()]
    assert all(shlex.split(command) in shown for command in unet.commands.values())


def test_what_differs_by_more_than_the_tolerance_fails_in_polygraphy(desk: Desk) -> None:
    from polygraphy.comparator import RunResults

    (one,) = (one for one in desk.written if one.component == "vae_decoder")
    words = shlex.split(one.commands["run"])[1:]
    assert desk.call(*words).returncode == 0
    results = RunResults.load(str(desk.root / one.outputs))
    ((name, (outputs,)),) = results.items()
    moved = RunResults()
    moved.add([{k: np.asarray(v) + 2e-3 * np.abs(v).max() for k, v in outputs.items()}], runner_name=name)
    moved.save(str(desk.root / "moved.json"))
    assert desk.call(*[word.replace(str(one.outputs), "moved.json") for word in words]).returncode != 0


def test_tensorrt_for_rtx_has_no_precisions_to_debug_and_runs_nothing_without_a_gpu(desk: Desk) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    (words,) = (words for _, words in page_lines() if words[0] == "debug")
    refused = desk.call(*words, POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert refused.returncode != 0 and "not available on TensorRT" in refused.stdout + refused.stderr


def test_inspect_prints_nothing_but_json(demo_bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(demo_bundle), "--polygraphy", str(tmp_path), "--json"])
    written = json.loads(done.stdout)
    assert {one["component"] for one in written} == set(Bundle.open(demo_bundle).manifest.components)
    assert all(Path(one[side]).is_file() for one in written for side in ("inputs", "outputs"))


# --- the first layer that differs ---


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(sd1_bundle, tmp_path / "bundle"))


def damage(bundle: Bundle, component: str) -> str:
    """Turn the middle addition of two computed tensors in a built graph into a subtraction; return the node's name."""
    directory, record = find_engines(bundle, "cpu")
    path = directory / record.entries[component]
    model = onnx.load(str(path))
    given = {tensor.name for tensor in model.graph.initializer}
    sums = [node for node in model.graph.node if node.op_type == "Add" and not given & set(node.input)]
    node = sums[len(sums) // 2]
    node.op_type = "Sub"
    onnx.save(model, str(path))
    return str(node.name)


def test_a_damaged_node_is_found_by_its_name(copy: Bundle) -> None:
    name = damage(copy, "unet")
    rows = {row.what: row for row in verify_layers(copy, backend="cpu")}
    assert [what for what, row in rows.items() if not row.ok] == ["unet"]
    first = rows["unet"].layers[0]
    assert (first.node, first.op_type) == (name, "Sub")
    assert first.error > 0.1 and len(first.shape) in (3, 4)
    assert 1 <= len(rows["unet"].layers) <= NAMED


def test_the_command_names_it_too(copy: Bundle) -> None:
    name = damage(copy, "unet")
    done = CliRunner().invoke(cli, ["verify", str(copy.root), "--layers", "--json"])
    assert done.exit_code == 2
    (row,) = (row for row in json.loads(done.stdout) if row["layers"])
    assert row["layers"][0]["node"] == name


def lay_out_anew(bundle: Bundle, factor: float) -> None:
    """Have a picture of a built UNet lie there with its channels last alone, times a factor."""
    directory, record = find_engines(bundle, "cpu")
    path = directory / record.entries["unet"]
    model = onnx.load(str(path))
    canonical = onnx.load(str(bundle.path(bundle.manifest.components["unet"].graph)), load_external_data=False)
    convolved = {node.output[0] for node in canonical.graph.node if node.op_type == "Conv"}
    place = next(i for i, node in enumerate(model.graph.node) if node.output[0] in convolved)
    made = model.graph.node[place].output[0]
    scale = onnx.numpy_helper.from_array(np.array(factor, dtype=np.float32), "factor")
    model.graph.initializer.append(scale)
    for node in model.graph.node:
        node.input[:] = ["again" if name == made else name for name in node.input]
    model.graph.node[place].output[0] = "first"
    laid_out = [
        onnx.helper.make_node("Mul", ["first", "factor"], ["scaled"]),
        onnx.helper.make_node("Transpose", ["scaled"], [f"{made}.last"], perm=[0, 2, 3, 1]),
        onnx.helper.make_node("Transpose", [f"{made}.last"], ["again"], perm=[0, 3, 1, 2]),
    ]
    nodes = [*model.graph.node[: place + 1], *laid_out, *model.graph.node[place + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_picture_with_its_channels_last_is_compared_too(copy: Bundle, factor: float) -> None:
    lay_out_anew(copy, factor)
    (row,) = (row for row in verify_layers(copy, backend="cpu") if row.what == "unet")
    assert [layer.tensor.endswith(".last") for layer in row.layers][:1] == ([] if factor == 1 else [True])


@pytest.mark.parametrize("name", ["sd1_bundle", "sd1_half_bundle"])
def test_no_layer_of_a_whole_bundle_leaves_the_float32_graph(name: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    rows = list(verify_layers(bundle))
    assert all(row.ok and row.error is not None and not row.layers for row in rows), rows
    kinds = {"cpu"} if bundle.manifest.precision == "fp32" else {"cpu", "as stored"}
    assert {(row.what, row.backend) for row in rows} == {
        (one, kind) for one in bundle.manifest.components for kind in kinds
    }


def test_half_precision_shows_in_the_stored_graphs_layers(sd1_half_bundle: Path) -> None:
    """A layer's error is that of 11 bits, not of 24: what is compared is the float16 graph, not its like in float32."""
    rows = {row.what: row for row in verify_layers(Bundle.open(sd1_half_bundle)) if row.backend == "as stored"}
    assert rows["unet"].error is not None and rows["unet"].error > 1e-4


def test_without_polygraphy_the_command_to_install_it_is_named(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    bundle = Bundle.open(sd1_bundle)
    for call in (lambda: verify_layers(bundle), lambda: write_golden(bundle, tmp_path)):
        with pytest.raises(NotInstalledError) as caught:
            call()
        assert caught.value.install == "pip install 'latentrt[polygraphy]'"


def test_a_compiled_engine_has_no_layers_to_compare(sd1_bundle: Path) -> None:
    with pytest.raises(EngineError):
        verify_layers(Bundle.open(sd1_bundle), backend="tensorrt")
