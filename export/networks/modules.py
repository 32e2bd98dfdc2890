"""Each network as a torch module whose inputs and outputs are plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latentrt.engines.tensor_names import COND, DOWN, FEATURE, IMAGE_SCALE, IMAGE_TOKENS, MID, SCALE, is_residual
from latentrt.export.graphs.normalised_latents import Affine
from latentrt.export.networks.image_prompts import attend_to_images
from latentrt.export.sources.parts import ImageAdapter


class TextEncoder(nn.Module):
    """(batch, tokens) int64 → hidden states (batch, tokens, width), the pooled one (batch, width), the skipped ones.

    The last, (batch, layers - 1, tokens, width), are what the text is where the last 1, 2, … layers are left out:
    diffusers' clip_skip. An encoder of one layer has none.
    normed: whether the skipped states go through the final norm; SDXL's do not
    """

    def __init__(self, model: Any, *, normed: bool = True) -> None:
        super().__init__()
        self.model, self.normed = model, normed

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        return output.last_hidden_state, output.pooler_output, *self.skipped(output.hidden_states)

    def skipped(self, hidden_states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the states that the last 1, 2, … layers did not change yet, as one tensor, if there are any."""
        states = hidden_states[-2:0:-1]  # without the last layer's, which is an output of its own; nor the tokens
        if not states:
            return ()
        stack = torch.stack(tuple(states), dim=1)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm  # transformers 5 dropped a level
        return (norm(stack) if self.normed else stack,)


class ProjectedTextEncoder(TextEncoder):
    """SDXL's second: (batch, tokens) int64 → the projected text (batch, projection), hidden states, skipped ones."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        return output.text_embeds, output.last_hidden_state, *self.skipped(output.hidden_states)


class Denoiser(nn.Module):
    """The UNet: latents, timesteps (1,) or (batch,), text → the model's prediction."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # The UNet hands the sizes of its skip connections to its upsamplers only where a side is not a multiple of
        # 2 ** num_upsamplers, which a trace would decide once and for all. No side is a multiple of 2 ** 40, so
        # the graph always hands them on and takes any latent size, as diffusers does.
        self.model.num_upsamplers = 40

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return output


class SizedDenoiser(Denoiser):
    """SDXL's UNet: it also takes the pooled text (batch, pooled width) and the sizes in pixels (batch, numbers)."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]
        return output


class ScaledDenoiser(Denoiser):
    """The UNet of a latent consistency model: it also takes the embedded scale of guidance (batch, guidance width)."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor
    ) -> Tensor:
        output: Tensor = self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond, return_dict=False
        )[0]
        return output


class SizedScaledDenoiser(Denoiser):
    """SDXL's UNet as a latent consistency model."""

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor,
    ) -> Tensor:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        output: Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output


DENOISERS = {  # (takes sizes, takes the scale of guidance)
    (False, False): Denoiser,
    (True, False): SizedDenoiser,
    (False, True): ScaledDenoiser,
    (True, True): SizedScaledDenoiser,
}


class ControlledDenoiser(Denoiser):
    """A UNet that ControlNets and T2I-Adapters may control, and that may attend to images.

    After its other inputs it takes a residual for each skip connection and one for its middle, a feature for each
    block on the way down, and images' tokens and scales: what there is of these. names: of the inputs, in their order
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__(model)
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        output: Tensor = self.model(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            timestep_cond=given.get("timestep_cond"),
            added_cond_kwargs=_added(given),
            down_block_additional_residuals=[t for name, t in given.items() if name.startswith(DOWN)] or None,
            mid_block_additional_residual=given.get(MID),
            down_intrablock_additional_residuals=[t for n, t in given.items() if n.startswith(FEATURE)] or None,
            cross_attention_kwargs={n: given[n] for n in (IMAGE_TOKENS, IMAGE_SCALE) if n in given} or None,
            return_dict=False,
        )[0]
        return output


class ControlNet(nn.Module):
    """A UNet's inputs, a picture to follow, scales (batch,) and residuals → the residuals with scale times its own.

    names: of the inputs, in their order
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        down, middle = self.model(
            given["sample"],
            given["timestep"],
            given["encoder_hidden_states"],
            given[COND],
            added_cond_kwargs=_added(given),
            return_dict=False,
        )
        scale = given[SCALE].to(middle.dtype)[:, None, None, None]
        before = [tensor for name, tensor in given.items() if is_residual(name)]
        return tuple(total + scale * own for total, own in zip(before, (*down, middle), strict=True))


class Adapter(nn.Module):
    """A T2I-Adapter: a picture to follow → a feature for each of a UNet's blocks on the way down."""

    # What Pillow weighs red, green and blue with where it makes a picture grey, over 65536.
    GREY = (19595, 38470, 7471)

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.grey = model.config.in_channels == 1

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        if self.grey:
            red, green, blue = (weight / 65536 for weight in self.GREY)
            picture = red * picture[:, :1] + green * picture[:, 1:2] + blue * picture[:, 2:]
        return tuple(self.model(picture))


def _added(given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what SDXL's networks take beside the text."""
    return {name: given[name] for name in ("text_embeds", "time_ids") if name in given} or None


def wrap_denoiser(model: Any, takes: Sequence[str] = (), image_adapters: Sequence[ImageAdapter] = ()) -> nn.Module:
    """Wrap a UNet with what its config says that it takes, and with residuals and images where `takes` names them."""
    if image_adapters:
        attend_to_images(model, image_adapters)
    if any(name in (MID, IMAGE_TOKENS) or name.startswith(FEATURE) for name in takes):
        return ControlledDenoiser(model, takes)
    sized = model.config.addition_embed_type == "text_time"
    return DENOISERS[sized, model.config.time_cond_proj_dim is not None](model)


class PerChannel(nn.Module):
    """(batch, channels, height, width) * scale + shift."""

    scale: Tensor
    shift: Tensor

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(affine.scale).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(affine.shift).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = values * self.scale + self.shift
        return output


class Decoder(nn.Module):
    """Latents, divided by the scaling factor → pictures in -1..1. Holds only the VAE's second half.

    affine: what undoes the normalising of the latents, None if there is none
    """

    def __init__(self, vae: Any, affine: Affine | None = None) -> None:
        super().__init__()
        self.denormalise = PerChannel(affine) if affine else nn.Identity()
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()
        self.decoder = vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        output: Tensor = self.decoder(self.post_quant_conv(self.denormalise(latent_sample)))
        return output


class TinyDecoder(nn.Module):
    """Latents, divided by the checkpoint's scaling factor and shifted, as `Decoder` takes them → pictures in -1..1.

    A tiny VAE is trained on latents as the denoiser sees them, and says so by a scaling factor and a shift of its own,
    most often 1 and 0.
    """

    def __init__(self, vae: Any, *, scaling_factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scale = scaling_factor / vae.config.scaling_factor
        self.shift = (vae.config.shift_factor or 0.0) - shift * self.scale if shift else 0.0

    def forward(self, latent_sample: Tensor) -> Tensor:
        scaled = latent_sample * self.scale
        output: Tensor = self.decoder(scaled + self.shift if self.shift else scaled)
        return output


class Encoder(nn.Module):
    """Pictures in -1..1 → means and log-variances of latents, one after the other. Holds only the VAE's first half.

    affine: what normalises both, None if they are not normalised
    """

    def __init__(self, vae: Any, affine: Affine | None = None) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv or nn.Identity()
        self.normalise = PerChannel(affine) if affine else nn.Identity()

    def forward(self, sample: Tensor) -> Tensor:
        output: Tensor = self.normalise(self.quant_conv(self.encoder(sample)))
        return output


def run(module: nn.Module, inputs: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
    """Run a float32 module on arrays and return float32 arrays by the names of its outputs."""
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.no_grad():
        found = module(*(t.float() if t.is_floating_point() else t for t in tensors))
    found = found if isinstance(found, tuple) else (found,)
    return {name: tensor.numpy() for name, tensor in zip(outputs, found, strict=True)}
