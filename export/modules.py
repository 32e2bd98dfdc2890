"""Each network as a torch module whose inputs and outputs are plain tensors, loaded alone from its own folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.engines.errors import CheckpointError
from latentrt.export.weights import find_weights


class TextEncoder(nn.Module):
    """(batch, tokens) int64 → hidden states (batch, tokens, width), the pooled one (batch, width), the skipped ones.

    The last, (batch, layers - 1, tokens, width), are what the text is where the last 1, 2, … layers are left out,
    after the final norm: diffusers' clip_skip. An encoder of one layer has none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        states = output.hidden_states[-2:0:-1]  # without the last layer's, which is the first output; nor the tokens
        if not states:
            return output.last_hidden_state, output.pooler_output
        norm = getattr(self.model, "text_model", self.model).final_layer_norm  # transformers 5 dropped a level
        return output.last_hidden_state, output.pooler_output, norm(torch.stack(states, dim=1))


class Denoiser(nn.Module):
    """The UNet: latents, timesteps (1,) or (batch,), text → the model's prediction."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # The UNet hands the sizes of its skip connections to its upsamplers only where a side is no multiple of
        # 2 ** num_upsamplers, which a trace would decide once and for all. No side is a multiple of 2 ** 40, so
        # the graph always hands them on and takes any latent size, as diffusers does.
        self.model.num_upsamplers = 40

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class Decoder(nn.Module):
    """Latents, divided by the scaling factor → pictures in -1..1. Holds only the VAE's second half."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.decoder(self.post_quant_conv(latent_sample))
        return output


class Encoder(nn.Module):
    """Pictures in -1..1 → means and log-variances of latents, one after the other. Holds only the VAE's first half."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv or nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        output: Tensor = self.quant_conv(self.encoder(sample))
        return output


def load(component: str, folder: Path) -> nn.Module:
    """Load one network in float32, without gradients. Raises CheckpointError where the weights do not fit."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    rows: Mapping[str, tuple[Any, Callable[[Any], nn.Module], dict[str, Any]]] = {
        "text_encoder": (CLIPTextModel, TextEncoder, {"dtype": torch.float32}),
        "unet": (UNet2DConditionModel, Denoiser, {"torch_dtype": torch.float32}),
        "vae_decoder": (AutoencoderKL, Decoder, {"torch_dtype": torch.float32}),
        "vae_encoder": (AutoencoderKL, Encoder, {"torch_dtype": torch.float32}),
    }
    kind, wrap, options = rows[component]
    variant = find_weights(folder).variant
    try:
        model, found = kind.from_pretrained(
            str(folder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit the config ({_first_line(error)})") from error
    _require_all(folder, found)
    return wrap(model).eval().requires_grad_(False)


def _require_all(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse what would be left at random values, which the libraries only warn about."""
    absent = sorted(str(key) for key in (*found["missing_keys"], *found.get("mismatched_keys", ())))
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of the network's weights are missing or of another shape "
            f"({absent[0]}, …); config.json and weights are not of one checkpoint"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def run(module: nn.Module, inputs: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Run a float32 module on arrays and return float32 arrays by the names of its outputs."""
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.no_grad():
        found = module(*(t.float() if t.is_floating_point() else t for t in tensors))
    found = found if isinstance(found, tuple) else (found,)
    return {name: tensor.numpy() for name, tensor in zip(outputs, found, strict=True)}
