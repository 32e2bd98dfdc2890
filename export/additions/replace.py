"""Networks from elsewhere in place of a checkpoint's own: another VAE, or a UNet distilled to few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.safetensors_header import TensorFile
from latentrt.engines.bundle.training import Prediction
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.families import DENOISER_PREFIX
from latentrt.export.sources.diffusers_folder import (
    network_files,
    open_network,
    read_config,
    refuse_other_unet,
    refuse_other_vae,
)
from latentrt.export.sources.markers import find_markers, find_prediction, find_strangers, read_changes
from latentrt.export.sources.parts import Layout, Part, Parts, WeightSource
from latentrt.export.sources.places import absent, find_place
from latentrt.export.sources.recognise_file import PREFIXES, VAE_PREFIX, say_instead
from latentrt.export.sources.single_file import read_weights_header
from latentrt.export.sources.structure import UNET_NAMES, read_structure

Network = tuple[Mapping[str, Any], Path | WeightSource, list[Path]]
"""Its config, where its weights are, and the files that the export reads."""


def replace_vae(parts: Parts, name: str, *, allow_pickle: bool = False) -> Parts:
    """Put another VAE in place of a checkpoint's: a directory of one, a checkpoint, or a safetensors file."""
    _refuse_graphs(parts, "--vae", name)
    path = find_place(name)
    if path.is_file():
        network = _vae_of(read_weights_header(path, allow_pickle=allow_pickle), parts.configs["vae_decoder"])
    else:
        network = _from_folder("vae", "--vae", path, allow_pickle=allow_pickle)
    refuse_other_vae(path, network[0])
    return _with(parts, ("vae_decoder", "vae_encoder"), "vae", network)


def replace_unet(parts: Parts, name: str, *, allow_pickle: bool = False, prediction: Prediction | None = None) -> Parts:
    """Put another UNet in place of a checkpoint's: a directory of one, a checkpoint, or a safetensors file.

    A file has no config: its UNet is like the checkpoint's, but for what its keys tell. What it says of how it was
    trained changes the checkpoint's schedule and latents.
    prediction: what it is known to predict, where it contradicts itself
    """
    _refuse_graphs(parts, "--unet", name)
    path = find_place(name)
    if path.is_file():
        file = read_weights_header(path, allow_pickle=allow_pickle)
        network = _unet_of(file, parts.configs["unet"])
        parts = _as_trained(parts, file, prediction)
    else:
        network = _from_folder("unet", "--unet", path, allow_pickle=allow_pickle)
    refuse_other_unet(path, network[0])
    return _with(parts, ("unet",), "unet", network)


def _refuse_graphs(parts: Parts, option: str, name: str) -> None:
    if parts.source == "onnx":
        raise CheckpointError(f"{option} '{name}' cannot replace a graph that optimum exported; give diffusers' layout")


def _from_folder(part: Part, option: str, path: Path, *, allow_pickle: bool) -> Network:
    if not path.is_dir():
        raise CheckpointError(f"{option} '{path}' {absent(str(path))}; give a directory or a safetensors file")
    folder = path / part if (path / part).is_dir() else path
    config = read_config(part, folder)
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


def _vae_of(file: TensorFile, config: Mapping[str, Any]) -> Network:
    tensors = {key.removeprefix(VAE_PREFIX): stored for key, stored in file.tensors.items()}
    if VAE_KEY not in tensors:
        raise CheckpointError(f"--vae '{file.path}' holds no VAE{say_instead(file)}")
    own = {**config, "latent_channels": tensors[VAE_KEY].shape[1]}
    diffusers = any(key.startswith("decoder.up_blocks.") for key in tensors)
    return own, _weight_source("vae", file, own, layout="diffusers" if diffusers else "original"), [file.path]


VAE_KEY = "decoder.conv_in.weight"


def _as_trained(parts: Parts, file: TensorFile, prediction: Prediction | None) -> Parts:
    """Return a checkpoint with the schedule and the latents that a UNet's file says it was trained for."""
    found, reason = find_prediction(file)
    if strangers := find_strangers(file, (*PREFIXES, *(name for names in UNET_NAMES.values() for name in names))):
        raise CheckpointError(
            f"--unet '{file.path}' holds tensors that no UNet known here has ({', '.join(strangers[:3])}), so they may "
            "change what it draws; give a directory that holds its config.json beside the weights"
        )
    if reason and found is None and prediction is None:
        raise CheckpointError(f"--unet '{file.path}' needs --prediction-type, because {reason}")
    changes = read_changes(file, find_markers(file))
    predicts = {"prediction_type": found} if found else {}
    vaes = {name: {**parts.configs[name], **changes.vae} for name in ("vae_decoder", "vae_encoder")}
    return replace(
        parts,
        scheduler={**changes.schedule(parts.scheduler), **predicts},
        configs={**parts.configs, **vaes},
    )


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
        raise CheckpointError(f"--unet '{file.path}' holds no UNet{say_instead(file)}")
    blocks = read_structure({key: stored.shape for key, stored in tensors.items()}, layout).changes(config)
    if blocks is None:
        raise CheckpointError(
            f"--unet '{file.path}' has blocks that its keys alone do not describe; give a directory that holds its "
            "config.json beside the weights, as diffusers writes it"
        )
    first, guidance_key = UNET_KEYS[layout]
    own = {**config, **blocks, "in_channels": tensors[first].shape[1]}
    own["time_cond_proj_dim"] = tensors[guidance_key].shape[1] if guidance_key in tensors else None
    return own, _weight_source("unet", file, own, layout=layout), [file.path]


def _weight_source(part: Part, file: TensorFile, config: Mapping[str, Any], *, layout: Layout) -> WeightSource:
    return WeightSource(part=part, config=json.dumps(dict(config)), files=(str(file.path.absolute()),), layout=layout)
