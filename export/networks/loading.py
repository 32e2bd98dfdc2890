"""Networks loaded alone, each from its own folder, as torch modules whose inputs and outputs are plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentrt.engines.errors import CheckpointError
from latentrt.export.graphs.normalised_latents import Affine
from latentrt.export.networks.frames import wrap_decoder, wrap_motion, wrap_video
from latentrt.export.networks.image_prompts import ImageEncoder, Projection
from latentrt.export.networks.modules import (
    Adapter,
    ControlNet,
    Decoder,
    Encoder,
    ProjectedTextEncoder,
    TextEncoder,
    TinyDecoder,
    wrap_denoiser,
)
from latentrt.export.networks.streamed_weights import stored_dtype
from latentrt.export.networks.transformer import wrap_transformer, wrap_transformer_controlnet
from latentrt.export.sources.parts import ImageAdapter
from latentrt.export.sources.weight_files import find_weights

Row = tuple[Any, Callable[[Any], nn.Module], dict[str, Any]]
"""What reads a network, what wraps it, and what it is read with."""


def load(
    row: str,
    folder: Path,
    *,
    takes: Sequence[str] = (),
    normed: bool = True,
    scaling_factor: float = 1.0,
    shift: float = 0.0,
    affine: Affine | None = None,
    image_adapters: Sequence[ImageAdapter] = (),
    skip_layers: Sequence[int] = (),
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Load one network without gradients. Raises CheckpointError if the weights do not fit.

    row: of the table of components
    takes: the names of its inputs, for networks that ControlNets have to do with
    normed: of a text encoder, whether the states of earlier layers go through the final norm
    scaling_factor, shift: of the checkpoint's latents
    affine: of half a VAE whose latents are normalised, see `normalising.py`
    image_adapters: whose images a denoiser attends to
    skip_layers: of a transformer, the blocks that a model row may skip
    dtype: of the weights, None for the type that they are stored in: then they are mapped, and none is read
    """
    files = find_weights(folder)
    kind, wrap, options = _rows(
        takes=takes,
        normed=normed,
        scaling_factor=scaling_factor,
        shift=shift,
        affine=affine,
        image_adapters=image_adapters,
        skip_layers=skip_layers,
        dtype=dtype or stored_dtype(files),
    )[row]
    try:
        model, found = kind.from_pretrained(
            str(folder),
            variant=files.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit the config ({_first_line(error)})") from error
    _require_all(folder, found)
    return wrap(model).eval().requires_grad_(False)


def _rows(
    *,
    takes: Sequence[str],
    normed: bool,
    scaling_factor: float,
    shift: float,
    affine: Affine | None,
    image_adapters: Sequence[ImageAdapter],
    skip_layers: Sequence[int],
    dtype: torch.dtype,
) -> Mapping[str, Row]:
    """Return how each row of the table of components is loaded, wrapped, and with which options."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLTemporalDecoder,
        AutoencoderTiny,
        ControlNetModel,
        SD3ControlNetModel,
        SD3Transformer2DModel,
        T2IAdapter,
        UNet2DConditionModel,
        UNetMotionModel,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    from latentrt.export.networks.t5 import T5TextEncoder, T5Weights

    weights = {"torch_dtype": dtype}
    checked = {"dtype": dtype, "ignore_mismatched_sizes": True}  # transformers' error names none; `load` does
    return {
        "text_encoder": (CLIPTextModel, partial(TextEncoder, normed=normed), checked),
        "text_encoder_2": (
            CLIPTextModelWithProjection,
            partial(ProjectedTextEncoder, normed=normed),
            checked,
        ),
        "text_encoder_3": (T5Weights, T5TextEncoder, checked),
        "projected_text_encoder": (
            CLIPTextModelWithProjection,
            partial(ProjectedTextEncoder, normed=normed),
            checked,
        ),
        "unet": (
            UNet2DConditionModel,
            partial(wrap_denoiser, takes=takes, image_adapters=image_adapters),
            weights,
        ),
        "transformer": (
            SD3Transformer2DModel,
            partial(wrap_transformer, takes=takes, skip_layers=skip_layers),
            weights,
        ),
        "controlnet": (ControlNetModel, partial(ControlNet, names=takes), weights),
        "transformer_controlnet": (
            SD3ControlNetModel,
            partial(wrap_transformer_controlnet, takes=takes, shift=scaling_factor * shift),
            weights,
        ),
        "refiner": (UNet2DConditionModel, wrap_denoiser, weights),
        "motion_unet": (UNetMotionModel, partial(wrap_motion, takes=takes), weights),
        "video_unet": (UNetSpatioTemporalConditionModel, partial(wrap_video, takes=takes), weights),
        "video_decoder": (AutoencoderKLTemporalDecoder, partial(wrap_decoder, takes=takes), weights),
        "video_encoder": (AutoencoderKLTemporalDecoder, Encoder, weights),
        "adapter": (T2IAdapter, Adapter, weights),
        "vae_decoder": (AutoencoderKL, partial(Decoder, affine=affine), weights),
        "vae_encoder": (AutoencoderKL, partial(Encoder, affine=affine), weights),
        "tiny_decoder": (
            AutoencoderTiny,
            partial(TinyDecoder, scaling_factor=scaling_factor, shift=shift),
            weights,
        ),
        "image_encoder": (CLIPVisionModelWithProjection, ImageEncoder, checked),
        "image_projection": (Projection, Projection, {}),
    }


def _require_all(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse what would be left at random values, which the libraries only warn about."""
    absent = sorted(_shapes(key) for key in (*found["missing_keys"], *found.get("mismatched_keys", ())))
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of the network's weights are missing or of another shape "
            f"({absent[0]}, …); config.json and weights are not from the same checkpoint"
        )


def _shapes(key: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    if isinstance(key, str):
        return key
    name, held, expected = key
    return f"{name} of shape {tuple(held)}, by the config {tuple(expected)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
