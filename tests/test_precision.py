"""fp16 graphs: what stays in float32 and why, that the rest is float16, and that the whole computes the checkpoint."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.weight_map import GraphWeights, read_weights, restore
from latentrt.engines.errors import CheckpointError, EngineError
from latentrt.engines.spec import Array, TensorSpec
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.verify.verify import verify
from latentrt.export.cli import inspect
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs import golden, ranges
from latentrt.export.graphs import half_precision as precision
from latentrt.export.graphs import run as sessions
from latentrt.export.graphs import trace as graphs
from latentrt.export.graphs.external_data import save_graph
from latentrt.export.graphs.ranges import LARGEST, LIMIT, Ranges
from latentrt.export.graphs.types import FLOAT, HALF, allows, formal, infer_types, load_typed, schema
from latentrt.export.networks import loading

# Over the output's range: a handful of layers, each rounded to 11 bits.
CLOSE = 1e-2


class Model:
    """A torch module as its float32 graph with one golden pair."""

    def __init__(self, folder: Path, module: nn.Module, **inputs: torch.Tensor) -> None:
        module.eval().requires_grad_(False)
        self.outputs = module(*inputs.values())
        self.inputs = inputs
        self.pairs: list[golden.Pair] = [
            ({name: t.half().numpy() for name, t in inputs.items()}, {"y": self.outputs.numpy()})
        ]
        (folder / "wide").mkdir(parents=True)
        self.path = folder / "wide" / "model.onnx"
        self.half = folder / "half" / "model.onnx"
        model = graphs.trace_graph(module, inputs, self.takes("float32"), self.gives("float32"), axes={})
        save_graph(model, self.path)

    def takes(self, dtype: Any = "float16") -> list[TensorSpec]:
        return [TensorSpec(name=name, dtype=dtype, shape=tuple(t.shape)) for name, t in self.inputs.items()]

    def gives(self, dtype: Any = "float16") -> list[TensorSpec]:
        return [TensorSpec(name="y", dtype=dtype, shape=tuple(self.outputs.shape))]

    def narrow(self) -> precision.Narrowed:
        return precision.narrow_graph(
            self.path, self.half, self.pairs, component="toy", takes=self.takes(), gives=self.gives()
        )

    def narrow_all(self) -> float:
        """Put everything in float16, as `module.half()` would. Returns the error."""
        model = load_typed(self.path)
        precision.narrow(model, [], takes=self.takes(), gives=self.gives())
        save_graph(model, self.half)
        return ranges.rounding_error(self.half, self.pairs, component="toy")

    def graph(self) -> ir.Model:
        return load_typed(self.half)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers that float16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


def kinds(model: ir.Model) -> dict[str, str]:
    """Return the type of each node's first output by the node's name."""
    return {str(node.name): str(node.outputs[0].dtype) for node in model.graph}


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().sqrt()


class Loud(nn.Module):
    """Two linear layers and a root; what is between the second and that is far beyond float16."""

    def __init__(self, loudness: float = 6e4) -> None:
        super().__init__()
        self.quiet, self.loud = nn.Linear(16, 16), nn.Linear(16, 16)
        self.root, self.last = Root(), nn.Linear(16, 8)
        with torch.no_grad():
            self.loud.weight *= loudness

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.root(self.loud(self.quiet(x))))
        return result


class Growing(nn.Module):
    """A residual stream each of whose terms is in range, and whose sum is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        with torch.no_grad():
            for layer in self.layers:
                layer.bias += 15_000 * torch.linspace(-1, 1, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = x
        for layer in self.layers:
            stream = stream + layer(x)
        return torch.tanh(stream / 1e5)


class Shouting(nn.Module):
    """Attention whose queries and keys are in range, and whose logits are not. Each token finds itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = key = 1000 * x[:, None]
        return nn.functional.scaled_dot_product_attention(query, key, x[:, None])[:, 0]


class Offset(nn.Module):
    """A signal of size one on top of 1000, where float16 counts in halves."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.full((16,), 1e3))
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.norm(x + self.offset))
        return result


class Dividing(nn.Module):
    """A constant that is zero in float16, and a weight that is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        with torch.no_grad():
            self.first.weight *= 1e7
            self.first.bias *= 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.first(1e-7 * x))
        return result


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def test_layers_beyond_float16_stay_in_float32_and_no_others(tmp_path: Path) -> None:
    model = Model(tmp_path, Loud(), x=tokens(4, 16))
    assert model.narrow_all() == float("inf")
    narrowed = model.narrow()
    assert narrowed.float32_layers == ("loud", "root")
    assert narrowed.largest > LARGEST
    assert narrowed.error < CLOSE
    assert kinds(model.graph()) == {
        "quiet/Gemm": "FLOAT16",
        "quiet/Gemm/float": "FLOAT",
        "loud/Gemm": "FLOAT",
        "root/Relu": "FLOAT",
        "root/Sqrt": "FLOAT",
        "root/Sqrt/float16": "FLOAT16",
        "last/Gemm": "FLOAT16",
    }


def test_nothing_is_kept_where_everything_fits(tmp_path: Path) -> None:
    model = Model(tmp_path, Loud(loudness=1.0), x=tokens(4, 16))
    narrowed = model.narrow()
    assert narrowed.float32_layers == ()
    assert narrowed.largest < 100
    assert set(kinds(model.graph()).values()) == {"FLOAT16"}
    assert {value.dtype for value in model.graph().graph.initializers.values()} == {HALF}


def test_sums_that_leave_the_range_are_kept_though_their_terms_do_not(tmp_path: Path) -> None:
    model = Model(tmp_path, Growing(), x=tokens(4, 16))
    assert model.narrow_all() == float("inf")
    narrowed = model.narrow()
    assert narrowed.error < CLOSE
    found = kinds(model.graph())
    assert {found[name] for name in found if name.endswith("Gemm")} == {"FLOAT16"}
    # each term reaches 15000; from the second sum on the stream is beyond the limit
    assert [name for name, kind in found.items() if name.startswith("Add") and kind == "FLOAT16"] == ["Add"]


def test_attention_stays_in_float32_where_its_logits_are_beyond(tmp_path: Path) -> None:
    model = Model(tmp_path, Shouting(), x=tokens(1, 6, 32))
    query = (1000 * model.inputs["x"]).half().numpy()
    with np.errstate(over="ignore"):
        assert np.isinf(query @ query.swapaxes(1, 2)).any()  # numpy sums in float16, as some kernels do
    narrowed = model.narrow()
    assert narrowed.float32_layers == ("Attention",)
    assert narrowed.error < CLOSE
    (attention,) = (node for node in model.graph().graph if node.op_type == "Attention")
    assert {value.dtype for value in attention.inputs if value is not None} == {ir.DataType.FLOAT}


def test_where_float16_loses_the_signal_only_matrix_work_is_left_in_it(tmp_path: Path) -> None:
    model = Model(tmp_path, Offset(), x=tokens(4, 16))
    assert model.narrow_all() > golden.TOLERANCES["fp16"]
    narrowed = model.narrow()
    assert narrowed.largest < LIMIT
    assert narrowed.float32_layers == ("Add", "norm")
    assert narrowed.error < CLOSE
    assert kinds(model.graph())["last/Gemm"] == "FLOAT16"


def test_constants_and_weights_that_float16_cannot_hold_keep_their_layers(tmp_path: Path) -> None:
    model = Model(tmp_path, Dividing(), x=tokens(4, 16))
    narrowed = model.narrow()
    assert narrowed.float32_layers == ("Mul", "first")
    assert narrowed.error < CLOSE


def test_an_output_beyond_float16_names_the_option(tmp_path: Path) -> None:
    model = Model(tmp_path, nn.Linear(16, 8).requires_grad_(False).apply(_amplify), x=tokens(4, 16))
    with pytest.raises(CheckpointError, match=r"^toy: .* infinity\b.* --precision fp32"):
        model.narrow()


def _amplify(layer: Any) -> None:
    layer.weight *= 6e5


def test_what_onnxruntime_hides_on_the_cpu_is_seen(tmp_path: Path) -> None:
    """It computes chains of float16 nodes in float32 there: 300 * 300 * x comes back from beyond the range."""

    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 300 * 300 / 300 / 300

    model = Model(tmp_path, Chain(), x=tokens(4, 16))
    error = model.narrow_all()
    seen = sessions.run_session(sessions.open_session(model.half), model.pairs[0][0])
    assert np.isfinite(seen["y"]).all()
    assert error == float("inf")
    assert model.narrow().error < CLOSE


def test_each_node_rounds_as_numpy_does_in_float16(tmp_path: Path) -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                x = x * 1.37 / 1.7
            return x

    model = Model(tmp_path, Chain(), x=tokens(64, 16))
    values = np.asarray(model.pairs[0][0]["x"])
    for _ in range(10):
        values = values * np.float16(1.37) / np.float16(1.7)
    expected = np.asarray(model.pairs[0][1]["y"])
    by_hand = float(np.abs(values - expected).max() / np.abs(expected).max())
    assert model.narrow_all() == pytest.approx(by_hand, rel=1e-6)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 600), st.integers(1, 9), st.integers(0, 99))
def test_the_largest_logit_is_that_of_the_whole_product(
    batch: int, heads: int, queries: int, keys: int, seed: int
) -> None:
    query, key = tokens(batch, heads, queries, 4, seed=seed), tokens(batch, heads, keys, 4, seed=seed + 1)
    found = ranges.largest_logit(query.numpy(), key.numpy())
    assert found == pytest.approx(float((query @ key.mT / 4**0.5).abs().max()), rel=1e-5)
    assert ranges.largest_logit(query.numpy(), key.numpy(), 2.0) == pytest.approx(4 * found, rel=1e-5)


def test_a_graph_in_range_is_what_torch_exports_in_half(sd1_checkpoint: Path, sd1_half_bundle: Path) -> None:
    bundle = Bundle.open(sd1_half_bundle)
    spec = bundle.manifest.components["unet"]
    module = loading.load("unet", sd1_checkpoint / "unet").half()
    arrays, _ = golden.load_golden(bundle.root / spec.golden)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    axes = {"latent_height": (4, 1), "latent_width": (4, 1)}
    theirs = graphs.trace_graph(module, inputs, spec.inputs, spec.outputs, axes=axes)
    ours = ir.load(bundle.root / spec.graph)
    assert Counter(node.op_type for node in ours.graph) == Counter(node.op_type for node in theirs.graph)
    found, expected = constants(ours), constants(theirs)
    assert set(found) == set(expected)
    for place, values in expected.items():
        np.testing.assert_array_equal(found[place], values, err_msg=str(place))


def constants(model: ir.Model) -> dict[tuple[str, int], Array]:
    """Return what the nodes read of weights, by node and input: layers with equal weights may share an initializer."""
    return {
        (str(node.name), place): value.const_value.numpy()
        for node in model.graph
        for place, value in enumerate(node.inputs)
        if value is not None and value.is_initializer() and value.const_value is not None
    }


def test_a_bundle_says_how_far_it_is_from_the_checkpoint(sd1_half_bundle: Path) -> None:
    for component in Bundle.open(sd1_half_bundle).manifest.components.values():
        assert component.error is not None and 1e-5 < component.error < golden.TOLERANCES["fp16"]
        assert component.largest_activation is not None and component.largest_activation < LIMIT
        assert component.float32_layers == ()
        assert component.float32_note() is None


def well_typed(model: ir.Model) -> None:
    """Check that each node's inputs are of one type wherever the standard says so, as a strongly typed network must."""
    written = [value.dtype for value in model.graph.outputs]
    for node in model.graph:
        rules, bound = schema(node), {}
        for place, value in enumerate(node.inputs):
            if value is not None:
                rule = formal(rules.inputs, place)
                assert value.dtype is not None and allows(rules, rule, value.dtype), node
                assert bound.setdefault(rule.type_str, value.dtype) == value.dtype, node
    infer_types(model)
    assert [value.dtype for value in model.graph.outputs] == written


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(component=st.sampled_from(["text_encoder", "unet", "vae_decoder", "vae_encoder"]), data=st.data())
def test_any_choice_of_float32_layers_makes_a_well_typed_graph(
    sd1_bundle: Path, sd1_half_bundle: Path, component: str, data: st.DataObject
) -> None:
    wide, half = (Bundle.open(path).manifest.components[component] for path in (sd1_bundle, sd1_half_bundle))
    model = load_typed(sd1_bundle / wide.graph)
    nodes = [node for node in model.graph if any(value.dtype == FLOAT for value in node.outputs)]
    kept = data.draw(st.sets(st.sampled_from(nodes)), label="kept") if nodes else set()
    precision.narrow(model, kept, takes=half.inputs, gives=half.outputs)
    well_typed(model)
    assert {value.name for value in model.graph.outputs} == {tensor.name for tensor in half.outputs}
    assert all(value.dtype == FLOAT for node in kept for value in node.outputs)


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_matrix_work_alone_is_more_exact_and_leaves_attention_whole(
    component: str, sd1_bundle: Path, sd1_half_bundle: Path, tmp_path: Path
) -> None:
    wide, half = (Bundle.open(path).manifest.components[component] for path in (sd1_bundle, sd1_half_bundle))
    model = load_typed(sd1_bundle / wide.graph)
    kept = precision.all_but_matrix_work(model, Ranges(values={}, logits={}))
    precision.narrow(model, kept, takes=half.inputs, gives=half.outputs)
    well_typed(model)
    for node in model.graph:
        if node.op_type in precision.MATRIX_WORK:
            assert node.outputs[0].dtype == HALF
        if node.op_type == "Attention":  # bias, reshape and transpose stand between it and its products
            for value in node.inputs[:3]:
                before = list(_until_product(value))
                assert "Cast" not in before and before[-1] == "MatMul"
    save_graph(model, tmp_path / "model.onnx")
    pair = golden.load_golden(sd1_half_bundle / half.golden)
    error = ranges.rounding_error(tmp_path / "model.onnx", [pair], component=component)
    assert half.error is not None and error < half.error


def _until_product(value: ir.Value | None) -> Iterator[str]:
    while value is not None and (node := value.producer()) is not None:
        yield node.op_type
        if node.op_type == "MatMul":
            return
        value = next(each for each in node.inputs if each is not None and not each.is_initializer())


# The norms whose outputs are made loud, the activations behind them, and what takes the loud numbers of those.
LOUD = {
    name: tuple(f"{block}.{layer}" for layer in ("norm2", "nonlinearity", "conv2"))
    for name, block in (("unet", "down_blocks.0.resnets.0"), ("vae_decoder", "decoder.up_blocks.0.resnets.0"))
}


@pytest.fixture(scope="module")
def loud_bundle(sd1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 bundle of a checkpoint in which an activation of UNet and VAE takes and gives values beyond float16."""
    folder = tmp_path_factory.mktemp("loud")
    checkpoint = shutil.copytree(sd1_checkpoint, folder / "checkpoint")
    for part, layers in (("unet", LOUD["unet"]), ("vae", LOUD["vae_decoder"])):
        file = checkpoint / part / "diffusion_pytorch_model.safetensors"
        weights, loud = load_file(file), f"{layers[0]}.weight"
        save_file(weights | {loud: 6e4 * weights[loud]}, file, {"format": "pt"})
    export_checkpoint(str(checkpoint), folder / "bundle", precision="fp16")
    return folder / "bundle"


def test_a_loud_checkpoint_is_exported_with_its_loud_layers_in_float32(loud_bundle: Path) -> None:
    components = Bundle.open(loud_bundle).manifest.components
    assert {name: spec.float32_layers for name, spec in components.items() if spec.float32_layers} == LOUD
    for name in LOUD:
        spec = components[name]
        assert spec.largest_activation is not None and spec.largest_activation > LARGEST
        assert spec.error is not None and spec.error < CLOSE
        pair = golden.load_golden(loud_bundle / spec.golden)
        assert golden.check_graph(name, loud_bundle / spec.graph, [pair], precision="fp16") < CLOSE


def test_the_record_of_weights_says_which_are_held_at_a_fraction(loud_bundle: Path) -> None:
    """What the loud layer writes to is the residual stream, which the norms of all later layers read."""
    spec = Bundle.open(loud_bundle).manifest.components["unet"]
    assert spec.weights is not None
    record = read_weights(loud_bundle / spec.weights, GraphWeights).weights
    graph = load_typed(loud_bundle / spec.graph).graph.initializers
    checkpoint = load_file(loud_bundle.parent / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    exponents = {name: weight.exponent for name, weight in record.items()}
    assert exponents["down_blocks.0.resnets.0.conv2.weight"] > 0 and exponents["conv_out.weight"] == 0
    for name, weight in record.items():
        tensor = graph[weight.initializer].const_value
        assert tensor is not None
        held = np.ldexp(restore(tensor.numpy(), weight.layout, weight.shape).astype(np.float32), weight.exponent)
        np.testing.assert_allclose(held, checkpoint[name].numpy(), rtol=1e-3, atol=2.0 ** (weight.exponent - 24))


def test_a_mixed_graph_runs_on_the_cpu_in_float32(loud_bundle: Path) -> None:
    bundle = Bundle.open(loud_bundle)
    rows = {row.what: row for row in verify(bundle, backend="cpu")}
    assert all(row.ok for row in rows.values())
    assert rows["unet"].error is not None and rows["unet"].error < 1e-3
    ((directory, record),) = bundle.engine_directories().items()
    engine = ir.load(directory / record.entries["unet"])
    assert HALF not in {value.dtype for value in engine.graph.initializers.values()}


def test_inspect_names_the_layers_in_float32(loud_bundle: Path) -> None:
    result = CliRunner().invoke(inspect, [str(loud_bundle)])
    assert result.exit_code == 0, result.output
    note = "vae_decoder: 3 layers compute in fp32 (its values reach "
    (line,) = (line for line in result.output.splitlines() if line.startswith(note))
    assert line.endswith(f"): {', '.join(LOUD['vae_decoder'])}")


def test_the_strongly_typed_compiler_takes_mixed_graphs(loud_bundle: Path, tmp_path: Path) -> None:
    """TensorRT refuses a node whose inputs are of two types: each must have its casts."""
    try:
        trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    bundle = Bundle.open(shutil.copytree(loud_bundle, tmp_path / "bundle"))
    options = BuildOptions(sizes=((32, 32),), compute_capability="8.9", optimization_level=0)
    record = build_engines(bundle, "tensorrt-rtx", options=options)
    assert set(record.entries) == set(bundle.manifest.components)


def test_a_checkpoint_that_gives_no_numbers_is_refused() -> None:
    outputs = {"sample": np.array([1.0, np.nan]), "other": np.zeros(2)}
    with pytest.raises(CheckpointError, match=r"^vae_decoder: .* sample .* float32\b"):
        golden.require_finite("vae_decoder", outputs)
