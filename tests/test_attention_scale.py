"""The scale of attention on TensorRT: what its parser makes of a graph that names none, and what we give it instead."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.compiled import scale_queries
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.logger import LogScope

HEADS = (40, 64, 80, 160)  # of SD 1.5, and of SD 2 and SDXL
TYPES = {TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32}


def attention(head: int, *, kind: int = TensorProto.FLOAT16, **attributes: Any) -> Any:
    """One attention of two heads on the same tokens, whose head size the graph tells."""
    shape, names = [1, 2, 6, head], ("queries", "keys", "values")
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in names]
    nodes.append(helper.make_node("Attention", names, ["y"], name="attention", **attributes))
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name in "xy")
    return helper.make_model(
        helper.make_graph(nodes, "attention", [x], [y]), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )


def factors(model: Any) -> list[Any]:
    """Return what TensorRT-RTX's parser multiplies queries and keys by, computed as it computes it."""
    try:
        library = trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    log = LogScope(library)
    builder = library.Builder(log.logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log.logger)
    assert parser.parse(model.SerializeToString())
    known: dict[str, Any] = {}
    products = []
    for layer in (network.get_layer(number) for number in range(network.num_layers)):
        taken = [known.get(layer.get_input(place).name) for place in range(layer.num_inputs)]
        if layer.type == library.LayerType.ELEMENTWISE:
            products += [value for value in taken if value is not None]
        else:
            known[layer.get_output(0).name] = computed(library, layer, taken)
    return products


def computed(library: Any, layer: Any, taken: list[Any]) -> Any:
    """Return the constant that a layer computes, in its own precision; None where it is none."""
    kind, own = layer.type, layer.get_output(0).dtype
    if kind == library.LayerType.CONSTANT:
        layer.__class__ = library.IConstantLayer
        return np.array(layer.weights if isinstance(layer.weights, np.ndarray) else layer.weights.numpy())
    if not taken or taken[0] is None:
        return None
    if kind == library.LayerType.CAST:
        return taken[0].astype(np.float16 if own == library.DataType.HALF else np.float32)
    if kind == library.LayerType.UNARY:
        layer.__class__ = library.IUnaryLayer
        operations = {library.UnaryOperation.SQRT: np.sqrt, library.UnaryOperation.RECIP: np.reciprocal}
        return operations[layer.op](taken[0])
    return taken[0] if kind in (library.LayerType.UNSQUEEZE, library.LayerType.SHUFFLE) else None


def scale_of(model: Any) -> float:
    return float(np.prod([np.float64(np.ravel(factor)[0]) for factor in factors(model)]))


@pytest.mark.parametrize("head", HEADS)
def test_the_parser_rounds_the_scale_in_fp16_several_times_and_ours_is_rounded_once(head: int) -> None:
    exact = head**-0.5
    before = abs(scale_of(attention(head)) / exact - 1)
    ours = attention(head)
    scale_queries(ours)
    after = abs(scale_of(ours) / exact - 1)
    assert after < before < 1e-3
    assert after <= (0 if head == 64 else 2.2e-4)


@pytest.mark.parametrize("head", HEADS)
def test_the_scores_stay_what_they_are(head: int) -> None:
    """In float32, where nothing is rounded so: the edit is made as if the graph were fp16."""
    model = attention(head, kind=TensorProto.FLOAT)
    x = np.random.default_rng(head).standard_normal((1, 2, 6, head)).astype(np.float32)
    (expected,) = run(model, x)
    halved = attention(head)
    scale_queries(halved)
    (found,) = run(halved, x.astype(np.float16))
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-3)


def run(model: Any, x: np.ndarray) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )


def test_a_scale_that_is_named_is_the_factor() -> None:
    model = attention(40, scale=0.3)
    scale_queries(model)
    assert scale_of(model) == float(np.float16(0.3))


def test_queries_in_8_bits_take_the_factor_into_their_scale() -> None:
    model, expected = attention(40), attention(40)
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT16, [], [0.03125]),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
    ]
    for one in (model, expected):
        one.graph.initializer.extend(constants)
        one.graph.node.insert(3, helper.make_node("QuantizeLinear", ["queries", "scale", "zero"], ["eight"]))
        one.graph.node.insert(4, helper.make_node("DequantizeLinear", ["eight", "scale", "zero"], ["rounded"]))
        one.graph.node[5].input[0] = "rounded"
    scale_queries(model)
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in expected.graph.node]
    assert next(a.f for a in model.graph.node[-1].attribute if a.name == "scale") == 1.0
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 40)).astype(np.float16)
    np.testing.assert_allclose(run(model, x)[0], run(expected, x)[0], atol=5e-3)


def test_what_is_computed_in_float32_stays_as_it_is() -> None:
    model = attention(40, kind=TensorProto.FLOAT)
    before = model.SerializeToString()
    scale_queries(model)
    assert model.SerializeToString() == before


def test_every_attention_of_an_fp16_bundle_is_scaled(sd1_half_bundle: Path) -> None:
    bundle = Bundle.open(sd1_half_bundle)
    for component in bundle.manifest.components.values():
        model = onnx.load(str(bundle.path(component.graph)), load_external_data=False)
        counts = Counter(node.op_type for node in model.graph.node)
        scale_queries(model)
        after = Counter(node.op_type for node in model.graph.node)
        assert after - counts == Counter({"Mul": counts["Attention"]} if counts["Attention"] else {})
