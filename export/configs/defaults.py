"""What a network's config.json says once the defaults of the class that reads it are in place.

tests/test_configs.py compares every default with the signatures of diffusers and transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.export.sources.parts import Part

Fits = Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value != 0


def _is_list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(fits, value))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_count, value))


# Kinds of values: what fits them, and how they are called.
COUNT: tuple[Fits, str] = _is_count, "a whole number above 0"
ID: tuple[Fits, str] = _is_id, "a whole number from 0 up"
NUMBER: tuple[Fits, str] = _is_number, "a number other than 0"
ANY_NUMBER: tuple[Fits, str] = (lambda value: value == 0 or _is_number(value)), "a number"
TEXT: tuple[Fits, str] = (lambda value: isinstance(value, str)), "a text"
COUNTS: tuple[Fits, str] = _is_list_of(_is_count), "a list of whole numbers above 0"
IDS: tuple[Fits, str] = (
    (lambda value: value in ([], ()) or _is_list_of(_is_id)(value)),
    "a list of whole numbers from 0",
)
TEXTS: tuple[Fits, str] = _is_list_of(lambda value: isinstance(value, str)), "a list of texts"
PER_LEVEL: tuple[Fits, str] = (lambda value: _is_count(value) or COUNTS[0](value)), f"{COUNT[1]}, or a list of them"
SIZE: tuple[Fits, str] = (lambda value: _is_count(value) or _is_pair(value)), f"{COUNT[1]}, or [height, width]"
SWITCH: tuple[Fits, str] = (lambda value: isinstance(value, bool)), "true or false"
ANY: tuple[Fits, str] = (lambda _: True), "anything"  # whoever reads it looks at it


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a config: what its absence means and what may stand there.

    null: what null means; a key whose libraries fail on null has none
    """

    default: Any
    kind: tuple[Fits, str]
    null: tuple[Any, ...] = ()


def _optional(kind: tuple[Fits, str]) -> Key:
    return Key(None, kind, (None,))


_LEVELS = Key((320, 640, 1280, 1280), COUNTS)
_CONDITIONED = {
    "addition_embed_type": _optional(TEXT),
    "class_embed_type": _optional(ANY),
    "num_class_embeds": _optional(ANY),
    "encoder_hid_dim_type": _optional(ANY),
}
_CLIP = {
    "vocab_size": Key(49408, COUNT),
    "hidden_size": Key(512, COUNT),
    "projection_dim": Key(512, COUNT, (None,)),
    "num_hidden_layers": Key(12, COUNT),
    "max_position_embeddings": Key(77, COUNT),
    "hidden_act": Key("quick_gelu", TEXT),
    "eos_token_id": Key(49407, ID),
}
_T5 = {"vocab_size": Key(32128, COUNT), "d_model": Key(512, COUNT)}
_UNET = {
    "in_channels": Key(4, COUNT),
    "block_out_channels": _LEVELS,
    "down_block_types": Key(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), TEXTS),
    "layers_per_block": Key(2, PER_LEVEL),
    "cross_attention_dim": Key(1280, PER_LEVEL),
    **_CONDITIONED,
}
_TRANSFORMER = {
    "sample_size": Key(128, SIZE),
    "patch_size": Key(2, COUNT),
    "in_channels": Key(16, COUNT),
    "num_layers": Key(18, COUNT),
    "attention_head_dim": Key(64, COUNT),
    "num_attention_heads": Key(18, COUNT),
    "joint_attention_dim": Key(4096, COUNT),
    "caption_projection_dim": Key(1152, COUNT),
    "pooled_projection_dim": Key(2048, COUNT),
    "out_channels": Key(16, COUNT, (None,)),
    "pos_embed_max_size": Key(96, COUNT),
    "dual_attention_layers": Key((), IDS),
}
_VAE = {
    "latent_channels": Key(4, COUNT),
    "out_channels": Key(3, COUNT),
    "block_out_channels": Key((64,), COUNTS),
    "down_block_types": Key(("DownEncoderBlock2D",), TEXTS),
    "scaling_factor": Key(0.18215, NUMBER),
}
# Every key of a config that is read here. What else a config says is for the libraries alone.
KEYS: Mapping[Part, Mapping[str, Key]] = {
    "text_encoder": _CLIP,
    "text_encoder_2": {**_CLIP, "projection_dim": Key(512, COUNT)},
    "text_encoder_3": _T5,
    "unet": {
        **_UNET,
        "sample_size": _optional(SIZE),
        "out_channels": Key(4, COUNT),
        "addition_time_embed_dim": _optional(COUNT),
        "projection_class_embeddings_input_dim": _optional(COUNT),
        "time_cond_proj_dim": _optional(COUNT),
    },
    "transformer": _TRANSFORMER,
    "video_unet": {
        "in_channels": Key(8, COUNT),
        "out_channels": Key(4, COUNT),
        "sample_size": _optional(SIZE),
        "block_out_channels": _LEVELS,
        "down_block_types": Key(
            ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
            TEXTS,
        ),
        "cross_attention_dim": Key(1024, PER_LEVEL),
        "addition_time_embed_dim": Key(256, COUNT),
        "projection_class_embeddings_input_dim": Key(768, COUNT),
        "num_frames": Key(25, COUNT),
    },
    "video_vae": _VAE,
    "vae": {
        **_VAE,
        "shift_factor": _optional(ANY_NUMBER),
        "latents_mean": _optional(ANY),
        "latents_std": _optional(ANY),
    },
    "controlnet": {
        **_UNET,
        "conditioning_channels": Key(3, COUNT),
        "conditioning_embedding_out_channels": Key((16, 32, 96, 256), COUNTS),
        "global_pool_conditions": Key(False, SWITCH, (False,)),
    },
    "transformer_controlnet": {
        "patch_size": Key(2, COUNT),
        "in_channels": Key(16, COUNT),
        "num_layers": Key(18, COUNT),
        "attention_head_dim": Key(64, COUNT),
        "num_attention_heads": Key(18, COUNT),
        "joint_attention_dim": Key(4096, COUNT, (None,)),
        "pooled_projection_dim": Key(2048, COUNT),
        "pos_embed_max_size": Key(96, COUNT, (None,)),
        "extra_conditioning_channels": Key(0, ID),
        "pos_embed_type": Key("sincos", TEXT, (None,)),
        "use_pos_embed": Key(True, SWITCH),
        "force_zeros_for_pooled_projection": Key(True, SWITCH, (False,)),
    },
    "adapter": {
        "in_channels": Key(3, COUNT),
        "channels": _LEVELS,
        "downscale_factor": Key(8, COUNT),
        "adapter_type": Key("full_adapter", TEXT),
    },
    "motion_adapter": {
        "block_out_channels": _LEVELS,
        "motion_layers_per_block": Key(2, PER_LEVEL),
        "motion_transformer_layers_per_block": Key(1, ANY),
        "motion_transformer_layers_per_mid_block": Key(1, PER_LEVEL),
        "motion_num_attention_heads": Key(8, PER_LEVEL),
        "motion_max_seq_length": Key(32, COUNT),
        "use_motion_mid_block": Key(True, SWITCH),
        "conv_in_channels": _optional(COUNT),
    },
    "image_encoder": {
        "hidden_size": Key(768, COUNT),
        "image_size": Key(224, COUNT),
        "patch_size": Key(32, COUNT),
        "projection_dim": Key(512, COUNT),
    },
    "tiny_vae": {
        "latent_channels": Key(4, COUNT),
        "out_channels": Key(3, COUNT),
        "decoder_block_out_channels": Key((64, 64, 64, 64), COUNTS),
        "upsampling_scaling_factor": Key(2, COUNT),
        "scaling_factor": Key(1.0, NUMBER),
    },
}
UNUSED = "_use_default_values"  # diffusers' list of keys that it wrote and does not read


def complete(part: Part, config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a config in which every key of the table has a value that the libraries take.

    where: the config's file, for the error
    Raises CheckpointError.
    """
    unused = config.get(UNUSED)
    left = {key: value for key, value in config.items() if key not in (unused or ())}
    return {**left, **{key: _value(left, key, row, where) for key, row in KEYS[part].items()}}


def require_levels(config: Mapping[str, Any], *, where: str) -> None:
    """Raise CheckpointError if a network's levels are not all described. where: the network, for the error"""
    levels, blocks = len(config["block_out_channels"]), len(config["down_block_types"])
    if levels != blocks:
        raise CheckpointError(
            f"{where} names {blocks} down_block_types and {levels} block_out_channels, expected one of each for "
            "each level; restore the config"
        )


def per_level(value: Any, levels: int) -> list[Any]:
    """Return a config's value for each level of a network: one stands for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _value(config: Mapping[str, Any], key: str, row: Key, where: str) -> Any:
    """Return what a config says for a key."""
    if key not in config:
        return row.default
    value = config[key]
    if value is None and row.null:
        return row.null[0]
    if value is None or not row.kind[0](value):
        raise CheckpointError(
            f"{where} $.{key}: found {json.dumps(value)}, expected {row.kind[1]}; restore the config, or omit the key "
            f"where its default, {json.dumps(row.default)}, is meant"
        )
    return value
