"""The denoise stage as one ONNX graph: gather rows, UNet, guidance and transition, everything per picture.

Made at build time. The state stays where the graph runs: per stage the host writes one small row of `control` for
each picture, and every picture of a batch can be at another stage of another sampler. It is float32 around the
UNet, whatever the UNet computes in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.errors import BundleError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

# Rows of state of the samplers that remember most (tests/test_stage.py::test_every_sampler_fits_the_fused_stage).
STATE_ROWS = 6
UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states")


def control_width(state_rows: int) -> int:
    """Return how many numbers control one stage of one picture: timestep, input row, transition."""
    return 1 + state_rows + state_rows * (state_rows + 2)


def fuse_stage(unet: ModelProto, *, state_rows: int = STATE_ROWS) -> ModelProto:
    """Return the graph of one denoise stage around a UNet's graph, whose external data stays where it is.

    inputs, for P pictures, R = state_rows and M model rows:
        state                 (P, R, C, height, width) float32
        control               (P, 1 + R + R * (R + 2)) float32: timestep, input row, transition, row-major
        noise                 (P, C, height, width) float32
        guidance              (P, M) float32: the matrix G
        picture_of_row        (M,) int64: the picture that each model row belongs to
        encoder_hidden_states (M, sequence, dim), the UNet's own dtype
    output:
        next_state            (P, R, C, height, width) float32: transition @ [state; G @ UNet(rows); noise]

    Raises BundleError where the graph is no UNet of this kind.
    """
    import onnx

    fused = onnx.ModelProto()
    fused.CopyFrom(unet)
    infos = _unet_inputs(fused)
    (output,) = fused.graph.output
    nodes = [*_rows_nodes(infos, state_rows), *fused.graph.node, *_advance_nodes(output.name, state_rows)]
    for field in (fused.graph.node, fused.graph.input, fused.graph.output, fused.graph.value_info):
        del field[:]  # value_info too: the UNet's batch axis has another name now
    fused.graph.node.extend(nodes)
    fused.graph.input.extend(_stage_inputs(infos, state_rows))
    fused.graph.output.append(_info("next_state", "float32", _state_axes(infos["sample"], state_rows)))
    fused.graph.initializer.extend(_constants(state_rows))
    fused.graph.name = "denoise_stage"
    return fused


def _unet_inputs(model: ModelProto) -> dict[str, ValueInfoProto]:
    infos = {info.name: info for info in model.graph.input}
    if set(infos) != set(UNET_INPUTS) or len(model.graph.output) != 1:
        raise BundleError(
            f"the UNet's graph takes {', '.join(infos)} and gives {len(model.graph.output)} outputs, expected "
            f"{', '.join(UNET_INPUTS)} and one output; export the checkpoint again"
        )
    return {name: _copy(info) for name, info in infos.items()}


def _copy(info: ValueInfoProto) -> ValueInfoProto:
    copy = type(info)()
    copy.CopyFrom(info)
    return copy


def _rows_nodes(infos: dict[str, ValueInfoProto], state_rows: int) -> list[NodeProto]:
    """Make the UNet's `sample` and `timestep`, a row each, from state and control."""
    from onnx import helper

    dtypes = {name: info.type.tensor_type.elem_type for name, info in infos.items()}
    table: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Split", ["control", "stage.split"], ["stage.times", "stage.weights", "stage.flat"], {"axis": 1}),
        ("Reshape", ["state", "stage.rows"], ["stage.state"], {}),  # (P, R, C * height * width)
        ("Unsqueeze", ["stage.weights", "stage.one"], ["stage.row"], {}),  # (P, 1, R)
        ("MatMul", ["stage.row", "stage.state"], ["stage.mixed"], {}),  # (P, 1, C * height * width)
        ("Shape", ["noise"], ["stage.picture_shape"], {}),
        ("Reshape", ["stage.mixed", "stage.picture_shape"], ["stage.latents"], {}),
        ("Cast", ["stage.latents"], ["stage.cast"], {"to": dtypes["sample"]}),
        ("Gather", ["stage.cast", "picture_of_row"], ["sample"], {"axis": 0}),
        ("Squeeze", ["stage.times", "stage.one"], ["stage.time"], {}),
        ("Gather", ["stage.time", "picture_of_row"], ["stage.row_times"], {"axis": 0}),
        ("Cast", ["stage.row_times"], ["timestep"], {"to": dtypes["timestep"]}),
    ]
    return [helper.make_node(op, takes, gives, name=gives[0], **more) for op, takes, gives, more in table]


def _advance_nodes(output: str, state_rows: int) -> list[NodeProto]:
    """Make the next state from the UNet's output: transition @ [state; guidance @ output; noise]."""
    from onnx import TensorProto, helper

    table: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Cast", [output], ["stage.wide"], {"to": TensorProto.FLOAT}),
        ("Reshape", ["stage.wide", "stage.vectors"], ["stage.outputs"], {}),  # (M, C * height * width)
        ("MatMul", ["guidance", "stage.outputs"], ["stage.guided"], {}),  # (P, C * height * width)
        ("Unsqueeze", ["stage.guided", "stage.one"], ["stage.model"], {}),
        ("Reshape", ["noise", "stage.vectors"], ["stage.noise_vectors"], {}),
        ("Unsqueeze", ["stage.noise_vectors", "stage.one"], ["stage.noise"], {}),
        ("Concat", ["stage.state", "stage.model", "stage.noise"], ["stage.stack"], {"axis": 1}),
        ("Reshape", ["stage.flat", "stage.square"], ["stage.transition"], {}),  # (P, R, R + 2)
        ("MatMul", ["stage.transition", "stage.stack"], ["stage.next"], {}),
        ("Shape", ["state"], ["stage.state_shape"], {}),
        ("Reshape", ["stage.next", "stage.state_shape"], ["next_state"], {}),
    ]
    return [helper.make_node(op, takes, gives, name=gives[0], **more) for op, takes, gives, more in table]


def _constants(state_rows: int) -> list[Any]:
    from onnx import numpy_helper

    values = {
        "stage.split": [1, state_rows, state_rows * (state_rows + 2)],
        "stage.rows": [0, 0, -1],
        "stage.vectors": [0, -1],
        "stage.square": [0, state_rows, state_rows + 2],
        "stage.one": [1],
    }
    return [numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in values.items()]


def _stage_inputs(infos: dict[str, ValueInfoProto], state_rows: int) -> list[ValueInfoProto]:
    text = infos["encoder_hidden_states"]
    axes = _state_axes(infos["sample"], state_rows)
    text.type.tensor_type.shape.dim[0].dim_param = "rows"
    return [
        _info("state", "float32", axes),
        _info("control", "float32", ["pictures", control_width(state_rows)]),
        _info("noise", "float32", [axes[0], *axes[2:]]),
        _info("guidance", "float32", ["pictures", "rows"]),
        _info("picture_of_row", "int64", ["rows"]),
        text,
    ]


def _state_axes(sample: ValueInfoProto, state_rows: int) -> list[int | str]:
    axes = [axis.dim_param or axis.dim_value for axis in sample.type.tensor_type.shape.dim]
    return ["pictures", state_rows, *axes[1:]]


def _info(name: str, dtype: str, axes: list[int | str]) -> ValueInfoProto:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), axes)
