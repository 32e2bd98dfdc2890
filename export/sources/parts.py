"""A checkpoint taken apart: its documents, and for each network where the weights lie and how they are written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentrt.engines.bundle.manifest import ImagePromptSpec

Source = Literal["torch", "onnx"]
Layout = Literal["diffusers", "original"]
Part = Literal[
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "unet",
    "transformer",
    "vae",
    "controlnet",
    "transformer_controlnet",
    "adapter",
    "tiny_vae",
    "motion_adapter",
    "video_unet",
    "video_vae",
    "image_encoder",
    "image_projection",
    "image_attention",
]
# Whose weights a network has: half of a VAE is loaded from the whole.
PARTS: Mapping[str, Part] = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "unet": "unet",
    "transformer": "transformer",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
    "image_encoder": "image_encoder",
}
# What a denoiser of a class reads beside text encoders and a VAE; other checkpoints may hold it for nothing.
FURTHER: Mapping[str, tuple[str, ...]] = {"UNetSpatioTemporalConditionModel": ("image_encoder",)}
# Networks whose class says what they are, whatever folder they are in.
CLASSES: Mapping[str, Part] = {
    "UNetSpatioTemporalConditionModel": "video_unet",
    "AutoencoderKLTemporalDecoder": "video_vae",
}
TEXT_ENCODERS: Mapping[str, str] = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}
CLIPS = ("text_encoder", "text_encoder_2")  # of the text encoders
DENOISERS = ("unet", "transformer")  # a checkpoint has one of them


def folders(source: Source, roles: Collection[str]) -> dict[str, str]:
    """Return the folder that each network's weights or graph are in.

    roles: what the checkpoint has, by model_index.json: some families have a second text encoder, one has no first
    """
    named = PARTS if source == "torch" else {name: name for name in PARTS}
    own = (*TEXT_ENCODERS, *DENOISERS, *further_networks())
    return {name: folder for name, folder in named.items() if name not in own or name in roles}


def further_networks() -> tuple[str, ...]:
    """Return all networks that a denoiser of some class reads beside text encoders and a VAE."""
    return tuple(name for names in FURTHER.values() for name in names)


def denoiser_of(names: Collection[str]) -> str:
    """Return the denoiser among a checkpoint's networks or folders: a UNet where there is none."""
    return next((name for name in DENOISERS if name in names), DENOISERS[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFusion:
    """A LoRA file that is added to the weights."""

    path: str
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where a network's weights come from: how to write the folder that it is loaded from.

    config: the text of its config.json
    files: what holds the weights; files that hold other networks too are read in part
    layout: `original` for the names of the first Stable Diffusion, which single files have
    loras: what is added, in the order of the sum
    base: a network whose weights, with what changes them, are added to those of the same names
    beside: a network whose weights stand beside these: the modules of a motion adapter
    starts: what the names of the weights begin with that are taken of it
    """

    part: Part
    config: str
    files: tuple[str, ...]
    layout: Layout
    loras: tuple[LoraFusion, ...] = ()
    base: WeightSource | None = None
    beside: WeightSource | None = None
    starts: str = ""


ControlKind = Literal["controlnet", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetwork:
    """A ControlNet or a T2I-Adapter that is added to a checkpoint.

    row: of the table of components; control: the name under which requests ask for it
    dimensions: the sizes that are its own, where its denoiser's are others
    """

    kind: ControlKind
    row: str
    control: str
    dimensions: Mapping[str, int] = field(default_factory=dict)

    @property
    def component(self) -> str:
        """Return the component's name, after which its files are named."""
        return f"{self.kind}_{self.control}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAdapter:
    """An IP-Adapter that is added to a checkpoint.

    spec: what the manifest says of it
    attention: where the weights are with which the denoiser attends to its tokens
    dimensions: the sizes of its projection
    """

    spec: ImagePromptSpec
    attention: WeightSource
    dimensions: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A checkpoint before its documents are interpreted.

    root: the directory or the file, for errors
    configs: the parsed config.json of each network
    networks: a folder that can be loaded as it is, or how to write one
    tokenizers: the folder of each one's vocabulary
    special_tokens: what a tokenizer's folder is not to decide
    files: whatever the export reads, by the name it has in the bundle's provenance
    options: choices that change the result, for the provenance
    controls: ControlNets and adapters, by component
    rows: of the table of components, where that is not called as the component
    image_adapters: IP-Adapters, in the order of their names
    skip_layers: the blocks of its denoiser that a model row may skip
    """

    root: Path
    source: Source
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    networks: Mapping[str, Path | WeightSource]
    tokenizers: Mapping[str, Path]
    files: Mapping[str, Path]
    special_tokens: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, ControlNetwork] = field(default_factory=dict)
    rows: Mapping[str, str] = field(default_factory=dict)
    image_adapters: tuple[ImageAdapter, ...] = ()
    skip_layers: tuple[int, ...] = ()

    @property
    def denoiser(self) -> str:
        """Return the component that draws."""
        return denoiser_of(self.networks)

    def controls_of(self, kind: ControlKind) -> tuple[str, ...]:
        """Return the components of one kind that control the denoiser."""
        return tuple(name for name, one in self.controls.items() if one.kind == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEncoder:
    """A network of another checkpoint that must have the same weights, so that both can share one.

    folder, weight_source: as in a job; name: of that checkpoint, for the error
    """

    name: str
    folder: str
    weight_source: WeightSource | None = None
