"""Small ONNX graphs for tests, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Axes = Sequence[int | str]


def model_of(
    nodes: Sequence[Any],
    inputs: Mapping[str, Axes],
    outputs: Mapping[str, Axes],
    constants: Mapping[str, Any],
    *,
    types: Mapping[str, int] = {},
) -> Any:
    """Return a model. types: of the inputs and outputs that are not float32"""
    infos = [
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), axes) for name, axes in side.items()]
        for side in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "sketch", *infos, initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
