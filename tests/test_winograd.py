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

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs.winograd import FILTERS, INPUTS, LEAST_CHANNELS, VECTOR, transform_filters, use_winograd
from latentrt.engines.onnxruntime import build, keys
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


def test_vaes_are_built_so_and_draw_the_same(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(demo_bundle)
    monkeypatch.setattr(build, "use_winograd", lambda model, path: use_winograd(model, path, least_channels=VECTOR))
    outputs = []
    for which, vectors in (("plain", frozenset[str]()), ("winograd", frozenset({keys.instruction_set()}))):
        monkeypatch.setattr(build, "VECTORS", vectors)
        (tmp_path / which).mkdir()
        made = build.build(opened, tmp_path / which, "cpu", lambda *_: None)
        tall = {component: sums(tmp_path / which / file) for component, (file, _) in made.items()}
        components = {"vae_decoder", "vae_encoder"} if which == "winograd" else set()
        assert {component for component, number in tall.items() if number} == components
        latents = np.random.default_rng(0).standard_normal((1, 4, 5, 9), dtype=np.float32)
        outputs.append(decode(tmp_path / which / made["vae_decoder"][0], latents))
    difference = np.abs(outputs[1] - outputs[0])
    assert difference.max() <= 1, "a pixel between two levels may become the other"
    assert np.mean(difference > 0) < 2e-3


def sums(graph: Path) -> int:
    """Return how many convolutions of six rows of taps a graph has."""
    weights = {tensor.name: list(tensor.dims) for tensor in onnx.load(str(graph)).graph.initializer}
    return sum(shape[2:] == [6, 1] for shape in weights.values())


def decode(graph: Path, latents: Any) -> Any:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return session.run(None, {"latent_sample": latents})[0].astype(np.int64)
