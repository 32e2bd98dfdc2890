"""A ControlNet that is one file of weights: its config is that of the UNet it was made for, and what its keys tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from latentrt.engines.bundle.safetensors_header import StoredTensor, TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.defaults import complete
from latentrt.export.configs.families import CONTROLNET
from latentrt.export.sources.diffusers_folder import to_weight_source
from latentrt.export.sources.markers import find_strangers
from latentrt.export.sources.parts import Layout, Parts, WeightSource
from latentrt.export.sources.recognise_file import PREFIXES, name_other, say_instead
from latentrt.export.sources.structure import CONTROLNET_NAMES, read_structure

PREFIX = "control_model."
DIFFERENCE = "difference"  # the mark of a file whose weights are to be added to a UNet's
EMBEDDING = (16, 32, 96, 256)  # channels of what reads the picture to follow, in every published one
# By layout: the first weight, what reads the picture to follow, and what takes the numbers beside the text.
KEYS: Mapping[Layout, tuple[str, str, str]] = {
    "diffusers": ("conv_in.weight", "controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight"),
    "original": ("input_blocks.0.0.weight", "input_hint_block.0.weight", "label_emb.0.0.weight"),
}
# What a file of weights alone does not say is as in the UNet that it was copied from, under the same keys.
COPIED = (
    "act_fn",
    "addition_embed_type",
    "addition_time_embed_dim",
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "flip_sin_to_cos",
    "freq_shift",
    "layers_per_block",
    "mid_block_scale_factor",
    "mid_block_type",
    "norm_eps",
    "norm_num_groups",
    "num_attention_heads",
    "only_cross_attention",
    "projection_class_embeddings_input_dim",
    "resnet_time_scale_shift",
    "transformer_layers_per_block",
    "upcast_attention",
    "use_linear_projection",
)


def read_controlnet(name: str, file: TensorFile, parts: Parts) -> tuple[Mapping[str, Any], WeightSource]:
    """Return the config of a ControlNet in a file, and how to write its folder.

    name: how it was given, for the error; parts: the checkpoint that it is for. Raises CheckpointError.
    Differences are added to the checkpoint's UNet as it is exported: with its LoRAs.
    """
    tensors = {key.removeprefix(PREFIX): stored for key, stored in file.tensors.items()}
    layout = next((layout for layout, (first, mark, _) in KEYS.items() if {first, mark} <= tensors.keys()), None)
    other = name_other(file)[0] != CONTROLNET
    if layout is None or other:
        instead = say_instead(file) if other else "; `latentrt inspect` says what it holds"
        raise CheckpointError(f"{name} holds no ControlNet{instead}")
    _refuse_strangers(name, file, layout)
    config = _config(name, tensors, layout, parts.configs["unet"])
    base = _base(name, config, parts) if DIFFERENCE in tensors else None
    text, path = json.dumps(config), str(file.path.absolute())
    return complete("controlnet", config, where=name), WeightSource(
        part="controlnet", config=text, files=(path,), layout=layout, base=base
    )


def _refuse_strangers(name: str, file: TensorFile, layout: Layout) -> None:
    own = CONTROLNET_NAMES[layout]
    prefixes = (*PREFIXES, *own, *(PREFIX + name for name in own))
    strangers = [key for key in find_strangers(file, prefixes) if key.removeprefix(PREFIX) != DIFFERENCE]
    if strangers:
        raise CheckpointError(
            f"{name} holds tensors that no ControlNet known here has ({', '.join(strangers[:3])}), so they may change "
            "what it does; give a plain ControlNet"
        )


def _config(name: str, tensors: Mapping[str, StoredTensor], layout: Layout, unet: Mapping[str, Any]) -> dict[str, Any]:
    first, mark, added = KEYS[layout]
    config = {key: unet[key] for key in COPIED if key in unet}
    blocks = read_structure({key: stored.shape for key, stored in tensors.items()}, layout).changes(config)
    if blocks is None:
        raise CheckpointError(
            f"{name} has blocks that its keys alone do not describe; give a directory that holds its config.json "
            "beside the weights, as diffusers writes it"
        )
    widths = (stored.shape[-1] for key, stored in tensors.items() if key.endswith(".attn2.to_k.weight"))
    return {
        **config,
        **blocks,
        "cross_attention_dim": next(widths, unet.get("cross_attention_dim", 1280)),
        "addition_embed_type": unet.get("addition_embed_type") if added in tensors else None,
        "in_channels": tensors[first].shape[1],
        "conditioning_channels": tensors[mark].shape[1],
        "conditioning_embedding_out_channels": EMBEDDING if layout == "original" else _embedding(tensors, mark),
    }


def _embedding(tensors: Mapping[str, StoredTensor], mark: str) -> tuple[int, ...]:
    """Return the channels of what reads the picture to follow: every other of its blocks has more than the last."""
    stem = mark.removesuffix("conv_in.weight")
    widths = [tensors[mark].shape[0]]
    while (key := f"{stem}blocks.{2 * len(widths) - 1}.weight") in tensors:
        widths.append(tensors[key].shape[0])
    return tuple(widths)


def _base(name: str, config: Mapping[str, Any], parts: Parts) -> WeightSource:
    takes = parts.configs["unet"].get("in_channels", 4)
    if config["in_channels"] != takes:
        raise CheckpointError(
            f"{name} holds differences to a UNet that takes {config['in_channels']} channels, and the checkpoint's "
            f"takes {takes}; give a whole ControlNet"
        )
    return to_weight_source("unet", parts.networks["unet"])
