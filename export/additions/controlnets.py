"""ControlNets that are exported with a checkpoint: found, and checked against the UNet that they control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.controlnet_files import read_controlnet
from latentrt.export.additions.controls import Found, add_controls
from latentrt.export.options import ControlNetOption
from latentrt.export.sources.diffusers_folder import network_files, open_network, read_config, read_json
from latentrt.export.sources.parts import Parts, WeightSource
from latentrt.export.sources.single_file import read_weights_header

KIND = "ControlNetModel"
# Keys of a config that must be absent or have this value, and what any other is.
PLAIN: tuple[tuple[str, Any, str], ...] = (
    ("global_pool_conditions", False, "one that sees the whole picture at once"),
    ("class_embed_type", None, "one with class embeddings"),
    ("num_class_embeds", None, "one with class embeddings"),
    ("encoder_hid_dim_type", None, "one with image prompts"),
    ("conditioning_channels", 3, "one for other pictures than RGB"),
)


def add_controlnets(parts: Parts, options: Sequence[ControlNetOption], *, allow_pickle: bool) -> Parts:
    """Add ControlNets to a checkpoint's networks. Raises CheckpointError if one is missing or made for another."""
    return add_controls(parts, options, partial(_read, allow_pickle=allow_pickle), row="controlnet")


def _read(option: ControlNetOption, parts: Parts, *, allow_pickle: bool) -> Found:
    path = Path(option.path).expanduser()
    config: Mapping[str, Any]
    if path.is_dir():
        _require_kind(option, read_json(path / "config.json"))
        network: Path | WeightSource = open_network("controlnet", path, allow_pickle=allow_pickle)
        config = read_config("controlnet", path)
        files = [path / "config.json", *network_files(path, allow_pickle=allow_pickle)]
    elif path.is_file():
        config, network = read_controlnet(_name(option), read_weights_header(path, allow_pickle=allow_pickle), parts)
        files = [path]
    else:
        raise CheckpointError(f"{_name(option)} is not there; give a directory or a safetensors file")
    _check(option, config, parts)
    return config, network, files


def _name(option: ControlNetOption) -> str:
    return f"--controlnet {option.name}='{option.path}'"


def _require_kind(option: ControlNetOption, config: Mapping[str, Any]) -> None:
    kind = config.get("_class_name", KIND)
    if kind != KIND:
        raise CheckpointError(f"{_name(option)} was recognised as {kind}, which is not supported; expected a {KIND}")


def _latent_channels(parts: Parts) -> int:
    return int(parts.configs["vae_decoder"]["latent_channels"])


def _check(option: ControlNetOption, config: Mapping[str, Any], parts: Parts) -> None:
    """Refuse a ControlNet whose residuals or inputs are not those of the checkpoint's UNet."""
    for key, plain, meaning in PLAIN:
        if config[key] != plain:
            raise CheckpointError(
                f"{_name(option)} was recognised as {meaning} (its config says {key}: {config[key]}), which is not "
                "supported; give a plain ControlNet"
            )
    unet, channels = parts.configs["unet"], _latent_channels(parts)
    levels = len(unet["block_out_channels"])
    factor = 2 ** (len(parts.configs["vae_decoder"]["block_out_channels"]) - 1)

    def both(key: str) -> tuple[Any, Any]:
        return per_level(config[key], levels), per_level(unet[key], levels)

    needs: dict[str, tuple[Any, Any]] = {  # what it has, what it needs
        "in_channels": (config["in_channels"], channels),
        "block_out_channels": (list(config["block_out_channels"]), list(unet["block_out_channels"])),
        "layers_per_block": both("layers_per_block"),
        "cross_attention_dim": both("cross_attention_dim"),
        "addition_embed_type": (config["addition_embed_type"], unet["addition_embed_type"]),
        "pixels a latent": (2 ** (len(config["conditioning_embedding_out_channels"]) - 1), factor),
    }
    for what, (found, expected) in needs.items():
        if found != expected:
            raise CheckpointError(
                f"{_name(option)} was made for another checkpoint: its {what} is {_short(found)} where this one's is "
                f"{_short(expected)}; give a ControlNet for this family"
            )


def per_level(value: Any, levels: int) -> list[Any]:
    """Return a config's value for each level of a network: one stands for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _short(value: Any) -> str:
    same = isinstance(value, list) and len(set(value)) == 1
    return str(value[0] if same else value)
