"""ControlNets that are exported with a checkpoint: found, and checked against the denoiser that they control."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.controlnet_files import read_controlnet
from latentrt.export.additions.controls import Found, add_controls, option_instead
from latentrt.export.configs.defaults import per_level
from latentrt.export.configs.residuals import transformer_width
from latentrt.export.options import ControlNetOption
from latentrt.export.sources.diffusers_folder import (
    network_files,
    open_network,
    read_config,
    read_json,
    to_weight_source,
)
from latentrt.export.sources.parts import PARTS, Part, Parts, WeightSource
from latentrt.export.sources.places import absent, find_place
from latentrt.export.sources.single_file import read_weights_header

Config = Mapping[str, Any]
Needs = dict[str, tuple[Any, Any]]
"""What a ControlNet has and what it must have, by what it is called in a sentence."""
Network = Path | WeightSource
POSITIONS = "pos_embed."  # what the names of the weights begin with that tell where patches are


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The ControlNets of one kind of denoiser.

    label: diffusers' class; row: of the table of components
    plain: keys of a config, the value that is supported, and what any other is
    needs: what its config has, and what the checkpoint needs
    dimensions: the sizes that are its own, see `ControlNetwork`
    files: whether one may be a file of weights alone
    completed: how its network is written where it shares weights with the denoiser
    """

    label: str
    row: Part
    plain: tuple[tuple[str, Any, str], ...]
    needs: Callable[[Config, Parts], Needs]
    dimensions: Callable[[Config], dict[str, int]] = lambda _: {}
    files: bool = False
    completed: Callable[[Config, Network, Parts], Network] = lambda _, network, __: network


def add_controlnets(parts: Parts, options: Sequence[ControlNetOption], *, allow_pickle: bool) -> Parts:
    """Add ControlNets to a checkpoint's networks. Raises CheckpointError if one is missing or made for another."""
    kind = KINDS[parts.denoiser]
    read = partial(_read, kind=kind, allow_pickle=allow_pickle)
    return add_controls(parts, options, read, kind="controlnet", row=kind.row, dimensions=kind.dimensions)


def _read(option: ControlNetOption, parts: Parts, *, kind: Kind, allow_pickle: bool) -> Found:
    path = find_place(option.path)
    config: Config
    if path.is_dir():
        _require_kind(option, read_json(path / "config.json"), kind)
        network: Network = open_network(kind.row, path, allow_pickle=allow_pickle)
        config = read_config(kind.row, path)
        files = [path / "config.json", *network_files(path, allow_pickle=allow_pickle)]
    elif path.is_file() and kind.files:
        config, network = read_controlnet(_name(option), read_weights_header(path, allow_pickle=allow_pickle), parts)
        files = [path]
    else:
        known = f"a directory with a {kind.label}" + (", or a safetensors file" if kind.files else "")
        found = "is a file" if path.is_file() else absent(option.path)
        raise CheckpointError(f"{_name(option)} {found}; give {known}")
    _check(option, config, parts, kind)
    return config, kind.completed(config, network, parts), files


def _name(option: ControlNetOption) -> str:
    return f"--controlnet {option.name}='{option.path}'"


def _require_kind(option: ControlNetOption, config: Config, kind: Kind) -> None:
    found = config.get("_class_name", kind.label)
    if found != kind.label:
        instead = option_instead(found, "--controlnet")
        fault = f", expected a {kind.label}{instead}"
        if not instead:
            fault = f", which is not supported beside this checkpoint; expected a {kind.label}"
        raise CheckpointError(f"{_name(option)} was recognised as {found}{fault}")


def _check(option: ControlNetOption, config: Config, parts: Parts, kind: Kind) -> None:
    """Refuse a ControlNet whose residuals or inputs are not those of the checkpoint's denoiser."""
    for key, plain, meaning in kind.plain:
        if config[key] != plain:
            raise CheckpointError(
                f"{_name(option)} was recognised as {meaning} (its config says {key}: {config[key]}), which is not "
                "supported; give a plain ControlNet"
            )
    for what, (found, expected) in kind.needs(config, parts).items():
        if found != expected:
            raise CheckpointError(
                f"{_name(option)} was made for another checkpoint: its {what} is {_short(found)} where this one's is "
                f"{_short(expected)}; give a ControlNet for this family"
            )


def _unet_needs(config: Config, parts: Parts) -> Needs:
    unet, vae = parts.configs[parts.denoiser], parts.configs["vae_decoder"]
    levels = len(unet["block_out_channels"])

    def both(key: str) -> tuple[Any, Any]:
        return per_level(config[key], levels), per_level(unet[key], levels)

    return {
        "in_channels": (config["in_channels"], vae["latent_channels"]),
        "block_out_channels": (list(config["block_out_channels"]), list(unet["block_out_channels"])),
        "layers_per_block": both("layers_per_block"),
        "cross_attention_dim": both("cross_attention_dim"),
        "addition_embed_type": (config["addition_embed_type"], unet["addition_embed_type"]),
        "pixels a latent": (
            2 ** (len(config["conditioning_embedding_out_channels"]) - 1),
            2 ** (len(vae["block_out_channels"]) - 1),
        ),
    }


def _transformer_needs(config: Config, parts: Parts) -> Needs:
    transformer = parts.configs[parts.denoiser]
    text, positions = config["joint_attention_dim"], transformer["pos_embed_max_size"]
    placed = config["use_pos_embed"] and config["pos_embed_type"]
    return {
        "in_channels": (config["in_channels"], parts.configs["vae_decoder"]["latent_channels"]),
        "patch_size": (config["patch_size"], transformer["patch_size"]),
        "width": (transformer_width(config), transformer_width(transformer)),
        "joint_attention_dim": (text, text and transformer["joint_attention_dim"]),
        "pooled_projection_dim": (config["pooled_projection_dim"], transformer["pooled_projection_dim"]),
        "pos_embed_max_size": (config["pos_embed_max_size"] if placed else positions, positions),
    }


def _transformer_dimensions(config: Config) -> dict[str, int]:
    """Return 0 for the text that a ControlNet does not read, and for the pooled text that it sees as zeros."""
    pooled = {"pooled_width": 0} if config["force_zeros_for_pooled_projection"] else {}
    return pooled if config["joint_attention_dim"] else {**pooled, "attention_width": 0}


def _with_positions(config: Config, network: Network, parts: Parts) -> Network:
    """Return how to write a ControlNet that has no positions of its own with the transformer's, as diffusers does."""
    if config["use_pos_embed"]:
        return network
    denoiser = parts.denoiser
    transformer, own = parts.configs[denoiser], to_weight_source(KINDS[denoiser].row, network)
    shared = {"use_pos_embed": True, "pos_embed_type": "sincos"}
    shared |= {key: transformer[key] for key in ("sample_size", "pos_embed_max_size")}
    beside = replace(to_weight_source(PARTS[denoiser], parts.networks[denoiser]), starts=POSITIONS)
    return replace(own, config=json.dumps(json.loads(own.config) | shared), beside=beside)


def _short(value: Any) -> str:
    same = isinstance(value, list) and len(set(value)) == 1
    return str(value[0] if same else value)


KINDS: Mapping[str, Kind] = {
    "unet": Kind(
        label="ControlNetModel",
        row="controlnet",
        plain=(
            ("global_pool_conditions", False, "one that sees the whole picture at once"),
            ("class_embed_type", None, "one with class embeddings"),
            ("num_class_embeds", None, "one with class embeddings"),
            ("encoder_hid_dim_type", None, "one with image prompts"),
            ("conditioning_channels", 3, "one for other pictures than RGB"),
        ),
        needs=_unet_needs,
        files=True,
    ),
    "transformer": Kind(
        label="SD3ControlNetModel",
        row="transformer_controlnet",
        plain=(("extra_conditioning_channels", 0, "one for inpainting, which reads a mask beside its image"),),
        needs=_transformer_needs,
        dimensions=_transformer_dimensions,
        completed=_with_positions,
    ),
}
CLASSES = tuple(kind.label for kind in KINDS.values())
