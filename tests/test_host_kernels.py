"""What ONNX Runtime's fast CPU kernels compute is what torch computes, and they are used wherever they can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
from latentrt.engines.graphs.cpu_rewrites import use_host_kernels
from latentrt.engines.graphs.cuda_rewrites import use_cuda_kernels
from latentrt.engines.graphs.edits import MICROSOFT
from tests.graphs import model_of

SIZES = st.integers(1, 6)


def run(model: onnx.ModelProto, **inputs: Any) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def count(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 3), groups=st.integers(1, 4), each=st.integers(1, 3), axes=st.lists(SIZES, max_size=3))
def test_groups_are_normalised_as_torch_does(rows: int, groups: int, each: int, axes: list[int]) -> None:
    generator = np.random.default_rng(rows)
    axes = [max(2, axes[0]), *axes[1:]] if axes else [2]
    x = (3 + 5 * generator.standard_normal((rows, groups * each, *axes))).astype(np.float32)
    scale, bias = generator.standard_normal((2, groups * each)).astype(np.float32)
    names = ["rows", groups * each, *(f"axis{i}" for i in range(len(axes)))]
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=1e-3)
    model = model_of([node], {"x": names}, {"y": names}, {"scale": scale, "bias": bias})
    assert use_host_kernels(model) == 1
    onnx.checker.check_model(model)
    parts = [torch.from_numpy(array) for array in (x, scale, bias)]
    expected = torch.nn.functional.group_norm(parts[0], groups, parts[1], parts[2], eps=1e-3).numpy()
    np.testing.assert_allclose(run(model, x=x), expected, atol=2e-5)
    assert count(model)["GroupNormalization"] == 0


def attention_model(*, heads: int, width: int, mask: bool, shape_known: bool, **attributes: float) -> onnx.ModelProto:
    """Return attention between projections as exporters write it: heads split, transposed, and joined again."""
    sides = ("query", "key", "value")
    lengths = {"heads": [heads], "width": [width], "any": [-1], "split": [0, -1, heads, width], "joined": [0, 0, -1]}
    nodes = []
    for side in sides:
        shape = "split"
        if not shape_known:
            nodes.append(helper.make_node("Shape", [side], [f"{side}.rows"], start=0, end=1))
            nodes.append(helper.make_node("Concat", [f"{side}.rows", "any", "heads", "width"], [f"{side}.to"], axis=0))
            shape = f"{side}.to"
        nodes.append(helper.make_node("Reshape", [side, shape], [f"{side}.split"]))
        nodes.append(helper.make_node("Transpose", [f"{side}.split"], [f"{side}.heads"], perm=[0, 2, 1, 3]))
    taken = [f"{side}.heads" for side in sides] + (["mask"] if mask else [])
    nodes.append(helper.make_node("Attention", taken, ["mixed"], name="attn/Attention", **attributes))
    nodes.append(helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["back", "joined"], ["y"]))
    constants: dict[str, Any] = {name: np.array(value, dtype=np.int64) for name, value in lengths.items()}
    if mask:
        constants["mask"] = np.zeros((1, 1, 1, 1), dtype=np.float32)
    axes = {side: ["rows", "tokens" if side == "query" else "others", heads * width] for side in sides}
    return model_of(nodes, axes, {"y": ["rows", "tokens", heads * width]}, constants)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3), tokens=SIZES, others=SIZES, heads=st.integers(1, 4), width=st.integers(1, 9),
    shape_known=st.booleans(), scale=st.sampled_from([None, 0.3]),
)  # fmt: skip
def test_attention_is_torchs_attention(
    rows: int, tokens: int, others: int, heads: int, width: int, shape_known: bool, scale: float | None
) -> None:
    generator = np.random.default_rng(tokens)
    query = generator.standard_normal((rows, tokens, heads * width)).astype(np.float32)
    key, value = generator.standard_normal((2, rows, others, heads * width)).astype(np.float32)
    attributes = {} if scale is None else {"scale": scale}
    model = attention_model(heads=heads, width=width, mask=False, shape_known=shape_known, **attributes)
    assert use_host_kernels(model) == 1
    split = [torch.from_numpy(x).unflatten(-1, (heads, width)).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(run(model, query=query, key=key, value=value), expected.numpy(), atol=1e-5)
    assert count(model)["Transpose"] == 0, "the heads are no longer transposed"
    assert count(model)["Attention"] == 0


def streams_model(*, heads: int, width: int, norm: str, split_first: bool = True) -> onnx.ModelProto:
    """Return attention of two streams as Stable Diffusion 3 has it: each head is normalised, tokens are joined.

    norm: the operator, of queries and keys
    split_first: heads before tokens, where streams are joined
    """
    constants: dict[str, Any] = {"split": np.array([0, -1, heads, width]), "joined": np.array([0, 0, -1])}
    generator, nodes, joined = np.random.default_rng(heads), [], []
    for side in ("query", "key", "value"):
        parts = []
        for stream in ("first", "second"):
            name = f"{stream}.{side}"
            nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}.split"]))
            nodes.append(helper.make_node("Transpose", [f"{name}.split"], [f"{name}.heads"], perm=[0, 2, 1, 3]))
            parts.append(f"{name}.heads")
            if norm and side != "value":
                constants[f"{name}.scale"] = generator.standard_normal(width).astype(np.float32)
                nodes.append(helper.make_node(norm, [parts[-1], f"{name}.scale"], [f"{name}.norm"], epsilon=1e-3))
                parts[-1] = f"{name}.norm"
        nodes.append(helper.make_node("Concat", parts, [side], axis=2 if split_first else 3))
        joined.append(side)
    nodes.append(helper.make_node("Attention", joined, ["mixed"], name="attn/Attention"))
    nodes.append(helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["back", "joined"], ["y"]))
    axes = {
        f"{stream}.{side}": ["rows", f"{stream}.tokens", heads * width]
        for stream in ("first", "second")
        for side in ("query", "key", "value")
    }
    return model_of(nodes, axes, {"y": ["rows", "tokens", None]}, constants)


@pytest.mark.parametrize("norm", ["RMSNormalization", "LayerNormalization", ""])
@pytest.mark.parametrize("kernels", [use_host_kernels, use_cuda_kernels], ids=["cpu", "cuda"])
def test_attention_of_two_streams_is_the_same_without_transposing_heads(
    norm: str, kernels: Callable[[onnx.ModelProto], object]
) -> None:
    generator, model = np.random.default_rng(4), streams_model(heads=3, width=4, norm=norm)
    given = {
        f"{stream}.{side}": generator.standard_normal((2, tokens, 12)).astype(np.float32)
        for stream, tokens in (("first", 5), ("second", 2))
        for side in ("query", "key", "value")
    }
    expected = run(model, **given)
    kernels(model)
    assert (count(model)["Transpose"], count(model)["Attention"], count(model)["MultiHeadAttention"]) == (0, 0, 1)
    np.testing.assert_allclose(run(model, **given), expected, atol=1e-5)


def test_attention_of_streams_whose_heads_are_joined_stays() -> None:
    model = streams_model(heads=3, width=4, norm="", split_first=False)
    before = model.SerializeToString()
    assert use_host_kernels(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("how", [{"mask": True}, {"is_causal": 1}, {"softcap": 30.0}])
def test_attention_that_is_more_than_attention_stays(how: dict[str, Any]) -> None:
    model = attention_model(heads=2, width=4, shape_known=True, **({"mask": False} | how))
    before = model.SerializeToString()
    assert use_host_kernels(model) == 0
    assert model.SerializeToString() == before


def test_a_norm_whose_scale_is_computed_stays() -> None:
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2)
    axes = ["rows", 4, "height", "width"]
    model = model_of([node], {"x": axes, "scale": [4]}, {"y": axes}, {"bias": np.zeros(4, np.float32)})
    assert use_host_kernels(model) == 0


@pytest.mark.parametrize("bundle", ["sd1_bundle", "sd2_bundle", "sd1_half_bundle"])
def test_the_cpus_engines_have_the_fast_kernels(bundle: str, request: pytest.FixtureRequest) -> None:
    opened = Bundle.open(Path(request.getfixturevalue(bundle)))
    (directory,) = [path for path in opened.engine_directories() if path.name.startswith("cpu-")]
    for component in ("unet", "vae_decoder", "vae_encoder"):
        built = onnx.load(str(directory / f"{component}.onnx"), load_external_data=False)
        canonical = onnx.load(str(opened.path(opened.manifest.components[component].graph)), load_external_data=False)
        kinds = Counter((node.domain, node.op_type) for node in built.graph.node)
        norms, attentions = (count(canonical)[kind] for kind in ("GroupNormalization", "Attention"))
        assert kinds["", "InstanceNormalization"] == norms > 0, component
        assert kinds[MICROSOFT, "MultiHeadAttention"] == attentions > 0, component
        assert not kinds["", "Attention"], component
