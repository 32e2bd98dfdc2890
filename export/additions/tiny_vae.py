"""A tiny VAE that is added to a checkpoint (diffusers' AutoencoderTiny, such as TAESD): its decoder is exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import CheckpointError
from latentrt.export.sources.diffusers_folder import network_files, read_config
from latentrt.export.sources.parts import Parts
from latentrt.export.sources.places import absent, find_place

KIND = "AutoencoderTiny"
TINY_DECODER = "tiny_decoder"


def add_tiny_vae(parts: Parts, name: str) -> Parts:
    """Put a tiny VAE's decoder beside a checkpoint's networks. Raises CheckpointError.

    name: a directory that diffusers wrote, or one that holds it as `vae`
    """
    if parts.source == "onnx":
        raise CheckpointError(
            f"--tiny-vae '{name}' cannot be added to graphs that optimum exported; give diffusers' layout"
        )
    path = find_place(name)
    if not path.exists():
        raise CheckpointError(f"--tiny-vae '{name}' {absent(name)}; give a directory of diffusers")
    if not path.is_dir():
        raise CheckpointError(
            f"--tiny-vae '{name}' is not a directory; give one of diffusers, with config.json beside the weights"
        )
    folder = path / "vae" if (path / "vae").is_dir() else path
    config = read_config("tiny_vae", folder)
    if config.get("_class_name") != KIND:
        raise CheckpointError(
            f"{folder / 'config.json'} $._class_name: found {config.get('_class_name')!r}, expected {KIND}; "
            "give a full-size VAE with --vae"
        )
    files = [folder / "config.json", *network_files(folder, allow_pickle=False)]
    return replace(
        parts,
        configs={**parts.configs, TINY_DECODER: config},
        networks={**parts.networks, TINY_DECODER: folder},
        files={**parts.files, **{f"{TINY_DECODER}/{file.name}": file for file in files}},
    )


def check_tiny_vae(configs: Mapping[str, Mapping[str, Any]], latents: LatentSpec) -> None:
    """Refuse a tiny decoder whose latents are not the checkpoint's, or that gives another size than its VAE."""
    if TINY_DECODER not in configs:
        return
    config = configs[TINY_DECODER]
    levels = len(config["decoder_block_out_channels"]) - 1
    found = (config["latent_channels"], config["upsampling_scaling_factor"] ** levels, config["out_channels"])
    expected = (latents.channels, latents.factor, configs["vae_decoder"]["out_channels"])
    if found != expected:
        described = "{} latent channels, {} pixels to a latent and {} channels of colour"
        raise CheckpointError(
            f"--tiny-vae: found a decoder of {described.format(*found)}, and the checkpoint's VAE has "
            f"{described.format(*expected)}; give the tiny VAE that was made for it"
        )
