"""What a device compiles of a component: its graph with what a picture needs before and behind it, by its role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from latentrt.engines.bundle.manifest import LatentSpec, Role
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_embedding_input, append_pixel_tail, prepend_state_head
from latentrt.engines.tensor_names import STATE_ROWS

if TYPE_CHECKING:
    from onnx import ModelProto

# The roles whose graphs become part of the denoise stage, which keeps its state in float32.
FUSIONS: Mapping[Role, Callable[..., ModelProto]] = {"denoiser": fuse_stage, "controlnet": fuse_control}
DECODERS: tuple[Role, ...] = ("decoder", "tiny_decoder")


def on_device(
    model: ModelProto, role: Role, latents: LatentSpec, *, state_rows: int = STATE_ROWS, learned: int | None = None
) -> ModelProto:
    """Return the graph of a component for a device on which the sampler's state stays; it may be `model`, changed.

    learned: rows of the input that learned words are looked up in, None for any number
    """
    if role in FUSIONS:
        return FUSIONS[role](model, state_rows=state_rows)
    if role in DECODERS:
        append_pixel_tail(model)
        prepend_state_head(model, state_rows, latents)
    append_embedding_input(model, rows=learned)
    return model


def on_host(model: ModelProto, role: Role) -> ModelProto:
    """Return the graph of a component around which NumPy computes the stages: `model`, changed."""
    if role in DECODERS:
        append_pixel_tail(model)
    append_embedding_input(model)
    return model
