"""A ControlNet as one ONNX graph that begins where the denoise stage does: at the state, on the device.

Made at build time, like `stage.fuse_stage`. What it gives is what the stage's UNet takes, or the next ControlNet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentrt.engines.errors import BundleError
from latentrt.engines.graphs.denoise_stage import (
    LATENTS_SHAPE,
    Line,
    constants,
    copy_info,
    make_info,
    make_nodes,
    rows_nodes,
    state_axes,
)
from latentrt.engines.tensor_names import COND, HINT, NEXT, SCALE, STATE_ROWS, control_width, is_residual

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

TAKES = ("sample", "timestep", COND, SCALE)  # whatever the kind: some see no text


def fuse_control(controlnet: ModelProto, *, state_rows: int = STATE_ROWS) -> ModelProto:
    """Return the graph of one ControlNet from the state, whose external data stays where it is.

    inputs, for P pictures, R = state_rows and M model rows:
        state, control, picture_of_row: as `stage.fuse_stage` takes them
        hint                  (P, 3, height, width) float32: what each picture follows, pixels from 0 to 1, or the
                              latents of such pixels, (P, C, height, width)
        scale                 (M,) float32
        encoder_hidden_states and any further input of the ControlNet, the residuals so far among them: (M, …)
    outputs:
        next_down_residual_0, …, next_mid_residual: (M, …), those residuals with scale times its own; a transformer's
            are next_block_residual_0, …

    Raises BundleError if the graph is not a ControlNet of this kind.
    """
    import onnx

    fused = onnx.ModelProto()
    fused.CopyFrom(controlnet)
    infos, outputs = _inputs_and_outputs(fused)
    nodes = [*rows_nodes(infos, shape=_latents_of_state()), *_hint_nodes(infos[COND]), *fused.graph.node]
    for field in (fused.graph.node, fused.graph.input, fused.graph.output, fused.graph.value_info):
        del field[:]  # value_info too: the batch axis has another name now
    fused.graph.node.extend(nodes)
    fused.graph.input.extend(_stage_inputs(infos, state_rows))
    fused.graph.output.extend(_by_rows(info) for info in outputs)
    used = {name for node in nodes for name in node.input}
    fused.graph.initializer.extend(tensor for tensor in constants(state_rows) if tensor.name in used)
    fused.graph.name = "control_stage"
    return fused


def _inputs_and_outputs(model: ModelProto) -> tuple[dict[str, ValueInfoProto], list[ValueInfoProto]]:
    infos = {info.name: copy_info(info) for info in model.graph.input}
    outputs = [copy_info(info) for info in model.graph.output]
    gives = {NEXT + name for name in infos if is_residual(name)}
    if not set(TAKES) <= set(infos) or {info.name for info in outputs} != gives or not gives:
        raise BundleError(
            f"the ControlNet's graph takes {', '.join(infos)}, expected {', '.join(TAKES)} and residuals, which it "
            "gives again; export the checkpoint again"
        )
    return infos, outputs


def _latents_of_state() -> list[Line]:
    """Make the shape of one row of the state: there is no noise here to tell it."""
    return [
        ("Shape", ["state"], ["stage.state_pictures"], {"start": 0, "end": 1}),
        ("Shape", ["state"], ["stage.state_latents"], {"start": 2}),
        ("Concat", ["stage.state_pictures", "stage.state_latents"], [LATENTS_SHAPE], {"axis": 0}),
    ]


def _hint_nodes(cond: ValueInfoProto) -> list[NodeProto]:
    """Make what the ControlNet reads, a row each, from what each picture follows."""
    dtype = cond.type.tensor_type.elem_type
    return make_nodes(
        [
            ("Cast", [HINT], ["stage.hint"], {"to": dtype}),
            ("Gather", ["stage.hint", "picture_of_row"], [COND], {"axis": 0}),
        ]
    )


def _stage_inputs(infos: dict[str, ValueInfoProto], state_rows: int) -> list[ValueInfoProto]:
    sample, cond = infos["sample"], infos[COND]
    channels = int(sample.type.tensor_type.shape.dim[1].dim_value)
    axes = state_axes(sample, state_rows, channels)
    pixels = [axis.dim_param or axis.dim_value for axis in cond.type.tensor_type.shape.dim]
    own = [
        make_info("state", "float32", axes),
        make_info("control", "float32", [axes[0], control_width(state_rows)]),
        make_info("picture_of_row", "int64", ["rows"]),
        make_info(HINT, "float32", [axes[0], *pixels[1:]]),
    ]
    return [*own, *(_by_rows(info) for name, info in infos.items() if name not in ("sample", "timestep", COND))]


def _by_rows(info: ValueInfoProto) -> ValueInfoProto:
    info.type.tensor_type.shape.dim[0].dim_param = "rows"
    return info
