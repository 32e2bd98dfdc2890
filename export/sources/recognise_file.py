"""A whole checkpoint in one safetensors file, in the layout of its first authors that Civitai and A1111 use.

What it is comes from the keys, shapes and metadata of its header; no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from latentrt.engines.bundle.manifest import Family
from latentrt.engines.bundle.safetensors_header import StoredTensor, TensorFile
from latentrt.engines.bundle.training import Prediction
from latentrt.export.configs.families import (
    BASES,
    DENOISER_PREFIX,
    FAMILIES,
    INPAINTING,
    INPUTS,
    OTHER_DENOISER_KEYS,
    PARTS,
    TRANSFORMER,
    VIDEO_KEY,
    Base,
    option_for,
)
from latentrt.export.configs.published import CONFIGS
from latentrt.export.sources.markers import Marker, find_markers, find_prediction, find_strangers
from latentrt.export.sources.structure import read_structure
from latentrt.export.sources.transformer_file import transformer_config

FIRST = f"{DENOISER_PREFIX}input_blocks.0.0.weight"
GUIDANCE_KEY = f"{DENOISER_PREFIX}time_embed.cond_proj.weight"
ADDED = f"{DENOISER_PREFIX}label_emb.0.0.weight"
VAE_PREFIX = "first_stage_model."
TEXTS: Mapping[str, tuple[str, ...]] = {  # what the keys of a network begin with
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
OTHERS: Mapping[str, tuple[str, ...]] = {"vae": (VAE_PREFIX,), "unet (average)": ("model_ema.",)}
PREFIXES = (
    DENOISER_PREFIX,
    *(prefix for table in (TEXTS, OTHERS) for prefixes in table.values() for prefix in prefixes),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFile:
    """What the header of a whole checkpoint says.

    denoiser: the component that it becomes
    base: the Stable Diffusion that it is, None if its sizes are those of none
    oddity: what makes it another model than those that can be exported, None if nothing does
    input_channels: of the denoiser
    guidance_width: of the scale of guidance that a latent consistency model takes, None if it takes none
    blocks: what in the denoiser's config differs from its base's, None if no config can express it
    prediction: None if nothing tells; told: whether the file itself does
    reason: how the prediction type is known, or why it is not
    markers: what it says outside its networks; strangers: unknown keys outside them
    """

    file: TensorFile
    label: str
    base: Base | None
    oddity: str | None
    input_channels: int
    guidance_width: int | None
    blocks: Mapping[str, Any] | None
    prediction: Prediction | None
    says_prediction: bool
    reason: str
    markers: tuple[Marker, ...]
    strangers: tuple[str, ...]
    denoiser: str = "unet"

    @property
    def family(self) -> Family | None:
        """Return its family, None if it cannot be exported without configs from elsewhere."""
        return self.base.family if self.base and not self.oddity and self.blocks is not None else None

    def networks(self) -> dict[str, dict[str, StoredTensor]]:
        """Return the tensors of each network that is in the file, by their keys there."""
        found = {
            name: {key: stored for key, stored in self.file.tensors.items() if key.startswith(prefixes)}
            for name, prefixes in {**TEXTS, self.denoiser: (DENOISER_PREFIX,), **OTHERS}.items()
        }
        return {name: tensors for name, tensors in found.items() if tensors}


def recognise(file: TensorFile) -> SingleFile | None:
    """Say which Stable Diffusion a file is, None if it is not a whole checkpoint of one."""
    if config := transformer_config(file):
        return _of_transformer(file, config)
    first = None if f"{DENOISER_PREFIX}{VIDEO_KEY}" in file.tensors else file.tensors.get(FIRST)
    if first is None or len(first.shape) != 4 or any(key.startswith("control_model.") for key in file.tensors):
        return None
    base = BASES.get(_text_width(file))
    if base and base.channels != first.shape[0]:
        base = None
    markers, oddity = find_markers(file), next(_oddities(file, base), None)
    blocks = _blocks(file, base.family) if base and base.family else None
    prediction, says_prediction, reason = _prediction(file, base.family if base else None)
    return SingleFile(
        file=file,
        label=", ".join(
            [base.label if base else "Stable Diffusion in other sizes than the published ones"]
            + ([oddity] if oddity else _variants(file, blocks, markers))
        ),
        base=base,
        oddity=oddity,
        input_channels=first.shape[1],
        guidance_width=file.tensors[GUIDANCE_KEY].shape[1] if GUIDANCE_KEY in file.tensors else None,
        blocks=blocks,
        prediction=prediction,
        says_prediction=says_prediction,
        reason=reason,
        markers=markers,
        strangers=find_strangers(file, PREFIXES),
    )


def _of_transformer(file: TensorFile, config: Mapping[str, Any]) -> SingleFile:
    return SingleFile(
        file=file,
        label="Stable Diffusion 3.5" if config["qk_norm"] else "Stable Diffusion 3",
        base=TRANSFORMER,
        oddity=None,
        input_channels=config["in_channels"],
        guidance_width=None,
        blocks=config,
        prediction="flow_prediction",
        says_prediction=False,
        reason="as all of its kind",
        markers=(),
        strangers=find_strangers(file, PREFIXES),
        denoiser="transformer",
    )


def _text_width(file: TensorFile) -> int:
    """Return how wide the text is that the UNet attends to, 0 where it attends to none."""
    keys = (key for key in file.tensors if key.startswith(DENOISER_PREFIX) and key.endswith(".attn2.to_k.weight"))
    return next((file.tensors[key].shape[-1] for key in keys), 0)


def _oddities(file: TensorFile, base: Base | None) -> Iterator[str]:
    """Name what makes a UNet another model than its base: what it takes beside latents, time and text."""
    channels, added = file.tensors[FIRST].shape[1], file.tensors.get(ADDED)
    if added and _text_width(file) == 1024:
        yield "conditioned on pictures (unCLIP)"
    if added and base and base.added and added.shape[-1] != base.added:
        yield f"with {added.shape[-1]} added numbers in place of {base.added} (another model, such as Kolors)"
    if f"{DENOISER_PREFIX}label_emb.weight" in file.tensors:
        yield "with classes (an upscaler)"
    if base and channels not in (4, INPAINTING):
        yield INPUTS.get(channels, f"with {channels} input channels")


def _variants(file: TensorFile, blocks: Mapping[str, Any] | None, markers: tuple[Marker, ...]) -> list[str]:
    """Name what a UNet is beside its base, in ways that can be exported."""
    channels = file.tensors[FIRST].shape[1]
    found = [] if channels == 4 else [INPUTS.get(channels, f"with {channels} input channels")]
    found += ["in blocks of its own, as distilled ones have"] if blocks else []
    found += ["for latent consistency"] if GUIDANCE_KEY in file.tensors else []
    return found + [marker.label for marker in markers if marker.label]


def _blocks(file: TensorFile, family: Family) -> dict[str, Any] | None:
    shapes = {
        key.removeprefix(DENOISER_PREFIX): stored.shape
        for key, stored in file.tensors.items()
        if key.startswith(DENOISER_PREFIX)
    }
    return read_structure(shapes, "original").changes(CONFIGS[family]["unet"])


def _prediction(file: TensorFile, family: Family | None) -> tuple[Prediction | None, bool, str]:
    """Return the prediction type, whether the file says it, and how it is known."""
    prediction, reason = find_prediction(file)
    if reason:
        return prediction, prediction is not None, reason
    kinds = FAMILIES[family].sample_sizes if family else {}
    if len(kinds) > 1:
        named = " and with ".join(f"{kind} ({8 * side}x{8 * side})" for kind, side in kinds.items())
        return None, False, f"SD 2.x was published with {named}, in the same shapes"
    return "epsilon", False, "as its base; nothing in the file says otherwise"


def name_other(file: TensorFile) -> tuple[str, bool]:
    """Name what is no Stable Diffusion checkpoint; the second says whether it is a denoiser.

    The name is empty if nothing is known.
    """
    for key, label in OTHER_DENOISER_KEYS:
        if key in file.tensors or f"{DENOISER_PREFIX}{key}" in file.tensors:
            return label, True
    for part in PARTS:
        if part.fits(file):
            return part.label, False
    if 0 < len(file.tensors) <= 2 and all(len(stored.shape) == 2 for stored in file.tensors.values()):
        return "textual inversion embedding", False
    return "", False


def say_instead(file: TensorFile) -> str:
    """Say what a file holds in place of what it was given for, and how that is given."""
    what = name_other(file)[0]
    if not what:
        return "; `latentrt inspect` says what it holds"
    option = option_for(what)
    return f" but a {what}; " + (f"add it with {option}" if option else "`latentrt inspect` says what it holds")
