"""Denoisers in 8 bits: which nodes, by which scales, what is lost and told of it, and who computes or refuses it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from latentrt import Pipeline
from latentrt.__main__ import cli
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, write_manifest
from latentrt.engines.bundle.quantisation import refusal
from latentrt.engines.errors import CheckpointError, EngineError, RequestError
from latentrt.engines.find import choose
from latentrt.engines.progress import silent
from latentrt.engines.spec import QUANTISED, Quantised
from latentrt.engines.tensorrt import build as builder
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.tensorrt.library import require
from latentrt.engines.verify.verify import verify
from latentrt.export import cli as export_cli
from latentrt.export.demo.scoring import held_out_prompts
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.types import load_typed
from latentrt.export.quantisation import quantise as quantising
from latentrt.export.quantisation.choose import choose_nodes
from latentrt.export.quantisation.levels import LEFT_OUT, Level, find_levels
from latentrt.export.quantisation.quantise import MOST_NOISE, decibels, quantise
from latentrt.export.quantisation.scales import SCHEMES, Scale
from latentrt.runtime.request import Lora
from latentrt.runtime.verify.recorded import draw_recorded
from latentrt.runtime.verify.stages import verify_stages
from tests.lora_files import save
from tests.refused import about
from tests.stand_in import L4, install

KINDS = pytest.mark.parametrize("kind", QUANTISED)


@pytest.fixture(scope="session")
def quantised(workshop: Path, demo_half_bundle: Path) -> Any:
    """Make the demo's fp16 bundle one in 8 bits, once for each kind, with engines for this CPU."""

    def make(kind: Quantised) -> Path:
        target = workshop / f"shapes-{kind}"
        if not target.is_dir():
            beside = target.with_suffix(".made")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(demo_half_bundle, beside, ignore=shutil.ignore_patterns("engines"))
            manifest = quantise(beside, Bundle.open(beside).manifest, kind, draw_recorded, silent)
            write_manifest(beside, msgspec.structs.replace(manifest, precision=kind))
            build_engines(Bundle.open(beside), "cpu")
            with contextlib.suppress(OSError):  # another process of this session was faster
                beside.rename(target)
        return target

    return make


def test_levels_are_those_of_the_checkpoints_names(demo_half_bundle: Path) -> None:
    bundle = Bundle.open(demo_half_bundle)
    model = load_typed(bundle.path(bundle.manifest.components["unet"].graph))
    found = {level.name: level for level in find_levels(model)}
    assert {name: len(level.nodes) for name, level in found.items()} == {
        "convolutions and feed-forward": 47,
        "projections": 56,
        "attention": 14,
    }
    chosen = {node for level in found.values() for node in level.nodes}
    assert not any(set(name.split("/")[0].split(".")) & LEFT_OUT for name in chosen)
    rest = {node.name for node in model.graph if node.op_type in quantising.MATRIX_WORK} - chosen
    assert {"conv_in/Conv", "conv_out/Conv", "time_embedding.linear_1/Gemm"} <= rest
    assert {str(name).split("/")[0].split(".")[-1] for name in rest} == {
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "linear_1",
        "linear_2",
        "proj_out",
        "time_emb_proj",
    }
    assert {"down_blocks.0", "mid_block", "up_blocks.2"} <= {
        block.removesuffix(".resnets").removesuffix(".attentions") for level in found.values() for block in level.blocks
    }


@KINDS
def test_numbers_are_rounded_as_onnx_rounds_them(kind: Quantised) -> None:
    scheme, random = SCHEMES[kind], np.random.default_rng(0)
    numbers = np.concatenate([random.standard_normal(5000) * scale for scale in (1e-3, 1.0, 9.0)]).astype(np.float32)
    numbers = numbers[np.abs(numbers) < 0.0625 * scheme.largest]
    scale = Scale(numbers=np.array(0.0625, np.float16))
    eight = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}[kind]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy")
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.0625]),
        helper.make_tensor("zero", eight, [], [0]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ours = scheme.quantise(numbers, scale.over(1)).astype(np.float32) * np.float32(0.0625)
    np.testing.assert_array_equal(ours, session.run(None, {"x": numbers})[0])


LEVELS = (Level(name="first", nodes=("a.0/Conv", "a.1/Conv", "b.0/Conv")), Level(name="second", nodes=("a.0/MatMul",)))


def losing(**powers: float) -> Any:
    """Return a loss to which each node adds its own power."""

    def loss(names: Collection[str]) -> float:
        return float(sum(powers.get(name.replace("/", "_").replace(".", "_"), 0.0) for name in names) ** 0.5)

    return loss


def test_all_that_stands_it_goes_into_8_bits() -> None:
    chosen, told = choose_nodes(LEVELS, losing(a_0_Conv=1e-4, a_0_MatMul=2e-4), most=0.04)
    assert chosen == ["a.0/Conv", "a.1/Conv", "b.0/Conv", "a.0/MatMul"]
    assert [(one.nodes, one.of, one.kept) for one in told] == [(3, 3, ()), (1, 1, ())]
    assert [one.noise for one in told] == pytest.approx([0.01, 3e-4**0.5])


def test_a_block_that_loses_too_much_stays_in_float16_and_is_named() -> None:
    chosen, told = choose_nodes(LEVELS, losing(a_0_Conv=4e-4, a_1_Conv=0.25, b_0_Conv=1e-4), most=0.04)
    assert chosen == ["a.0/Conv", "b.0/Conv", "a.0/MatMul"]
    assert told[0].kept == ("a.1",) and (told[0].nodes, told[0].of) == (2, 3)
    assert told[0].whole > 0.5 and told[-1].noise == pytest.approx(5e-4**0.5)


def test_a_level_of_which_no_block_stands_it_stays_as_a_whole() -> None:
    chosen, told = choose_nodes(LEVELS, losing(a_0_MatMul=0.25, b_0_Conv=1e-4), most=0.04)
    assert "a.0/MatMul" not in chosen and len(chosen) == 3
    assert (told[1].nodes, told[1].kept, told[1].noise) == (0, ("a.0",), pytest.approx(0.01))


@KINDS
def test_the_bundle_says_what_is_in_8_bits_and_what_it_costs(
    kind: Quantised, quantised: Any, demo_half_bundle: Path
) -> None:
    bundle, half = Bundle.open(quantised(kind)), Bundle.open(demo_half_bundle)
    unet, before = (one.manifest.components["unet"] for one in (bundle, half))
    told = unet.quantised
    assert bundle.manifest.precision == kind and told is not None and told.to == kind
    assert told.nodes == sum(level.nodes for level in told.levels) >= 103
    assert 1e-3 < told.noise <= MOST_NOISE and told.decibels > 30
    assert unet.error is not None and before.error is not None and before.error < unet.error < 0.1
    assert unet.weights is None and not (bundle.root / str(before.weights)).exists()
    assert before.weights_bytes / 2 < unet.weights_bytes < 0.65 * before.weights_bytes
    model = ir.load(bundle.path(unet.graph))
    stored = {value.dtype for value in model.graph.initializers.values()}
    assert SCHEMES[kind].dtype in stored
    assert all(one.quantised is None for name, one in bundle.manifest.components.items() if name != "unet")
    shown = CliRunner().invoke(cli, ["inspect", str(bundle.root)])
    assert f"unet: {told.note()}" in shown.output


@KINDS
def test_the_cpu_computes_it_and_says_how(kind: Quantised, quantised: Any) -> None:
    bundle = Bundle.open(quantised(kind))
    rows = [*verify(bundle, backend="cpu"), *verify_stages(bundle, backend="cpu")]
    assert rows and all(row.ok for row in rows)
    unet = next(row for row in rows if row.what == "unet")
    told = bundle.manifest.components["unet"]
    assert told.quantised is not None and told.quantised.note() in unet.message
    assert unet.limit == pytest.approx(2 * (told.error or 0))
    assert next(row for row in rows if row.what == "text_encoder").limit == 3e-2
    (record,) = bundle.engine_directories().values()
    assert record.key.precision == kind
    assert "float32" in choose("auto", bundle).reason and "float32" in choose("cpu", bundle).reason


def pictures(bundle: Path, count: int) -> tuple[np.ndarray, int]:
    """Draw held-out prompts as the demo is drawn; return the pixels and how many are right."""
    texts, judge = held_out_prompts(count)
    with Pipeline.load(bundle) as pipe:
        drawn = [pipe(text, steps=20, guidance=3.0, seed=seed).pixels[0] for seed, text in enumerate(texts)]
    return np.stack(drawn), sum(judge(place, pixels) for place, pixels in enumerate(drawn))


def test_the_demo_stays_within_35_decibels(quantised: Any, demo_bundle: Path) -> None:
    count = 4
    (expected, _), (found, right) = pictures(demo_bundle, count), pictures(quantised("fp8"), count)
    assert right == count and np.median(decibels(found, expected)) >= 35


@pytest.mark.slow
@pytest.mark.timeout(1800)
@KINDS
def test_all_of_a_hundred_prompts_are_right(kind: Quantised, quantised: Any, demo_bundle: Path) -> None:
    (expected, _), (found, right) = pictures(demo_bundle, 100), pictures(quantised(kind), 100)
    assert right == 100 and np.median(decibels(found, expected)) >= 35


@pytest.mark.parametrize(("kind", "capability"), [("fp8", "8.9"), ("fp8", "12.0"), ("int8", "8.9")])
def test_tensorrt_rtx_compiles_the_stage(kind: Quantised, capability: str, quantised: Any, tmp_path: Path) -> None:
    try:
        library = require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    options = BuildOptions(compute_capability=capability, optimization_level=0)
    compiling = partial(compile_graph, library, device=None)
    bundle = Bundle.open(quantised(kind))
    file, spec = builder._build_one(compiling, bundle, "unet", tmp_path, "tensorrt-rtx", options, silent)
    assert spec.profiles and (tmp_path / file).stat().st_size > 3_000_000


def test_what_cannot_compute_it_refuses() -> None:
    assert isinstance(refusal("fp8", "cuda"), EngineError) and isinstance(refusal("int8", "cuda"), EngineError)
    assert refusal("fp8", "tensorrt", "8.6") is not None and refusal("fp8", "tensorrt-rtx", "7.5") is not None
    for capability in ("8.9", "9.0", "10.0", "12.0"):
        assert refusal("fp8", "tensorrt-rtx", capability) is None
    assert refusal("int8", "tensorrt", "7.0") is not None and refusal("int8", "tensorrt", "8.6") is None
    assert refusal("fp16", "cuda") is refusal("fp32", "tensorrt", "5.0") is refusal("fp8", "cpu") is None


def test_a_gpu_that_has_no_such_units_is_refused_when_building_and_when_opening(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(quantised("fp8"), tmp_path / "shapes"))
    install(monkeypatch, gpu=L4, tensorrt_rtx="1.7.1.116")
    build_engines(bundle, "tensorrt-rtx", options=BuildOptions(references=False))
    assert choose("auto", bundle).backend == "tensorrt-rtx"
    with pytest.raises(EngineError, match=r"8\.9.*8\.6"):
        build_engines(bundle, "tensorrt-rtx", options=BuildOptions(references=False, compute_capability="8.6"))
    install(monkeypatch, gpu=msgspec.structs.replace(L4, compute_capability="8.6"), tensorrt_rtx="1.7.1.116")
    for asked in ("auto", "tensorrt-rtx"):
        with pytest.raises(EngineError, match=r"8\.9.*8\.6"), Pipeline.load(bundle.root, backend=asked):
            pass


def test_weights_in_8_bits_are_not_changed_later(quantised: Any, tmp_path: Path, monkeypatch: Any) -> None:
    bundle = Bundle.open(quantised("fp8"))
    lora = tmp_path / "lora.safetensors"
    save(lora, {})
    with Pipeline.load(bundle.root) as pipe, pytest.raises(RequestError, check=about("loras")):
        pipe("a red circle", steps=1, loras=[Lora(file=str(lora))])
    install(monkeypatch, gpu=L4, tensorrt="11.4.0.106")
    with pytest.raises(EngineError, match="refittable"):
        build_engines(bundle, "tensorrt", options=BuildOptions(refit=True, references=False))


def test_the_export_is_given_what_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class ReachedError(Exception):
        pass

    def reached(*_: Any, draw: Any, precision: str, **__: Any) -> None:
        assert callable(draw) and precision == "fp8"
        raise ReachedError

    monkeypatch.setattr(export_cli, "export_checkpoint", reached)
    done = CliRunner().invoke(cli, ["export", "demo", str(tmp_path / "b"), "--precision", "fp8"])
    assert isinstance(done.exception, ReachedError)


def test_an_export_that_could_not_end_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="draw="):
        export_checkpoint("demo", tmp_path / "b", precision="fp8")
    with pytest.raises(EngineError, match="cuda"):
        export_checkpoint("demo", tmp_path / "b", precision="int8", backends=("cuda",), draw=draw_recorded)
    assert not (tmp_path / "b").exists()


def test_a_graph_without_known_names_is_refused(demo_half_bundle: Path, tmp_path: Path) -> None:
    """As another exporter may give."""
    root = shutil.copytree(demo_half_bundle, tmp_path / "b")
    bundle = Bundle.open(root)
    path = bundle.path(bundle.manifest.components["unet"].graph)
    model = onnx.load(str(path))
    for number, node in enumerate(model.graph.node):
        node.name = f"node {number}"
    onnx.save(model, str(path))
    files = {**bundle.manifest.files, "onnx/unet/model.onnx": quantising.record_file(root, "onnx/unet/model.onnx")}
    manifest = msgspec.structs.replace(bundle.manifest, files=files)
    with pytest.raises(CheckpointError, match="--precision fp16"):
        quantise(root, manifest, "fp8", lambda *_, **__: (np.zeros((6, 8, 8, 3), np.uint8), {"unet": [[]] * 6}), silent)


def test_bench_tells_it(quantised: Any, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = f"bench {quantised('fp8')} --steps 1 --rounds 1 --seconds 1 --cold 0 --json {file}"
    done = CliRunner().invoke(cli, words.split())
    assert done.exit_code == 0, done.output
    told = Bundle.open(quantised("fp8")).manifest.components["unet"].quantised
    assert told is not None and told.note() in done.output
    assert json.loads(file.read_text())["bundle"]["quantised"]["unet"]["nodes"] == told.nodes
