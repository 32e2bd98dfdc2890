"""Graphs written for ONNX Runtime's CUDA kernels compute what they did, with their channels last from end to end."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from latentrt.engines.graphs.cuda_rewrites import use_cuda_kernels
from latentrt.engines.spec import Array
from tests.cuda_kernels import standard
from tests.graphs import model_of

WIDE = 16


def run(model: onnx.ModelProto, **inputs: Any) -> list[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def count(model: onnx.ModelProto) -> Counter[str]:
    """Count the nodes by operator, without those that lay weights out again when the graph is built."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return Counter(node.op_type for node in model.graph.node if not set(node.input[:1]) & weights)


def block(name: str, x: str, width: int, constants: dict[str, Array], *, groups: int = 4) -> list[Any]:
    """Return a normalisation, its SiLU and a convolution."""
    generator = np.random.default_rng(len(constants))
    constants |= {
        f"{name}.scale": generator.standard_normal(width).astype(np.float32),
        f"{name}.shift": generator.standard_normal(width).astype(np.float32),
        f"{name}.w": (generator.standard_normal((WIDE, width, 3, 3)) / 8).astype(np.float32),
        f"{name}.b": generator.standard_normal(WIDE).astype(np.float32),
    }
    normal = [x, f"{name}.scale", f"{name}.shift"]
    return [
        helper.make_node("GroupNormalization", normal, [f"{name}.n"], num_groups=groups, epsilon=1e-3),
        helper.make_node("Sigmoid", [f"{name}.n"], [f"{name}.g"]),
        helper.make_node("Mul", [f"{name}.n", f"{name}.g"], [f"{name}.s"]),
        helper.make_node("Conv", [f"{name}.s", f"{name}.w", f"{name}.b"], [name], name, pads=[1, 1, 1, 1]),
    ]


def network(*, groups: int = 4) -> onnx.ModelProto:
    """Return what a UNet is made of: a time embedding, a transformer's rows, halving, doubling and a skip."""
    generator = np.random.default_rng(7)
    constants: dict[str, Array] = {
        "in.w": generator.standard_normal((WIDE, 4, 3, 3)).astype(np.float32),
        "down.w": (generator.standard_normal((WIDE, WIDE, 3, 3)) / 8).astype(np.float32),
        "out.w": (generator.standard_normal((4, 2 * WIDE, 1, 1)) / 8).astype(np.float32),
        "half": np.array(0.5, np.float32),
        "rows": np.array([0, -1, WIDE]),
        "two": np.array([2]),
        "three": np.array([3]),
    }
    middle = np.random.default_rng(8).standard_normal((WIDE, WIDE)).astype(np.float32) / 4
    constants["project"] = middle
    nodes = [
        helper.make_node("Conv", ["x", "in.w"], ["in"], "in", pads=[1, 1, 1, 1]),
        *block("first", "in", WIDE, constants, groups=groups),
        helper.make_node("Gemm", ["time", "project"], ["time.projected"]),
        helper.make_node("Unsqueeze", ["time.projected", "two"], ["time.high"]),
        helper.make_node("Unsqueeze", ["time.high", "three"], ["time.wide"]),
        helper.make_node("Add", ["first", "time.wide"], ["timed"]),
        *block("second", "timed", WIDE, constants, groups=groups),
        helper.make_node("Add", ["in", "second"], ["sum"]),
        helper.make_node("Div", ["sum", "half"], ["halved"]),
        # a transformer works on rows of pixels
        helper.make_node("Transpose", ["halved"], ["pixels"], perm=[0, 2, 3, 1]),
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Reshape", ["pixels", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "project"], ["projected"]),
        helper.make_node("Reshape", ["projected", "shape"], ["pictures"]),
        helper.make_node("Transpose", ["pictures"], ["back"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["back", "halved"], ["attended"]),
        helper.make_node("Conv", ["attended", "down.w"], ["down"], "down", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Shape", ["attended"], ["sizes"], start=0),
        helper.make_node("Resize", ["down", "", "", "sizes"], ["up"], mode="nearest", **RESIZE),
        helper.make_node("Concat", ["up", "attended"], ["both"], axis=1),
        *block("third", "both", 2 * WIDE, constants, groups=groups),
        helper.make_node("Concat", ["third", "attended"], ["last"], axis=1),
        helper.make_node("Conv", ["last", "out.w"], ["y"], "out"),
    ]
    inputs = {"x": ["rows", 4, "height", "width"], "time": ["rows", WIDE]}
    return model_of(nodes, inputs, {"y": ["rows", 4, "height", "width"]}, constants)


RESIZE = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}


def feeds() -> dict[str, Array]:
    generator = np.random.default_rng(9)
    shapes = {"x": (2, 4, 6, 10), "time": (2, WIDE)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_picture_is_laid_out_again_where_it_enters_and_where_it_leaves() -> None:
    model = network()
    expected = run(model, **feeds())
    use_cuda_kernels(model)
    counts = count(model)
    assert counts["Transpose"] == 2
    # Of the network's sums one is of an embedding, and the others are taken elsewhere too or are not normalised.
    assert (counts["NhwcConv"], counts["GroupNorm"], counts["SkipGroupNorm"]) == (6, 2, 1)
    assert not counts.keys() & {"Conv", "GroupNormalization", "Sigmoid"}
    taken = [len(node.input) for node in model.graph.node if node.op_type == "NhwcConv"]
    assert sorted(taken) == [2, 2, 2, 2, 3, 3], "the sum with an embedding adds the bias of what it is of"
    assert all(attribute.i == 1 for node in model.graph.node for attribute in node.attribute if attribute.name in ONES)
    np.testing.assert_allclose(run(standard(model), **feeds()), expected, atol=2e-5)


ONES = {"activation", "channels_last"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("others", ["nothing", "the sum", "the convolution", "an output"])
def test_the_bias_of_a_convolution_is_added_with_the_sum_that_alone_takes_it(others: str, swapped: bool) -> None:
    generator = np.random.default_rng(6)
    shapes = {"w": (WIDE, WIDE, 3, 3), "b": (WIDE,), "scale": (WIDE,), "shift": (WIDE,)}
    constants = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    further = {"the sum": "total", "the convolution": "made"}.get(others, "normal")
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["made"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["x", "made"] if swapped else ["made", "x"], ["total"]),
        helper.make_node("GroupNormalization", ["total", "scale", "shift"], ["normal"], num_groups=4, epsilon=1e-3),
        helper.make_node("Mul", ["normal", further], ["y"]),
    ]
    axes = ["rows", WIDE, "height", "width"]
    outputs = {"y": axes} | ({"made": axes} if others == "an output" else {})
    model = model_of(nodes, {"x": axes}, outputs, constants)
    x = generator.standard_normal((2, WIDE, 5, 3)).astype(np.float32)
    expected = run(model, x=x)
    use_cuda_kernels(model)
    (convolution,) = [node for node in model.graph.node if node.op_type == "NhwcConv"]
    (norm,) = [node for node in model.graph.node if node.op_type == "SkipGroupNorm"]
    alone = others in ("nothing", "the sum")
    assert (len(convolution.input), len(norm.input)) == ((2, 5) if alone else (3, 4))
    for found, right in zip(run(standard(model), x=x), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-4)


def test_a_sum_of_a_convolution_with_itself_keeps_its_bias() -> None:
    generator = np.random.default_rng(6)
    shapes = {"w": (WIDE, WIDE, 1, 1), "b": (WIDE,), "scale": (WIDE,), "shift": (WIDE,)}
    constants = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["made"]),
        helper.make_node("Add", ["made", "made"], ["total"]),
        helper.make_node("GroupNormalization", ["total", "scale", "shift"], ["y"], num_groups=4, epsilon=1e-3),
    ]
    axes = ["rows", WIDE, "height", "width"]
    model = model_of(nodes, {"x": axes}, {"y": axes}, constants)
    x = generator.standard_normal((2, WIDE, 5, 3)).astype(np.float32)
    expected = run(model, x=x)
    use_cuda_kernels(model)
    np.testing.assert_allclose(run(standard(model), x=x), expected, atol=2e-5)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_sum_of_rows_is_computed_with_its_normalisation(swapped: bool, kept: bool) -> None:
    generator = np.random.default_rng(5)
    shapes = {"w": (WIDE, WIDE), "b": (WIDE,), "scale": (WIDE,), "shift": (WIDE,)}
    constants = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["b", "product"] if swapped else ["product", "b"], ["biased"]),
        helper.make_node("Add", ["rest", "biased"] if swapped else ["biased", "rest"], ["total"]),
        helper.make_node("LayerNormalization", ["total", "scale", "shift"], ["normal"], epsilon=1e-3),
        helper.make_node("Mul", ["normal", "total"] if kept else ["normal", "normal"], ["y"]),
    ]
    axes = ["rows", "tokens", WIDE]
    model = model_of(nodes, {"x": axes, "rest": axes}, {"y": axes}, constants)
    x, rest = generator.standard_normal((2, 2, 3, WIDE)).astype(np.float32)
    expected = run(model, x=x, rest=rest)
    use_cuda_kernels(model)
    counts = count(model)
    assert (counts["SkipLayerNormalization"], counts["LayerNormalization"]) == (1, 0)
    np.testing.assert_allclose(run(standard(model), x=x, rest=rest), expected, atol=2e-5)


def without_kernel(model: onnx.ModelProto) -> set[str]:
    """Return the operators of a graph that ONNX Runtime 1.31.1's CUDA provider has no kernel for.

    A kernel serves the version of an operator that it begins with; one that says where it ends, those between too.
    """
    versions = {found.domain: found.version for found in model.opset_import}
    return {name for name, since in (_since(node, versions) for node in model.graph.node) if not _has(name, since)}


def _since(node: Any, versions: dict[str, int]) -> tuple[str, int]:
    if node.domain:
        return f"{node.domain}.{node.op_type}", 1
    return node.op_type, onnx.defs.get_schema(node.op_type, versions[""]).since_version


def _has(name: str, since: int) -> bool:
    return any(start == since or (end is not None and start <= since <= end) for start, end in KERNELS.get(name, []))


KERNELS: dict[str, list[tuple[int, int | None]]] = json.loads(
    (Path(__file__).parent / "data" / "onnxruntime_cuda_kernels.json").read_text()
)


def test_every_operator_has_a_kernel(sd1_bundle: Path) -> None:
    graphs = [network(), *(onnx.load(path) for path in sorted((sd1_bundle / "onnx").glob("*/model.onnx")))]
    assert len(graphs) > 3
    for model in graphs:
        odd = without_kernel(model)
        use_cuda_kernels(model)
        assert without_kernel(model) <= {"GroupNormalization"}  # where groups are odd it is taken apart
        assert odd <= {"GroupNormalization"}
    assert not without_kernel(graphs[0])


def test_groups_of_an_odd_number_of_channels_leave_pictures_as_they_are() -> None:
    model = network(groups=16)
    expected = run(model, **feeds())
    use_cuda_kernels(model)
    counts = count(model)
    assert (counts["Conv"], counts["NhwcConv"], counts["GroupNorm"]) == (6, 0, 0)
    np.testing.assert_allclose(run(model, **feeds()), expected, atol=2e-5)


@pytest.mark.parametrize(("width", "made"), [(1280, 1), (1216, 0)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gated_gelu_is_one_operator_of_the_widths_that_there_are(width: int, made: int, swapped: bool) -> None:
    generator = np.random.default_rng(3)
    weights, bias = generator.standard_normal((8, 2 * width)), generator.standard_normal(2 * width)
    halves, product = ["left", "right"], ["gate", "left"] if swapped else ["left", "gate"]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["rows"]),
        helper.make_node("Add", ["b", "rows"] if swapped else ["rows", "b"], ["biased"]),
        helper.make_node("Split", ["biased"], halves, axis=-1, num_outputs=2),
        helper.make_node("Gelu", ["right"], ["gate"]),
        helper.make_node("Mul", product, ["y"], "gated"),
    ]
    constants = {"w": weights.astype(np.float32), "b": bias.astype(np.float32)}
    model = model_of(nodes, {"x": ["rows", "tokens", 8]}, {"y": ["rows", "tokens", width]}, constants)
    x = generator.standard_normal((2, 3, 8)).astype(np.float32)
    expected = run(model, x=x)
    use_cuda_kernels(model)
    assert count(model)["BiasSplitGelu"] == made
    assert count(model)["Gelu"] == 1 - made
    np.testing.assert_allclose(run(standard(model), x=x), expected, rtol=1e-5, atol=1e-5)


def test_a_normalisation_of_rows_of_pixels_is_taken_too() -> None:
    """As the VAE's attention has it: (rows, channels, pixels)."""
    generator = np.random.default_rng(4)
    constants = {
        "w": generator.standard_normal((WIDE, 4, 1, 1)).astype(np.float32),
        "scale": generator.standard_normal(WIDE).astype(np.float32),
        "shift": generator.standard_normal(WIDE).astype(np.float32),
        "flat": np.array([0, WIDE, -1]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["made"], "made"),
        helper.make_node("Reshape", ["made", "flat"], ["pixels"]),
        helper.make_node("GroupNormalization", ["pixels", "scale", "shift"], ["normal"], num_groups=2, epsilon=1e-6),
        helper.make_node("Transpose", ["normal"], ["y"], perm=[0, 2, 1]),
    ]
    model = model_of(nodes, {"x": ["rows", 4, "high", "wide"]}, {"y": ["rows", "pixels", WIDE]}, constants)
    x = generator.standard_normal((2, 4, 3, 5)).astype(np.float32)
    expected = run(model, x=x)
    use_cuda_kernels(model)
    assert (count(model)["GroupNorm"], count(model)["GroupNormalization"]) == (1, 0)
    np.testing.assert_allclose(run(standard(model), x=x), expected, atol=1e-5)
