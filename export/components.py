"""The networks of a checkpoint: how each is loaded alone, wrapped for its graph, and fed when it is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines.spec import Precision
from latentrt.export.graphs import GraphPlan

Config = Mapping[str, Any]
SEQUENCE = 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One set of shapes to record with: pictures in a batch, and latent height and width in units of `multiple`."""

    batch: int
    height: int
    width: int


# The graph is exported at the first and must hold at the second too: another batch, another shape.
EXPORTED, OTHER = Sizes(batch=2, height=2, width=3), Sizes(batch=1, height=4, width=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One network of the bundle.

    folder: where the checkpoint keeps it
    load: (directory, torch dtype) -> module, ready to be exported
    plan: config -> what the graph looks like
    record: (config, sizes) -> inputs by name, torch tensors, float32
    """

    name: str
    folder: str
    load: Callable[[Path, Any], Any]
    plan: Callable[[Config], GraphPlan]
    record: Callable[[Config, Sizes], dict[str, Any]]


def spatial_multiple(config: Config) -> int:
    """Return what latent sizes must be multiples of for a UNet: it halves them once less than it has levels."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def torch_dtype(precision: Precision) -> Any:
    """Return torch.float16 or torch.float32."""
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}[precision]


def _load_text_encoder(directory: Path, dtype: Any) -> Any:
    import torch
    from transformers import CLIPTextModel

    class TextEncoder(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            output = self.model(input_ids)
            return output.last_hidden_state, output.pooler_output

    model = CLIPTextModel.from_pretrained(directory, torch_dtype=dtype, use_safetensors=True, attn_implementation="sdpa")
    return TextEncoder(model).eval()


def _load_unet(directory: Path, dtype: Any) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    class Unet(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    model = UNet2DConditionModel.from_pretrained(directory, torch_dtype=dtype, use_safetensors=True)
    return Unet(model).eval()


def _load_vae(directory: Path, dtype: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(directory, torch_dtype=dtype, use_safetensors=True)


def _load_vae_decoder(directory: Path, dtype: Any) -> Any:
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

        def forward(self, latent_sample: Any) -> Any:
            if self.post_quant_conv is not None:
                latent_sample = self.post_quant_conv(latent_sample)
            return self.decoder(latent_sample)

    return Decoder(_load_vae(directory, dtype)).eval()


def _load_vae_encoder(directory: Path, dtype: Any) -> Any:
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

        def forward(self, sample: Any) -> Any:
            moments = self.encoder(sample)
            return moments if self.quant_conv is None else self.quant_conv(moments)

    return Encoder(_load_vae(directory, dtype)).eval()


def _picture_axes(multiple: int) -> dict[int, tuple[str, int]]:
    return {0: ("batch", 1), 2: ("height", multiple), 3: ("width", multiple)}


def _text_plan(config: Config) -> GraphPlan:
    return GraphPlan(
        inputs=("input_ids",),
        outputs={"last_hidden_state": ("batch", SEQUENCE, config["hidden_size"]), "pooler_output": ("batch", config["hidden_size"])},
        axes={"input_ids": {0: ("batch", 1)}},
    )


def _unet_plan(config: Config) -> GraphPlan:
    return GraphPlan(
        inputs=("sample", "timestep", "encoder_hidden_states"),
        outputs={"out_sample": ("batch", config["out_channels"], "height", "width")},
        axes={
            "sample": _picture_axes(spatial_multiple(config)),
            "timestep": {0: ("batch", 1)},
            "encoder_hidden_states": {0: ("batch", 1), 1: ("sequence", 1)},
        },
        spread=("timestep", "sample"),
    )


def _decoder_plan(config: Config) -> GraphPlan:
    return GraphPlan(
        inputs=("latent_sample",),
        outputs={"sample": ("batch", config["out_channels"], "height_pixels", "width_pixels")},
        axes={"latent_sample": _picture_axes(1)},
    )


def _encoder_plan(config: Config) -> GraphPlan:
    return GraphPlan(
        inputs=("sample",),
        outputs={"latent_parameters": ("batch", 2 * config["latent_channels"], "height_latent", "width_latent")},
        axes={"sample": _picture_axes(vae_factor(config))},
    )


def vae_factor(config: Config) -> int:
    """Return how many pixels a side of one latent covers."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _record_text(config: Config, sizes: Sizes) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config["vocab_size"], (sizes.batch, SEQUENCE), generator=generator)
    end = config.get("eos_token_id", 2)
    tokens[:, SEQUENCE // 2 :] = min(end, config["vocab_size"] - 1)
    return {"input_ids": tokens}


def _record_unet(config: Config, sizes: Sizes) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    unit = max(8, spatial_multiple(config))
    shape = (sizes.batch, config["in_channels"], sizes.height * unit, sizes.width * unit)
    return {
        "sample": torch.randn(shape, generator=generator),
        "timestep": torch.linspace(20.25, 900.0, sizes.batch),
        "encoder_hidden_states": torch.randn((sizes.batch, SEQUENCE, config["cross_attention_dim"]), generator=generator),
    }


def _record_decoder(config: Config, sizes: Sizes) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, config["latent_channels"], 4 * sizes.height, 4 * sizes.width)
    return {"latent_sample": torch.randn(shape, generator=generator) / config["scaling_factor"]}


def _record_encoder(config: Config, sizes: Sizes) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    unit = 4 * vae_factor(config)
    shape = (sizes.batch, config["in_channels"], sizes.height * unit, sizes.width * unit)
    return {"sample": torch.rand(shape, generator=generator) * 2 - 1}


COMPONENTS = (
    Component(name="text_encoder", folder="text_encoder", load=_load_text_encoder, plan=_text_plan, record=_record_text),
    Component(name="unet", folder="unet", load=_load_unet, plan=_unet_plan, record=_record_unet),
    Component(name="vae_decoder", folder="vae", load=_load_vae_decoder, plan=_decoder_plan, record=_record_decoder),
    Component(name="vae_encoder", folder="vae", load=_load_vae_encoder, plan=_encoder_plan, record=_record_encoder),
)
