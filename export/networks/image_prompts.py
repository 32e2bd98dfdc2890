"""Images as prompts (IP-Adapter): what encodes them, what makes tokens of that, and how a UNet attends to these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from latentrt.engines.errors import CheckpointError
from latentrt.export.networks.conversion import Tensors, read_tensors
from latentrt.export.sources.parts import ImageAdapter
from latentrt.export.sources.weight_files import find_weights

CROSS = ".attn2.processor"  # how the names of what attends to a text end


class ImageEncoder(nn.Module):
    """CLIP's vision model: (batch, 3, side, side), normalised → the projected image, the states before the last layer.

    They are (batch, projection) and (batch, positions, width).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
        return output.image_embeds, output.hidden_states[-2]


class Projection(nn.Module):
    """What makes tokens of an image that was encoded: one of its outputs → (batch, tokens, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_pretrained(cls, folder: str, **_: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Load a projection from a folder with its part of an IP-Adapter's file, as the libraries load networks."""
        from diffusers.loaders.unet import UNet2DConditionLoadersMixin
        from diffusers.models.embeddings import IPAdapterPlusImageProjection

        shards = find_weights(Path(folder)).shards
        tensors = {key: tensor for shard in shards for key, tensor in load_file(shard.path).items()}
        # It asks the shapes which kind this is, and has the names that each kind's weights were published under.
        convert = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
        try:
            model = convert(tensors, low_cpu_mem_usage=False)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: the image projection's weights are not those of an IP-Adapter ({error}); download it again"
            ) from error
        if isinstance(model, IPAdapterPlusImageProjection):
            model.forward = partial(_resample, model)
        return model, {"missing_keys": ()}

    def forward(self, encoded: Tensor) -> Tensor:
        output: Tensor = self.model(encoded)
        return output


def _resample(model: Any, states: Tensor) -> Tensor:
    """Do what the resampler does, whose own way to repeat its first latents a tracer computes from the weights."""
    latents = model.latents.expand(states.shape[0], -1, -1)
    states = model.proj_in(states)
    for block in model.layers:
        latents = block(states, latents, latents)
    shown: Tensor = model.norm_out(model.proj_out(latents))
    return shown


class ImageAttention(nn.Module):
    """Attention with a text, and to it the attention of the same queries with each adapter's image, times a scale.

    tokens: of each adapter; layer: the place of this layer's scale
    The second is written out, of few tokens: TensorRT-RTX 1.7.1 crashes where two Attention nodes share their queries.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], tokens: Sequence[int], layer: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = (nn.ModuleList(map(_linear, weights)) for weights in (keys, values))
        self.tokens, self.layer = list(tokens), layer

    def extra_repr(self) -> str:
        """Return what else decides the graph, for who keeps it."""
        return f"tokens={self.tokens}, layer={self.layer}"

    def __call__(  # not `forward`: attention asks its processor's own signature which further arguments it takes
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        image_tokens: Tensor,
        image_scale: Tensor,
    ) -> Tensor:
        """Attend as diffusers' processors do.

        image_tokens: (rows, tokens, width); image_scale: (rows, adapters, layers)
        """
        rows = hidden_states.shape[0]

        def heads(states: Tensor) -> Tensor:
            return states.view(rows, -1, attn.heads, states.shape[-1] // attn.heads).transpose(1, 2)

        def joined(states: Tensor) -> Tensor:
            return states.transpose(1, 2).reshape(rows, -1, attn.heads * states.shape[-1])

        query = heads(attn.to_q(hidden_states))
        key, value = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        output = joined(functional.scaled_dot_product_attention(query, key, value))
        images = torch.split(image_tokens, self.tokens, dim=1) if len(self.tokens) > 1 else (image_tokens,)
        for number, image in enumerate(images):
            keys = heads(self.to_k_ip[number](image)) * query.shape[-1] ** -0.5
            weights = torch.softmax(query @ keys.transpose(-1, -2), dim=-1)
            attended = joined(weights @ heads(self.to_v_ip[number](image)))
            output = output + image_scale[:, number, self.layer, None, None] * attended
        shown: Tensor = attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor
        return shown


def _linear(weight: Tensor) -> nn.Linear:
    """Return a layer whose weight is this tensor itself, which may be mapped from a file."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def attend_to_images(model: Any, adapters: Sequence[ImageAdapter]) -> None:
    """Have a UNet attend to the images of adapters. Raises CheckpointError where an adapter's weights do not fit.

    Files name its layers 1, 3, 5, … in the order in which diffusers lists a UNet's attentions: down, up, then middle.
    """
    files = [read_tensors(adapter.attention) for adapter in adapters]
    tokens = [adapter.spec.tokens for adapter in adapters]
    names = [name for name in model.attn_processors if name.endswith(CROSS)]
    made = {}
    for layer, name in enumerate(names):
        keys, values = ([_weight(file, layer, kind) for file in files] for kind in ("to_k_ip", "to_v_ip"))
        made[name] = ImageAttention(keys, values, tokens, layer)
    model.set_attn_processor({**model.attn_processors, **made})


def _weight(file: Tensors, layer: int, kind: str) -> Tensor:
    name = f"{2 * layer + 1}.{kind}.weight"
    if name not in file:
        raise CheckpointError(f"the IP-Adapter holds no ip_adapter.{name}; download it again")
    return file[name]
