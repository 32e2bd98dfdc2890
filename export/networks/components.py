"""The networks of a Stable Diffusion checkpoint as a table: what each takes and gives, and how it loads alone.

A shape names its axes. A name that is one of the checkpoint's `dimensions` is a fixed number; any other is dynamic.
Names of tensors are those of optimum's exporter, so that its pipelines open the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from latentrt.engines.bundle.manifest import Role
from latentrt.engines.spec import Precision, TensorSpec
from latentrt.engines.tensor_names import (
    COND,
    FRAMES,
    IMAGE_LATENTS,
    IMAGE_SCALE,
    IMAGE_TOKENS,
    NEXT,
    SCALE,
    SKIP_LAYERS,
    level_axes,
)
from latentrt.export.configs.tensors import Tensor, features, residuals

Case = Literal["traced", "checked", "odd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One network.

    name: of the row, which ControlNets share
    role: as in the manifest
    traced: sizes of the dynamic axes at which it is traced and its golden pair is recorded, in the units below
    checked: other sizes at which the graph must agree as well
    units: the dimension that multiplies the sizes of an axis
    odd: what is added to the checked sizes where the network takes any size; without it, only multiples of the units
    controlled: where the residuals of ControlNets stand: among the inputs, or among the outputs too
    adapted: where the features of T2I-Adapters stand: among the inputs, or the outputs
    follows: axes that a trace is not told of: their sizes follow from the others'
    """

    name: str
    role: Role
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    traced: Mapping[str, int]
    checked: Mapping[str, int]
    units: Mapping[str, str]
    odd: Mapping[str, int] = field(default_factory=dict)
    controlled: Literal["no", "takes", "gives"] = "no"
    adapted: Literal["no", "takes", "gives"] = "no"
    follows: tuple[str, ...] = ()

    def takes(self, dimensions: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return every input that a checkpoint's network has: not what has an axis of 0 there."""
        controlled = residuals(dimensions) if self.controlled != "no" else ()
        adapted = features(dimensions) if self.adapted == "takes" else ()
        every = (*self.inputs, *controlled, *adapted)
        return tuple(tensor for tensor in every if tensor.there(dimensions))

    def gives(self, dimensions: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Return every output that is not empty in a checkpoint."""
        added = residuals(dimensions) if self.controlled == "gives" else ()
        adapted = features(dimensions) if self.adapted == "gives" else ()
        every = (*self.outputs, *(replace(tensor, name=NEXT + tensor.name) for tensor in added), *adapted)
        return tuple(tensor for tensor in every if tensor.there(dimensions))

    def sizes(self, which: Case, dimensions: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of the dynamic axes in one of the cases."""
        sizes = self.traced if which == "traced" else self.checked
        odd = self.odd if which == "odd" else {}
        units = {axis: dimensions[self.units[axis]] if axis in self.units else 1 for axis in sizes}
        found = {axis: size * units[axis] + odd.get(axis, 0) for axis, size in sizes.items()}
        if self.controlled == "no":
            return found
        height, width = found["latent_height"], found["latent_width"]
        pixels = {"height": height * dimensions["factor"], "width": width * dimensions["factor"]}
        return found | pixels | level_axes(height, width)

    def axes(self, dimensions: Mapping[str, int]) -> dict[str, tuple[int, int] | None]:
        """Return (smallest size, what sizes are multiples of) for the axes of which a trace may assume more than 2, 1.

        None is for an axis whose size follows from the others'.

        The smallest leaves at least 2 where the network is narrowest: torch takes an axis of 1 for another network.
        The graph itself has no such limit, and is checked below it.
        """
        units = {axis: dimensions[unit] for axis, unit in self.units.items()}
        named = {axis: (2 * unit, 1 if self.odd else unit) for axis, unit in units.items()}
        following = (*self.follows, *(level_axes(1, 1) if self.controlled != "no" else ()))
        return named | dict.fromkeys(following)


DENOISER, REFINER = "unet", "refiner"  # a UNet of a checkpoint's own, and one of another checkpoint that refines
LATENTS = ("batch", "latent_channels", "latent_height", "latent_width")
PICTURES = ("batch", "picture_channels", "height", "width")
# What several networks take alike.
TIMESTEP = Tensor(name="timestep", shape=("steps",), dtype="float32", values="timesteps")
TEXT = Tensor(name="encoder_hidden_states", shape=("batch", "tokens", "attention_width"))
POOLED = Tensor(name="pooled_projections", shape=("batch", "pooled_width"))
# The sizes of all networks that run at each stage.
STAGE_TRACED = {"batch": 2, "steps": 1, "latent_height": 2, "latent_width": 3, "tokens": 77}
STAGE_CHECKED = {"batch": 3, "steps": 3, "latent_height": 1, "latent_width": 2, "tokens": 8}
STAGE_UNITS = {"latent_height": "unet_factor", "latent_width": "unet_factor"}
STAGE_ODD = {"latent_height": 1, "latent_width": -1}


def _text_encoder(name: str, *outputs: Tensor, suffix: str) -> Component:
    # What the text is without the last 1, 2, … layers: clip-skip chooses among them.
    skipped = ("batch", f"skipped_layers{suffix}", "context", f"text_width{suffix}")
    return Component(
        name=name,
        role="text_encoder",
        inputs=(Tensor(name="input_ids", shape=("batch", "context"), dtype="int64", values="tokens"),),
        outputs=(*outputs, Tensor(name="skipped_hidden_states", shape=skipped, extra=True)),
        traced={"batch": 2},
        checked={"batch": 3},
        units={},
    )


VAE_DECODER = Component(
    name="vae_decoder",
    role="decoder",
    inputs=(Tensor(name="latent_sample", shape=LATENTS, values="latents"),),
    # Expressions of the input's axes: optimum sizes its output buffers by evaluating them.
    outputs=(
        Tensor(
            name="sample", shape=("batch", "picture_channels", "{factor} * latent_height", "{factor} * latent_width")
        ),
    ),
    traced={"batch": 2, "latent_height": 6, "latent_width": 10},
    checked={"batch": 1, "latent_height": 9, "latent_width": 5},
    units={},
)

CONTROLNET = Component(
    name="controlnet",
    role="controlnet",
    inputs=(
        Tensor(name="sample", shape=LATENTS),
        TIMESTEP,
        TEXT,
        Tensor(name="text_embeds", shape=("batch", "pooled_width")),
        Tensor(name="time_ids", shape=("batch", "size_numbers"), dtype="float32", values="sizes"),
        # What it follows, from 0 to 1, and how strongly: it multiplies the residuals.
        Tensor(name=COND, shape=("batch", "picture_channels", "height", "width"), values="unit"),
        Tensor(name=SCALE, shape=("batch",), dtype="float32", values="unit"),
    ),
    outputs=(),
    traced=STAGE_TRACED,
    checked=STAGE_CHECKED,
    units=STAGE_UNITS,
    odd=STAGE_ODD,
    controlled="gives",
    follows=("height", "width"),
)

ADAPTERS = Component(
    name="adapter",
    role="adapter",
    inputs=(Tensor(name=COND, shape=PICTURES, values="unit"),),
    outputs=(),
    traced={"batch": 2, "height": 4, "width": 6},
    checked={"batch": 1, "height": 5, "width": 3},
    units={"height": "adapter_multiple", "width": "adapter_multiple"},
    adapted="gives",
)

_NETWORKS: Mapping[str, Component] = {
    component.name: component
    for component in (
        _text_encoder(
            "text_encoder",
            Tensor(name="last_hidden_state", shape=("batch", "context", "text_width")),
            Tensor(name="pooler_output", shape=("batch", "text_width")),
            suffix="",
        ),
        _text_encoder(
            "text_encoder_2",
            Tensor(name="text_embeds", shape=("batch", "projection_width_2")),
            Tensor(name="last_hidden_state", shape=("batch", "context", "text_width_2")),
            suffix="_2",
        ),
        Component(
            name=DENOISER,
            role="denoiser",
            inputs=(
                Tensor(name="sample", shape=("batch", "unet_channels", "latent_height", "latent_width")),
                # float32: sigma spacings give fractional timesteps, and above 2048 float16 has none.
                # One entry serves every row, or each row has its own: the graph expands it.
                TIMESTEP,
                TEXT,
                # SDXL: what the whole text is, and the sizes in pixels that the picture was trained to look like.
                Tensor(name="text_embeds", shape=("batch", "pooled_width")),
                Tensor(name="time_ids", shape=("batch", "size_numbers"), dtype="float32", values="sizes"),
                # Latent consistency models: the scale of guidance, which they were distilled with.
                Tensor(name="timestep_cond", shape=("batch", "guidance_width")),
                # IP-Adapters: the tokens of every adapter's image side by side, and how strongly each layer attends.
                Tensor(name=IMAGE_TOKENS, shape=("batch", "image_tokens", "attention_width")),
                Tensor(name=IMAGE_SCALE, shape=("batch", "image_adapters", "image_layers"), values="unit"),
            ),
            outputs=(Tensor(name="out_sample", shape=LATENTS),),
            controlled="takes",
            adapted="takes",
            traced=STAGE_TRACED,
            checked=STAGE_CHECKED,
            units=STAGE_UNITS,
            odd=STAGE_ODD,
        ),
        VAE_DECODER,
        Component(
            name="vae_encoder",
            role="encoder",
            inputs=(Tensor(name="sample", shape=PICTURES, values="pixels"),),
            outputs=(
                Tensor(
                    name="latent_parameters",
                    shape=("batch", "latent_parameters", "height // {factor}", "width // {factor}"),
                ),
            ),
            traced={"batch": 2, "height": 6, "width": 10},
            checked={"batch": 1, "height": 9, "width": 5},
            units={"height": "factor", "width": "factor"},
        ),
        CONTROLNET,
        # Small and rough: for previews, or for a picture in a hundredth of the VAE's time.
        replace(VAE_DECODER, name="tiny_decoder", role="tiny_decoder"),
        ADAPTERS,
    )
}


# T5 reads a row of any length, and all of it: padding too.
_T5 = Component(
    name="text_encoder_3",
    role="text_encoder",
    inputs=(Tensor(name="input_ids", shape=("batch", "text_tokens"), dtype="int64", values="text"),),
    outputs=(Tensor(name="last_hidden_state", shape=("batch", "text_tokens", "text_width_3")),),
    traced={"batch": 2, "text_tokens": 77},
    checked={"batch": 4, "text_tokens": 256},
    units={},
)
# What it holds is of no account: its length says how many rows are one window.
_PLACES = Tensor(name=FRAMES, shape=("frames",), dtype="float32", values="places")
_MOTION = replace(
    _NETWORKS[DENOISER],
    name="motion_unet",
    inputs=(*_NETWORKS[DENOISER].inputs, _PLACES),
    adapted="no",
    traced={**STAGE_TRACED, "batch": 6, "frames": 3},
    checked={**STAGE_CHECKED, "batch": 10, "frames": 5, "steps": 10},
)
# SD 3's: the first text encoder projects too, and the denoiser takes latents in patches, so no odd sizes.
_LATER = (
    _text_encoder(
        "projected_text_encoder",
        Tensor(name="text_embeds", shape=("batch", "projection_width")),
        Tensor(name="last_hidden_state", shape=("batch", "context", "text_width")),
        suffix="",
    ),
    Component(
        name="transformer",
        role="denoiser",
        inputs=(
            Tensor(name="sample", shape=("batch", "unet_channels", "latent_height", "latent_width")),
            TIMESTEP,
            TEXT,
            POOLED,
            Tensor(name=SKIP_LAYERS, shape=("batch",), dtype="float32", values="switch", where="skip_layers"),
        ),
        outputs=(Tensor(name="out_sample", shape=LATENTS),),
        controlled="takes",
        traced=STAGE_TRACED,
        checked=STAGE_CHECKED,
        units=STAGE_UNITS,
    ),
)
# It follows latents, and reads them in patches: so no odd sizes.
_TRANSFORMER_CONTROLNET = replace(
    CONTROLNET,
    name="transformer_controlnet",
    inputs=(
        Tensor(name="sample", shape=LATENTS),
        TIMESTEP,
        TEXT,
        POOLED,
        Tensor(name=COND, shape=LATENTS),
        Tensor(name=SCALE, shape=("batch",), dtype="float32", values="unit"),
    ),
    odd={},
    follows=(),
)
# What an image encoder gives, and what an image projection takes of it: each kind takes one of them.
IMAGE_EMBEDS = Tensor(name="image_embeds", shape=("batch", "clip_projection"))
IMAGE_STATES = Tensor(name="penultimate_hidden_state", shape=("batch", "clip_positions", "clip_width"))
IMAGES: tuple[Component, ...] = (
    Component(
        name="image_encoder",
        role="image_encoder",
        inputs=(Tensor(name="pixel_values", shape=("batch", 3, "clip_side", "clip_side")),),
        outputs=(IMAGE_EMBEDS, IMAGE_STATES),
        traced={"batch": 2},
        checked={"batch": 3},
        units={},
    ),
    Component(
        name="image_projection",
        role="image_projection",
        inputs=(IMAGE_EMBEDS, IMAGE_STATES),
        outputs=(Tensor(name=IMAGE_TOKENS, shape=("batch", "projected_tokens", "attention_width")),),
        traced={"batch": 2},
        checked={"batch": 3},
        units={},
    ),
)

# Stable Video Diffusion's: the image's embedding stands for the text, and its latents are seen beside each frame's.
VIDEOS: tuple[Component, ...] = (
    replace(
        _MOTION,
        name="video_unet",
        inputs=(
            Tensor(name="sample", shape=LATENTS),
            TIMESTEP,
            TEXT,
            Tensor(name="time_ids", shape=("batch", "size_numbers"), dtype="float32", values="sizes"),
            Tensor(name=IMAGE_LATENTS, shape=LATENTS),
            _PLACES,
        ),
        controlled="no",
    ),
    replace(
        VAE_DECODER,
        name="video_decoder",
        inputs=(*VAE_DECODER.inputs, _PLACES),
        traced={**VAE_DECODER.traced, "batch": 6, "frames": 3},
        checked={**VAE_DECODER.checked, "batch": 10, "frames": 5},
    ),
    replace(_NETWORKS["vae_encoder"], name="video_encoder"),
)

# New ones come last: golden inputs are drawn by a component's place, and stay what they were.
COMPONENTS: Mapping[str, Component] = {
    **_NETWORKS,
    REFINER: replace(_NETWORKS[DENOISER], name=REFINER),
    _T5.name: _T5,
    _MOTION.name: _MOTION,
    **{component.name: component for component in _LATER},
    **{component.name: component for component in IMAGES},
    _TRANSFORMER_CONTROLNET.name: _TRANSFORMER_CONTROLNET,
    **{component.name: component for component in VIDEOS},
}


def place_of(row: str) -> int:
    """Return the place of a row in the table."""
    return list(COMPONENTS).index(row)


def input_specs(component: Component, dimensions: Mapping[str, int], precision: Precision) -> tuple[TensorSpec, ...]:
    """Return what a component takes in one checkpoint."""
    return tuple(tensor.spec(dimensions, precision) for tensor in component.takes(dimensions))


def output_specs(component: Component, dimensions: Mapping[str, int], precision: Precision) -> tuple[TensorSpec, ...]:
    """Return what a component gives in one checkpoint."""
    return tuple(tensor.spec(dimensions, precision) for tensor in component.gives(dimensions))
