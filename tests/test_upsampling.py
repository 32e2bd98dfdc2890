"""A doubling and a convolution in four smaller ones: torch's result at every size, doubled or not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs.cpu_rewrites import split_upsampling
from tests.graphs import model_of

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
SIDES = st.integers(1, 9)


def upsampler(
    weights: Any, bias: Any, *, by_size: bool, resize: dict[str, Any] = NEAREST, **attributes: Any
) -> onnx.ModelProto:
    """Return the graph of an upsampling and a convolution; by_size: it takes the wanted height and width."""
    out, channels = weights.shape[:2]
    tail = ["", "scales"] if not by_size else ["", "", "sizes"]
    nodes = [
        helper.make_node("Resize", ["x", *tail], ["large"], **resize),
        helper.make_node("Conv", ["large", "weights", "bias"], ["y"], **({"pads": [1, 1, 1, 1]} | attributes)),
    ]
    constants: dict[str, Any] = {"weights": weights, "bias": bias}
    inputs: dict[str, Any] = {"x": ["rows", channels, "height", "width"]}
    if by_size:
        nodes.insert(0, helper.make_node("Shape", ["x"], ["kept"], start=0, end=2))
        nodes.insert(1, helper.make_node("Concat", ["kept", "wanted"], ["sizes"], axis=0))
        inputs["wanted"] = [2]
    else:
        constants["scales"] = np.array([1, 1, 2, 2], dtype=np.float32)
    output = ["rows", out, "large_height", "large_width"]
    return model_of(nodes, inputs, {"y": output}, constants, types={"wanted": onnx.TensorProto.INT64})


def run(model: onnx.ModelProto, inputs: dict[str, Any]) -> Any:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 2), channels=st.integers(1, 20), out=st.integers(1, 20), height=SIDES, width=SIDES)
def test_a_doubled_picture_is_convolved_as_torch_does(
    rows: int, channels: int, out: int, height: int, width: int
) -> None:
    generator = np.random.default_rng(channels)
    x = generator.standard_normal((rows, channels, height, width), dtype=np.float32)
    weights = generator.standard_normal((out, channels, 3, 3), dtype=np.float32)
    bias = generator.standard_normal(out, dtype=np.float32)
    model = upsampler(weights, bias, by_size=False)
    assert split_upsampling(model, Path()) == 1
    assert kinds(model) == {"Conv": 4, "Concat": 1, "DepthToSpace": 1}
    assert {tensor.name for tensor in model.graph.initializer}.isdisjoint({"weights", "bias"})
    large = torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.conv2d(large, torch.from_numpy(weights), torch.from_numpy(bias), padding=1).numpy()
    np.testing.assert_allclose(run(model, {"x": x}), expected, atol=1e-5 * np.sqrt(9 * channels))


def test_an_upsampling_to_a_computed_size_stays() -> None:
    model = upsampler(np.ones((2, 3, 3, 3), np.float32), np.ones(2, np.float32), by_size=True)
    assert split_upsampling(model, Path()) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
        {"pads": [0, 0, 0, 0]},
        {"resize": NEAREST | {"coordinate_transformation_mode": "half_pixel"}},
        {"resize": NEAREST | {"mode": "linear"}},
    ],
    ids=["strided", "dilated", "bare", "half pixels", "linear"],
)
def test_another_upsampling_or_convolution_stays(other: dict[str, Any]) -> None:
    model = upsampler(np.ones((2, 3, 3, 3), np.float32), np.ones(2, np.float32), by_size=False, **other)
    before = model.SerializeToString()
    assert split_upsampling(model, Path()) == 0
    assert model.SerializeToString() == before


def test_an_upsampling_that_others_look_at_too_stays() -> None:
    model = upsampler(np.ones((2, 3, 3, 3), np.float32), np.ones(2, np.float32), by_size=False)
    model.graph.node.append(helper.make_node("Neg", ["large"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["rows", 3, "h", "w"]))
    assert split_upsampling(model, Path()) == 0


def test_a_real_decoder_is_split_and_agrees(demo_bundle: Path) -> None:
    opened = Bundle.open(demo_bundle)
    path = opened.path(opened.manifest.components["vae_decoder"].graph)
    split = onnx.load(str(path))
    before = kinds(split)["Resize"]
    assert split_upsampling(split, path) == before == kinds(split)["DepthToSpace"] > 0
    graphs = (str(path), split.SerializeToString())
    sessions = [onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) for graph in graphs]
    for shape in ((1, 4, 8, 8), (2, 4, 5, 7), (1, 4, 16, 9)):
        latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        expected, found = (session.run(None, {"latent_sample": latents})[0] for session in sessions)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
