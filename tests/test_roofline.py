"""What a pass must do at the least: as torch counts it, and as a small graph shows by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, RequestError
from latentrt.engines.graphs.roofline import CEILINGS, Ceilings, roofline, rooflines
from latentrt.engines.spec import Array
from latentrt.export.cli import inspect
from latentrt.export.graphs import golden
from latentrt.export.networks import loading

H200 = CEILINGS["h200"]


def torch_operations(component: str, checkpoint: Path, inputs: Mapping[str, Array]) -> int:
    """Return what torch counts for a component of a checkpoint."""
    folder = checkpoint / {"vae_decoder": "vae", "vae_encoder": "vae"}.get(component, component)
    module = loading.load(component, folder)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*(torch.from_numpy(array) for array in inputs.values()))
    return int(counter.get_total_flops())


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_the_arithmetic_is_what_torch_counts(component: str, sd1_checkpoint: Path, sd1_bundle: Path) -> None:
    bundle = Bundle.open(sd1_bundle)
    spec = bundle.manifest.components[component]
    inputs, _ = golden.load_golden(bundle.root / spec.golden)
    inputs = {tensor.name: inputs[tensor.name] for tensor in spec.inputs}
    sizes = {
        axis: size
        for tensor in spec.inputs
        for axis, size in zip(tensor.shape, inputs[tensor.name].shape, strict=True)
        if isinstance(axis, str)
    }
    found = roofline(bundle.path(spec.graph), sizes, H200)
    expected = torch_operations(component, sd1_checkpoint, golden.widen(inputs))
    assert sum(cost.operations for cost in found.costs) == expected > 0


def small_graph(path: Path) -> Path:
    """Write softmax(x @ w + b), reshaped: x is (rows, 8), w (8, 4)."""
    weights = {"w": torch.ones(8, 4), "b": torch.ones(4)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Softmax", ["sum"], ["soft"]),
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Concat", ["shape", "shape_end"], ["whole"], axis=0),
        helper.make_node("Reshape", ["soft", "whole"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2, 2])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()]
        + [numpy_helper.from_array(torch.tensor([2, 2]).numpy(), "shape_end")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), str(path))
    return path


def test_a_node_takes_the_longer_of_its_arithmetic_and_its_bytes(tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx")
    slow = Ceilings(bytes_per_s=1.0, operations_per_s=2.0, eight_bit_per_s=4.0)
    found = roofline(path, {"rows": 3}, slow)
    costs = {cost.operator: cost for cost in found.costs}
    assert set(costs) == {"MatMul", "Add", "Softmax"}  # a view moves nothing
    product, added, soft = costs["MatMul"], costs["Add"], costs["Softmax"]
    assert (product.operations, product.bytes) == (2 * 3 * 8 * 4, 2 * (3 * 8 + 8 * 4 + 3 * 4))
    assert (added.operations, added.bytes) == (0, 2 * (3 * 4 + 4 + 3 * 4))
    assert product.seconds == max(product.operations / 2, product.bytes)
    assert (product.fused, added.fused, soft.fused) == (False, True, False)
    assert found.seconds == product.seconds + added.seconds + soft.seconds
    assert found.fused_s == found.seconds - added.seconds
    busy = roofline(path, {"rows": 3}, Ceilings(bytes_per_s=1e9, operations_per_s=2.0, eight_bit_per_s=4.0))
    assert next(cost.seconds for cost in busy.costs if cost.operator == "MatMul") == product.operations / 2


def test_in_8_bits_layers_with_weights_move_half_of_what_they_multiply_and_compute_faster(tmp_path: Path) -> None:
    path = small_graph(tmp_path / "model.onnx")
    slow = Ceilings(bytes_per_s=1.0, operations_per_s=1e9, eight_bit_per_s=1e9)
    half, small = (
        {cost.operator: cost for cost in roofline(path, {"rows": 3}, slow, eight_bit=eight_bit).costs}
        for eight_bit in (False, True)
    )
    assert small["MatMul"].seconds == small["MatMul"].bytes == (3 * 8 + 8 * 4) + 2 * (3 * 4)
    assert (small["Add"], small["Softmax"]) == (half["Add"], half["Softmax"])
    fast = Ceilings(bytes_per_s=1e9, operations_per_s=2.0, eight_bit_per_s=4.0)
    found = {cost.operator: cost for cost in roofline(path, {"rows": 3}, fast, eight_bit=True).costs}
    assert found["MatMul"].seconds == found["MatMul"].operations / 4


def test_the_time_grows_with_the_picture(sd1_bundle: Path) -> None:
    bundle = Bundle.open(sd1_bundle)
    small, large = (rooflines(bundle, H200, size=(side, side)) for side in (32, 64))
    for name in bundle.manifest.components:
        text = name == "text_encoder"
        assert (large[name].seconds == small[name].seconds) if text else (large[name].seconds > small[name].seconds)
        assert 0 < large[name].fused_s < large[name].seconds


def test_an_axis_without_a_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="rows"):
        roofline(small_graph(tmp_path / "model.onnx"), {}, H200)


def test_the_command_prints_what_the_function_returns(sd1_bundle: Path) -> None:
    result = CliRunner().invoke(inspect, [str(sd1_bundle), "--roofline", "h100", "--json"])
    assert result.exit_code == 0, result.output
    found = rooflines(Bundle.open(sd1_bundle), CEILINGS["h100"])
    document = json.loads(result.output)
    assert {name: row["seconds"] for name, row in document.items()} == {
        name: pass_.seconds for name, pass_ in found.items()
    }
    eight = CliRunner().invoke(inspect, [str(sd1_bundle), "--roofline", "h100", "--eight-bit", "--json"])
    assert eight.exit_code == 0 and all(
        0 < row["seconds"] < document[name]["seconds"] for name, row in json.loads(eight.output).items()
    )
    shown = CliRunner().invoke(inspect, [str(sd1_bundle), "--roofline", "h100"])
    assert shown.exit_code == 0 and "unet on h100" in shown.output


@pytest.mark.parametrize("arguments", [["--roofline", "abacus"], ["--roofline", "h100", "--size", "33x32"]])
def test_what_there_is_no_ceiling_or_no_size_for_is_refused(arguments: list[str], sd1_bundle: Path) -> None:
    result = CliRunner().invoke(inspect, [str(sd1_bundle), *arguments])
    assert isinstance(result.exception, RequestError)
