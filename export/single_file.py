"""A whole checkpoint in one safetensors file, in the layout of its first authors that Civitai and A1111 use.

What it is comes from the keys, shapes and metadata of its header; no tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentrt.engines.manifest import Family, Prediction
from latentrt.engines.tensor_files import StoredTensor, TensorFile
from latentrt.export.families import BASES, DENOISER_PREFIX, INPUTS, OTHER_DENOISER_KEYS, PARTS

FIRST = f"{DENOISER_PREFIX}input_blocks.0.0.weight"
TOLD = f"{DENOISER_PREFIX}time_embed.cond_proj.weight"
VAE_PREFIX = "first_stage_model."
NETWORKS: Mapping[str, tuple[str, ...]] = {  # what the keys of a network begin with
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    "unet": (DENOISER_PREFIX,),
    "vae": (VAE_PREFIX,),
    "unet (average)": ("model_ema.",),
}
ARCHITECTURES: Mapping[str, Prediction] = {  # modelspec.architecture, which trainers write into the metadata
    "stable-diffusion-v2-768-v": "v_prediction",
    "stable-diffusion-v2-512": "epsilon",
}
PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v": "v_prediction"}  # modelspec.prediction_type


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFile:
    """What the header of a whole checkpoint says.

    family: None where its sizes or inputs are those of no published model that can be exported
    guidance_width: of the scale of guidance that a latent consistency model takes, None where it takes none
    prediction: None where nothing tells; told: whether the file itself does
    reason: how the prediction type is known, or why it is not
    zero_snr: whether it was trained down to no signal at all
    """

    file: TensorFile
    label: str
    family: Family | None
    input_channels: int
    guidance_width: int | None
    prediction: Prediction | None
    told: bool
    reason: str
    zero_snr: bool

    def networks(self) -> dict[str, list[StoredTensor]]:
        """Return the tensors of each network that is in the file."""
        found = {
            name: [stored for key, stored in self.file.tensors.items() if key.startswith(prefixes)]
            for name, prefixes in NETWORKS.items()
        }
        return {name: tensors for name, tensors in found.items() if tensors}


def recognise(file: TensorFile) -> SingleFile | None:
    """Say which Stable Diffusion a file is, None where it is no whole checkpoint of one."""
    first = file.tensors.get(FIRST)
    if first is None or len(first.shape) != 4 or any(key.startswith("control_model.") for key in file.tensors):
        return None
    base = BASES.get(_text_width(file))
    if base and base.channels != first.shape[0]:
        base = None
    oddities = list(_oddities(file))
    if first.shape[1] != 4:
        oddities.append(INPUTS.get(first.shape[1], f"with {first.shape[1]} input channels"))
    told_guidance = file.tensors.get(TOLD)
    if told_guidance:
        oddities.append("for latent consistency")
    prediction, told, reason = _prediction(file, base.family if base else None)
    return SingleFile(
        file=file,
        label=", ".join([base.label if base else "Stable Diffusion in other sizes than the published ones", *oddities]),
        family=base.family if base and not list(_oddities(file)) else None,
        input_channels=first.shape[1],
        guidance_width=told_guidance.shape[1] if told_guidance else None,
        prediction=prediction,
        told=told,
        reason=reason,
        zero_snr="ztsnr" in file.tensors,
    )


def _text_width(file: TensorFile) -> int:
    """Return how wide the text is that the UNet attends to, 0 where it attends to none."""
    keys = (key for key in file.tensors if key.startswith(DENOISER_PREFIX) and key.endswith(".attn2.to_k.weight"))
    return next((file.tensors[key].shape[-1] for key in keys), 0)


def _oddities(file: TensorFile) -> Iterator[str]:
    """Name what makes a UNet another network than its base, beyond the channels that it takes."""
    embedding = file.tensors.get(f"{DENOISER_PREFIX}label_emb.0.0.weight")
    if embedding and _text_width(file) == 1024:
        yield "conditioned on pictures (unCLIP)"
    if f"{DENOISER_PREFIX}label_emb.weight" in file.tensors:
        yield "with classes (an upscaler)"
    if "edm_mean" in file.tensors:
        yield "with Playground's noise schedule"


def _prediction(file: TensorFile, family: Family | None) -> tuple[Prediction | None, bool, str]:
    """Return the prediction type, whether the file says it, and how it is known."""
    written = file.metadata.get("modelspec.prediction_type", ""), file.metadata.get("modelspec.architecture", "")
    named = PREDICTIONS.get(written[0]) or ARCHITECTURES.get(written[1])
    if named:
        return named, True, "the file's metadata say so"
    if "v_pred" in file.tensors:
        return "v_prediction", True, "the file holds the marker v_pred"
    if family == "sd2":
        kinds = "epsilon (512x512) and with v_prediction (768x768)"
        return None, False, f"SD 2.x was published with {kinds}, in the same shapes"
    return "epsilon", False, "as its base; nothing in the file says otherwise"


def name_other(file: TensorFile) -> tuple[str, bool]:
    """Name what is no Stable Diffusion checkpoint; the second says whether it is a denoiser.

    The name is empty where nothing is known.
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
