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
from latentrt.engines.tensor_names import FRAMES, STATE_ROWS, UNET_INPUTS, control_width


def fuse_stage(unet: ModelProto, *, state_rows: int = STATE_ROWS) -> ModelProto:
    """Return the graph of one denoise stage around a UNet's graph, whose external data stays where it is.

    inputs, for P pictures, R = state_rows and M model rows, the first P of which are the pictures' own prompts:
        state                 (P, R, C, height, width) float32
        control               (P, control_width(R)) float32
        noise                 (P, C, height, width) float32
        guidance              (P, M) float32: the matrix G
        picture_of_row        (M,) int64: the picture that each model row belongs to
        keep_mask             (P, 1, height, width) float32: 1 where the picture is drawn, 0 where it is kept
        known                 (P, 2, C, height, width) float32: the clean latents to keep, and their noise
        condition             (P, channels, height, width) float32: only where the UNet takes more channels than it
                              gives (an inpainting UNet): what follows the latents
        encoder_hidden_states and any further input of the UNet: (M, …), the UNet's own dtype
    output:
        next_state            (P, R, C, height, width) float32: transition @ [state; m; noise] with m = G @ UNet(rows),
                              rescaled; in its first row the masked part is replaced by the known at its level

    Raises BundleError if the graph is not a UNet of this kind.
    """
    import onnx

    fused = onnx.ModelProto()
    fused.CopyFrom(unet)
    infos = _unet_inputs(fused)
    (output,) = fused.graph.output
    extra = _channels(infos["sample"]) - _channels(output)
    nodes = [
        *rows_nodes(infos, shape=[("Shape", ["noise"], [LATENTS_SHAPE], {})], conditioned=extra > 0),
        *fused.graph.node,
        *_guided_nodes(output.name),
        *_advance_nodes(),
        *_kept_nodes(state_rows),
    ]
    for field in (fused.graph.node, fused.graph.input, fused.graph.output, fused.graph.value_info):
        del field[:]  # value_info too: the UNet's batch axis has another name now
    fused.graph.node.extend(nodes)
    fused.graph.input.extend(_stage_inputs(infos, state_rows, channels=_channels(output), extra=extra))
    axes = state_axes(infos["sample"], state_rows, _channels(output))
    fused.graph.output.append(make_info("next_state", "float32", axes))
    fused.graph.initializer.extend(constants(state_rows))
    fused.graph.name = "denoise_stage"
    return fused


def _unet_inputs(model: ModelProto) -> dict[str, ValueInfoProto]:
    infos = {info.name: info for info in model.graph.input}
    if not set(UNET_INPUTS) <= set(infos) or len(model.graph.output) != 1:
        raise BundleError(
            f"the UNet's graph takes {', '.join(infos)} and gives {len(model.graph.output)} outputs, expected "
            f"{', '.join(UNET_INPUTS)} and one output; export the checkpoint again"
        )
    return {name: copy_info(info) for name, info in infos.items()}


def copy_info(info: ValueInfoProto) -> ValueInfoProto:
    """Return a copy of what a graph says of an input or output."""
    copy = type(info)()
    copy.CopyFrom(info)
    return copy


def _channels(info: ValueInfoProto) -> int:
    return int(info.type.tensor_type.shape.dim[1].dim_value)


Line = tuple[str, list[str], list[str], dict[str, Any]]
"""One node: operator, what it takes, what it gives, its attributes."""

LATENTS_SHAPE = "stage.picture_shape"  # the shape (P, C, height, width) of one row of the state


def make_nodes(table: list[Line]) -> list[NodeProto]:
    """Make the nodes of a table, named for what they give."""
    from onnx import helper

    return [helper.make_node(op, takes, gives, name=gives[0], **more) for op, takes, gives, more in table]


def rows_nodes(infos: dict[str, ValueInfoProto], *, shape: list[Line], conditioned: bool = False) -> list[NodeProto]:
    """Make a network's `sample` and `timestep`, a row each, from state and control.

    infos: the network's inputs; shape: the nodes that make LATENTS_SHAPE
    """
    dtypes = {name: info.type.tensor_type.elem_type for name, info in infos.items()}
    latents = "stage.conditioned" if conditioned else "stage.latents"
    fields = ["stage.times", "stage.rescale", "stage.level", "stage.weights", "stage.flat"]
    table: list[Line] = [
        ("Split", ["control", "stage.split"], fields, {"axis": 1}),
        ("Reshape", ["state", "stage.rows"], ["stage.state"], {}),  # (P, R, C * height * width)
        *_weighted_sum("stage.weights", "stage.state", "stage.mixed"),  # (P, 1, C * height * width)
        *shape,
        ("Reshape", ["stage.mixed", LATENTS_SHAPE], ["stage.latents"], {}),
        ("Cast", [latents], ["stage.cast"], {"to": dtypes["sample"]}),
        ("Gather", ["stage.cast", "picture_of_row"], ["sample"], {"axis": 0}),
        ("Squeeze", ["stage.times", "stage.one"], ["stage.time"], {}),
        ("Gather", ["stage.time", "picture_of_row"], ["stage.row_times"], {"axis": 0}),
        ("Cast", ["stage.row_times"], ["timestep"], {"to": dtypes["timestep"]}),
    ]
    if conditioned:
        place = 1 + next(number for number, line in enumerate(table) if line[2] == ["stage.latents"])
        table.insert(place, ("Concat", ["stage.latents", "condition"], [latents], {"axis": 1}))
    return make_nodes(table)


def _weighted_sum(weights: str, rows: str, name: str) -> list[Line]:
    """Make `name` (P, 1, n) of weights (P, R) and rows (P, R, n).

    No matrix product, here and in the transition: GPUs round those to 10 bits of mantissa (TF32) unless they are told
    not to, and what they are told holds for all of a graph.
    """
    return [
        ("Unsqueeze", [weights, "stage.last"], [f"{name}.weights"], {}),  # (P, R, 1)
        ("Mul", [f"{name}.weights", rows], [f"{name}.parts"], {}),
        ("ReduceSum", [f"{name}.parts", "stage.one"], [name], {}),
    ]


def _guided_nodes(output: str) -> list[NodeProto]:
    """Make `stage.model` (P, 1, C * height * width): guidance @ outputs, with the prompts' own contrast restored.

    No matrix product: there 0 times what is not finite is not finite, and one picture would spoil all.
    The rescaling is that of arXiv:2305.08891, eqs. 14 to 16; at 0 its factor is exactly 1.
    """
    from onnx import TensorProto

    own, mixed = "stage.own", "stage.guided"
    table: list[Line] = [
        ("Cast", [output], ["stage.wide"], {"to": TensorProto.FLOAT}),
        ("Reshape", ["stage.wide", "stage.vectors"], ["stage.outputs"], {}),  # (M, C * height * width)
        ("Unsqueeze", ["guidance", "stage.last"], ["stage.shares"], {}),  # (P, M, 1)
        ("Equal", ["stage.shares", "stage.nothing"], ["stage.strangers"], {}),
        ("Mul", ["stage.shares", "stage.outputs"], ["stage.parts_of_all"], {}),  # (P, M, C * height * width)
        ("Where", ["stage.strangers", "stage.nothing", "stage.parts_of_all"], ["stage.own_parts"], {}),
        ("ReduceSum", ["stage.own_parts", "stage.one"], [mixed], {"keepdims": 0}),  # (P, C * height * width)
        ("Shape", ["noise"], ["stage.pictures"], {"start": 0, "end": 1}),
        ("Slice", ["stage.outputs", "stage.zero", "stage.pictures", "stage.zero"], [own], {}),
        *_variance(own),
        *_variance(mixed),
        ("Max", [f"{mixed}.variance", "stage.tiny"], ["stage.divisor"], {}),
        ("Div", [f"{own}.variance", "stage.divisor"], ["stage.ratio2"], {}),
        ("Sqrt", ["stage.ratio2"], ["stage.ratio"], {}),  # (P, 1)
        ("Mul", ["stage.rescale", "stage.ratio"], ["stage.restored"], {}),
        ("Sub", ["stage.unit", "stage.rescale"], ["stage.unrestored"], {}),
        ("Add", ["stage.restored", "stage.unrestored"], ["stage.factor"], {}),
        ("Mul", [mixed, "stage.factor"], ["stage.rescaled"], {}),
        ("Unsqueeze", ["stage.rescaled", "stage.one"], ["stage.model"], {}),
    ]
    return make_nodes(table)


def _variance(name: str) -> list[Line]:
    """Make `name.variance` (P, 1) of `name` (P, n)."""
    return [
        ("ReduceMean", [name, "stage.one"], [f"{name}.mean"], {}),
        ("Sub", [name, f"{name}.mean"], [f"{name}.centred"], {}),
        ("Mul", [f"{name}.centred", f"{name}.centred"], [f"{name}.squares"], {}),
        ("ReduceMean", [f"{name}.squares", "stage.one"], [f"{name}.variance"], {}),
    ]


def _advance_nodes() -> list[NodeProto]:
    """Make `stage.next` (P, R, C * height * width): transition @ [state; model; noise]."""
    table: list[Line] = [
        ("Reshape", ["noise", "stage.vectors"], ["stage.noise_vectors"], {}),
        ("Unsqueeze", ["stage.noise_vectors", "stage.one"], ["stage.noise"], {}),
        ("Concat", ["stage.state", "stage.model", "stage.noise"], ["stage.stack"], {"axis": 1}),
        ("Reshape", ["stage.flat", "stage.square"], ["stage.transition"], {}),  # (P, R, R + 2)
        ("Unsqueeze", ["stage.transition", "stage.each"], ["stage.factors"], {}),  # (P, R, R + 2, 1)
        ("Unsqueeze", ["stage.stack", "stage.one"], ["stage.summands"], {}),  # (P, 1, R + 2, n)
        ("Mul", ["stage.factors", "stage.summands"], ["stage.products"], {}),
        ("ReduceSum", ["stage.products", "stage.last"], ["stage.next"], {"keepdims": 0}),
        ("Shape", ["state"], ["stage.state_shape"], {}),
        ("Reshape", ["stage.next", "stage.state_shape"], ["stage.unmasked"], {}),
    ]
    return make_nodes(table)


def _kept_nodes(state_rows: int) -> list[NodeProto]:
    """Make `next_state`: in the first row of `stage.unmasked`, what keep_mask keeps comes from `known`."""
    parts = ["stage.first", "stage.others"] if state_rows > 1 else ["stage.first"]
    table: list[Line] = [
        ("Split", ["stage.unmasked", "stage.parts"], parts, {"axis": 1}),  # (P, 1, C, height, width), …
        ("Reshape", ["known", "stage.rows"], ["stage.known"], {}),  # (P, 2, C * height * width)
        *_weighted_sum("stage.level", "stage.known", "stage.noised"),  # (P, 1, C * height * width)
        ("Shape", ["stage.first"], ["stage.first_shape"], {}),
        ("Reshape", ["stage.noised", "stage.first_shape"], ["stage.kept"], {}),
        ("Unsqueeze", ["keep_mask", "stage.one"], ["stage.drawn_mask"], {}),  # (P, 1, 1, height, width)
        ("Sub", ["stage.unit", "stage.drawn_mask"], ["stage.kept_mask"], {}),
        ("Mul", ["stage.first", "stage.drawn_mask"], ["stage.drawn"], {}),
        ("Mul", ["stage.kept", "stage.kept_mask"], ["stage.kept_part"], {}),
        ("Add", ["stage.drawn", "stage.kept_part"], ["stage.latest"], {}),
        ("Concat", ["stage.latest", *parts[1:]], ["next_state"], {"axis": 1}),
    ]
    return make_nodes(table)


def constants(state_rows: int) -> list[Any]:
    """Return the initializers that the nodes around a network refer to."""
    from onnx import numpy_helper

    integers = {
        "stage.split": [1, 1, 2, state_rows, state_rows * (state_rows + 2)],
        "stage.rows": [0, 0, -1],
        "stage.vectors": [0, -1],
        "stage.square": [0, state_rows, state_rows + 2],
        "stage.parts": [1, state_rows - 1] if state_rows > 1 else [1],
        "stage.one": [1],
        "stage.last": [2],
        "stage.each": [3],
        "stage.zero": [0],
    }
    numbers = {"stage.unit": 1.0, "stage.tiny": 1e-20, "stage.nothing": 0.0}
    arrays = {name: np.array(value, dtype=np.int64) for name, value in integers.items()}
    arrays |= {name: np.array(value, dtype=np.float32) for name, value in numbers.items()}
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _stage_inputs(
    infos: dict[str, ValueInfoProto], state_rows: int, *, channels: int, extra: int
) -> list[ValueInfoProto]:
    axes = state_axes(infos["sample"], state_rows, channels)
    pictures, _, _, height, width = axes
    own = [
        make_info("state", "float32", axes),
        make_info("control", "float32", [pictures, control_width(state_rows)]),
        make_info("noise", "float32", [pictures, channels, height, width]),
        make_info("guidance", "float32", [pictures, "rows"]),
        make_info("picture_of_row", "int64", ["rows"]),
        make_info("keep_mask", "float32", [pictures, 1, height, width]),
        make_info("known", "float32", [pictures, 2, channels, height, width]),
    ]
    if extra:
        own.append(make_info("condition", "float32", [pictures, extra, height, width]))
    further = [info for name, info in infos.items() if name not in ("sample", "timestep")]
    for info in further:
        if info.name != FRAMES:  # the length of a window, which no row has to itself
            info.type.tensor_type.shape.dim[0].dim_param = "rows"
    return [*own, *further]


def state_axes(sample: ValueInfoProto, state_rows: int, channels: int) -> list[int | str]:
    """Return the axes of the state of P pictures, whose latents are laid out as a network's sample."""
    axes = [axis.dim_param or axis.dim_value for axis in sample.type.tensor_type.shape.dim]
    return ["pictures", state_rows, channels, *axes[2:]]


def make_info(name: str, dtype: str, axes: list[int | str]) -> ValueInfoProto:
    """Return what a graph says of an input or output."""
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), axes)
