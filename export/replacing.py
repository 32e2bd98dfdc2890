"""Networks from elsewhere in the place of a checkpoint's own: another VAE, or a UNet distilled to few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.engines.tensor_files import TensorFile
from latentrt.export.assembly import read_weights_header
from latentrt.export.families import DENOISER_PREFIX
from latentrt.export.folders import network_files, open_network, read_json, refuse_other_unet
from latentrt.export.parts import Layout, Part, Parts, Recipe
from latentrt.export.single_file import VAE_PREFIX, name_other

Network = tuple[Mapping[str, Any], Path | Recipe, list[Path]]
"""Its config, where its weights are, and the files that the export reads."""


def replace_vae(parts: Parts, name: str, *, allow_pickle: bool = False) -> Parts:
    """Put another VAE in the place of a checkpoint's: a directory of one, a checkpoint, or a safetensors file."""
    _refuse_graphs(parts, "--vae", name)
    path = Path(name)
    if path.is_file():
        config = dict(parts.configs["vae_decoder"])
        network: Network = config, _vae_recipe(read_weights_header(path, allow_pickle=allow_pickle), config), [path]
    else:
        network = _from_folder("vae", "--vae", path, allow_pickle=allow_pickle)
    return _with(parts, ("vae_decoder", "vae_encoder"), "vae", network)


def replace_unet(parts: Parts, name: str, *, allow_pickle: bool = False) -> Parts:
    """Put another UNet in the place of a checkpoint's: a directory of one, a checkpoint, or a safetensors file.

    A file has no config: its UNet is one in the sizes of the checkpoint's, but for what it takes.
    """
    _refuse_graphs(parts, "--unet", name)
    path = Path(name)
    if path.is_file():
        network = _unet_of(read_weights_header(path, allow_pickle=allow_pickle), parts.configs["unet"])
    else:
        network = _from_folder("unet", "--unet", path, allow_pickle=allow_pickle)
    refuse_other_unet(path, network[0])
    return _with(parts, ("unet",), "unet", network)


def _refuse_graphs(parts: Parts, option: str, name: str) -> None:
    if parts.source == "onnx":
        raise CheckpointError(f"{option} '{name}' cannot replace a graph that optimum exported; give diffusers' layout")


def _from_folder(part: Part, option: str, path: Path, *, allow_pickle: bool) -> Network:
    if not path.is_dir():
        raise CheckpointError(f"{option} '{path}' is not there; give a directory or a safetensors file")
    folder = path / part if (path / part).is_dir() else path
    config = read_json(folder / "config.json")
    network = open_network(part, folder, allow_pickle=allow_pickle)
    return config, network, [folder / "config.json", *network_files(folder, allow_pickle=allow_pickle)]


def _with(parts: Parts, components: tuple[str, ...], part: Part, found: Network) -> Parts:
    config, network, files = found
    kept = {key: file for key, file in parts.files.items() if not key.startswith(f"{part}/")}
    return replace(
        parts,
        configs={**parts.configs, **dict.fromkeys(components, config)},
        networks={**parts.networks, **dict.fromkeys(components, network)},
        files={**kept, **{f"{part}/{file.name}": file for file in files}},
    )


def _vae_recipe(file: TensorFile, config: Mapping[str, Any]) -> Recipe:
    keys = [key.removeprefix(VAE_PREFIX) for key in file.tensors]
    if "decoder.conv_in.weight" not in keys:
        raise CheckpointError(f"--vae '{file.path}' holds no VAE; `latentrt inspect` says what it holds")
    diffusers = any(key.startswith("decoder.up_blocks.") for key in keys)
    return _recipe("vae", file, config, layout="diffusers" if diffusers else "original")


# By layout: the keys by which a UNet is known, whose shape tells the channels that it takes, and by which it is told
# its guidance.
UNET_KEYS: Mapping[Layout, tuple[str, str]] = {
    "diffusers": ("conv_in.weight", "time_embedding.cond_proj.weight"),
    "original": ("input_blocks.0.0.weight", "time_embed.cond_proj.weight"),
}


def _unet_of(file: TensorFile, config: Mapping[str, Any]) -> Network:
    tensors = {key.removeprefix(DENOISER_PREFIX): stored for key, stored in file.tensors.items()}
    layout = next((layout for layout, (first, _) in UNET_KEYS.items() if first in tensors), None)
    if layout is None or not any(key.startswith(("down_blocks.", "input_blocks.1.")) for key in tensors):
        what = name_other(file)[0]
        raise CheckpointError(
            f"--unet '{file.path}' holds no UNet{f' but a {what}' if what else ''}; "
            + ("add it with --lora" if what == "LoRA" else "`latentrt inspect` says what it holds")
        )
    first, told = UNET_KEYS[layout]
    own = {**config, "in_channels": tensors[first].shape[1]}
    own["time_cond_proj_dim"] = tensors[told].shape[1] if told in tensors else None
    return own, _recipe("unet", file, own, layout=layout), [file.path]


def _recipe(part: Part, file: TensorFile, config: Mapping[str, Any], *, layout: Layout) -> Recipe:
    return Recipe(part=part, config=json.dumps(dict(config)), files=(str(file.path.absolute()),), layout=layout)
