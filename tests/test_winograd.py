"""Convolutions by Winograd's method: torch's result at every size, and only where they pay."""

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

from latentrt.engines.graphs.winograd import FILTERS, INPUTS, LEAST_CHANNELS, VECTOR, transform_filters, use_winograd
from tests.graphs import model_of

SIDES = st.integers(1, 13)


def convolution(weights: Any, bias: Any = None, **attributes: Any) -> onnx.ModelProto:
    """Return the graph of a 3 x 3 convolution of a picture of any size."""
    out, channels = weights.shape[:2]
    constants = {"weights": weights, **({} if bias is None else {"bias": bias})}
    node = helper.make_node("Conv", ["x", *constants], ["y"], **({"pads": [1, 1, 1, 1]} | attributes))
    inputs = {"x": ["rows", channels * attributes.get("group", 1), "height", "width"]}
    return model_of([node], inputs, {"y": ["rows", out, "made_height", "made_width"]}, constants)


def run(model: onnx.ModelProto, x: Any) -> Any:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3), height=SIDES, width=SIDES, inputs=st.integers(1, 3), outputs=st.integers(1, 3),
    biased=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_convolution_by_winograd_is_torchs(
    rows: int, height: int, width: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    channels, out = VECTOR * inputs, VECTOR * outputs
    x = generator.standard_normal((rows, channels, height, width), dtype=np.float32)
    weights = generator.standard_normal((out, channels, 3, 3), dtype=np.float32)
    bias = generator.standard_normal(out, dtype=np.float32) if biased else None
    model = convolution(weights, bias)
    assert use_winograd(model, Path(), least_channels=VECTOR) == 1
    assert {tuple(t.dims)[-2:] for t in model.graph.initializer if len(t.dims) == 4} == {(6, 1), (1, 3), (1, 1)}
    taken = None if bias is None else torch.from_numpy(bias)
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(weights), taken, padding=1).numpy()
    np.testing.assert_allclose(run(model, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_many_channels_round_little() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1, 256, 16, 16), dtype=np.float32)
    weights = generator.standard_normal((256, 256, 3, 3), dtype=np.float32)
    model = convolution(weights, np.zeros(256, np.float32))
    assert use_winograd(model, Path()) == 1
    exact = torch.nn.functional.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weights).double(), padding=1)
    np.testing.assert_allclose(run(model, x), exact.numpy(), rtol=0, atol=2e-6 * float(exact.abs().max()))


def test_the_matrices_are_a_convolution() -> None:
    """Four outputs of three taps in exact numbers: the sum over products of what the paper calls A, G and B."""
    rows = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=float)
    found = np.einsum("rt,tf,ti->rfi", rows, FILTERS, INPUTS.astype(float))
    expected = np.stack([np.eye(3, 6, row) for row in range(4)])
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_filters_are_rounded_once() -> None:
    weights = np.random.default_rng(0).standard_normal((2, 3, 3, 3)).astype(np.float32)
    made = transform_filters(weights)
    assert (made.dtype, made.shape) == (np.float32, (6, 2, 3, 1, 3))
    exact = np.einsum("tk,oikw->toiw", FILTERS, weights.astype(np.float64))[:, :, :, None]
    np.testing.assert_array_equal(made, exact.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((LEAST_CHANNELS, LEAST_CHANNELS - VECTOR, 3, 3), {}),
        ((LEAST_CHANNELS - VECTOR, LEAST_CHANNELS, 3, 3), {}),
        ((LEAST_CHANNELS + 1, LEAST_CHANNELS, 3, 3), {}),
        ((LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), {"strides": [2, 2]}),
        ((LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), {"pads": [0, 0, 0, 0]}),
        ((LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        ((2 * LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), {"group": 2}),
        ((LEAST_CHANNELS, LEAST_CHANNELS, 1, 1), {"pads": [0, 0, 0, 0]}),
    ],
    ids=["few inputs", "few outputs", "odd", "strided", "bare", "dilated", "grouped", "of one tap"],
)
def test_another_convolution_stays(shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    model = convolution(np.ones(shape, np.float32), **attributes)
    before = model.SerializeToString()
    assert use_winograd(model, Path()) == 0
    assert model.SerializeToString() == before


def test_a_convolution_whose_weights_are_computed_stays() -> None:
    model = convolution(np.ones((LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), np.float32))
    model.graph.node.insert(0, helper.make_node("Neg", ["weights"], ["negative"]))
    model.graph.node[1].input[1] = "negative"
    assert use_winograd(model, Path()) == 0


def test_what_onnxruntime_saves_stays_in_vectors_and_opens_again(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((LEAST_CHANNELS, LEAST_CHANNELS, 3, 3), dtype=np.float32)
    model, x = convolution(weights), generator.standard_normal((1, LEAST_CHANNELS, 6, 5), dtype=np.float32)
    expected = run(model, x)
    use_winograd(model, Path())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    saved = onnx.load(str(tmp_path / "saved.onnx"))
    assert kinds(saved)["Add"] <= 3, "all other sums are part of a convolution"
    assert {node.domain for node in saved.graph.node if node.op_type == "Conv"} == {"com.microsoft.nchwc"}
    session = onnxruntime.InferenceSession(str(tmp_path / "saved.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
