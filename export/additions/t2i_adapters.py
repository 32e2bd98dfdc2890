"""T2I-Adapters that are exported with a checkpoint: found, and checked against the UNet that they control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.engines.tensor_names import FEATURE
from latentrt.export.additions.controls import Found, add_controls, option_instead
from latentrt.export.options import ControlNetOption
from latentrt.export.sources.diffusers_folder import network_files, open_network, read_config
from latentrt.export.sources.parts import Parts
from latentrt.export.sources.places import absent, find_place

KIND = "T2IAdapter"
Sizes = list[tuple[int, int]]
"""Of each feature, its channels and how many latents an element of it is wide."""


def add_adapters(parts: Parts, options: Sequence[ControlNetOption], *, allow_pickle: bool) -> Parts:
    """Add T2I-Adapters to a checkpoint's networks. Raises CheckpointError if one is missing or made for another."""
    return add_controls(parts, options, partial(_read, allow_pickle=allow_pickle), kind="adapter", row="adapter")


def _read(option: ControlNetOption, parts: Parts, *, allow_pickle: bool) -> Found:
    path, name = find_place(option.path), f"--adapter {option.name}='{option.path}'"
    if not path.is_dir():
        raise CheckpointError(f"{name} {absent(option.path)}; give a directory in diffusers' layout")
    config = read_config("adapter", path)
    if config.get("_class_name", KIND) != KIND:
        other = str(config["_class_name"])
        instead = option_instead(other, "--adapter")
        raise CheckpointError(f"{name} was recognised as {other}, expected a {KIND}{instead}")
    if config["in_channels"] not in (1, 3):
        raise CheckpointError(f"{name} reads {config['in_channels']} channels, expected grey or RGB")
    wanted, found = block_features(parts.configs["unet"]), adapter_features(config, factor=_factor(parts.configs))
    if found not in (wanted, wanted[:-1]):
        raise CheckpointError(
            f"{name} was made for another checkpoint: its features are {_words(found)} where this one's UNet takes "
            f"{_words(wanted)}; give an adapter for this family"
        )
    others = [adapter_features(config, factor=_factor(parts.configs)) for config in _adapters(parts)]
    if any(other != found for other in others):
        raise CheckpointError(f"{name} has {len(found)} features and another adapter {len(others[0])}; add one of them")
    files = [path / "config.json", *network_files(path, allow_pickle=allow_pickle)]
    return config, open_network("adapter", path, allow_pickle=allow_pickle), files


def _factor(configs: Mapping[str, Mapping[str, Any]]) -> int:
    return int(2 ** (len(configs["vae_decoder"]["block_out_channels"]) - 1))


def _adapters(parts: Parts) -> list[Mapping[str, Any]]:
    return [parts.configs[name] for name in parts.controls_of("adapter")]


def _words(sizes: Sizes) -> str:
    return ", ".join(f"{channels} channels at 1/{divisor}" for channels, divisor in sizes)


def block_features(unet: Mapping[str, Any]) -> Sizes:
    """Return what a UNet's blocks take on the way down, and last its middle.

    A block with attention takes its feature before it halves its latents, one without takes it after.
    """
    channels, kinds = list(unet["block_out_channels"]), list(unet["down_block_types"])
    last = len(channels) - 1
    halved = [level + (level < last and "CrossAttn" not in kind) for level, kind in enumerate(kinds)]
    sizes = [(width, 2**level) for width, level in zip(channels, halved, strict=True)]
    return [*sizes, (channels[-1], 2**last)]


def adapter_features(config: Mapping[str, Any], *, factor: int) -> Sizes:
    """Return what a T2I-Adapter gives. factor: pixels a latent"""
    kind, channels = config["adapter_type"], list(config["channels"])
    first = config["downscale_factor"] / factor
    if kind == "full_adapter_xl":  # halved once, before the third
        levels = [int(number >= 2) for number in range(len(channels))]
    else:
        channels += channels[-1:] if kind == "light_adapter" else []
        levels = list(range(len(channels)))
    return [(width, int(first * 2**level)) for width, level in zip(channels, levels, strict=True)]


def feature_dimensions(parts: Parts) -> dict[str, int]:
    """Name the sizes of what adapters give; there are no features where there is no adapter."""
    first = next(iter(_adapters(parts)), None)
    if first is None:
        return {"adapter_features": 0, "adapter_multiple": 1}
    sizes = adapter_features(first, factor=_factor(parts.configs))
    found = {"adapter_features": len(sizes), "adapter_multiple": first["downscale_factor"]}
    for number, (width, divisor) in enumerate(sizes):
        found |= {f"{FEATURE}{number}_channels": width, f"{FEATURE}{number}_divisor": divisor}
    return found
