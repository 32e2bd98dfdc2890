"""A motion adapter (AnimateDiff) that is put into a checkpoint's UNet: found, and checked against it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.manifest import FrameRange
from latentrt.engines.bundle.safetensors_header import TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.defaults import complete, per_level
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.diffusers_folder import network_files, open_network, read_config, to_weight_source
from latentrt.export.sources.parts import Layout, Parts, WeightSource
from latentrt.export.sources.places import absent, find_place
from latentrt.export.sources.single_file import read_weights_header

KIND, UNET_KIND = "MotionAdapter", "UNetMotionModel"
ADAPTER = "motion_adapter"  # whose config stands beside those of the networks
ROW = "motion_unet"  # of the table of components
TRAINED = 16  # frames of the clips that every published adapter was trained with; its table of places may be longer
# The noise that every published adapter was trained with, whatever the checkpoint was; diffusers is told it by hand.
TRAINED_WITH = {"beta_schedule": "linear", "trained_betas": None, "clip_sample": False}
BLOCKS = {
    "CrossAttnDownBlock2D": "CrossAttnDownBlockMotion",
    "DownBlock2D": "DownBlockMotion",
    "UpBlock2D": "UpBlockMotion",
    "CrossAttnUpBlock2D": "CrossAttnUpBlockMotion",
}
# What diffusers' UNetMotionModel takes the motion modules' sizes from: its own key, and the adapter's.
SIZES = {
    "motion_num_attention_heads": "motion_num_attention_heads",
    "motion_max_seq_length": "motion_max_seq_length",
    "use_motion_mid_block": "use_motion_mid_block",
    "layers_per_block": "motion_layers_per_block",
    "temporal_transformer_layers_per_mid_block": "motion_transformer_layers_per_mid_block",
    "temporal_transformer_layers_per_block": "motion_transformer_layers_per_block",
}
# Of each layout, what a file's table of places is called: its length is the most frames.
PLACES: Mapping[Layout, str] = {
    "original": r"temporal_transformer\.transformer_blocks\.0\.attention_blocks\.0\.pos_encoder\.pe$",
    "diffusers": r"motion_modules\.\d+\.transformer_blocks\.0\.pos_embed\.pe$",
}
FIRST = re.compile(r"(module\.)?down_blocks\.(\d+)\.motion_modules\.(\d+)\.(temporal_transformer\.)?norm\.weight")
Found = tuple[Mapping[str, Any], WeightSource, list[Path]]


def add_motion(parts: Parts, options: CheckpointOptions) -> Parts:
    """Put a motion adapter's modules between the layers of a checkpoint's UNet, as diffusers' UNetMotionModel has them.

    The option names a directory that diffusers wrote, or a file in the names of AnimateDiff's authors or of diffusers.
    Raises CheckpointError if it is missing or made for another UNet.
    """
    if options.motion_adapter is None:
        return parts
    where = f"--motion-adapter '{options.motion_adapter}'"
    if parts.source == "onnx":
        raise CheckpointError(f"{where} cannot be put into graphs that optimum exported; give the checkpoint itself")
    if options.adapters or options.ip_adapters:
        raise CheckpointError(
            f"{where}: a UNet with motion modules takes no T2I-Adapters and no IP-Adapters; omit these options"
        )
    path = find_place(options.motion_adapter)
    read = _from_folder if path.is_dir() else _from_file
    if not path.exists():
        raise CheckpointError(
            f"{where} {absent(options.motion_adapter)}; give a directory in diffusers' layout, or a file"
        )
    config, adapter, files = read(where, path, allow_pickle=options.allow_pickle)
    unet = parts.configs["unet"]
    _require_fit(where, config, unet)
    base = to_weight_source("unet", parts.networks["unet"])
    changed = motion_config(json.loads(base.config) | dict(unet), config)
    return replace(
        parts,
        configs={**parts.configs, ADAPTER: config},
        scheduler={**parts.scheduler, **TRAINED_WITH},
        networks={**parts.networks, "unet": replace(base, config=json.dumps(changed), beside=adapter)},
        rows={**parts.rows, "unet": ROW},
        files={**parts.files, **{f"motion_adapter/{file.name}": file for file in files}},
    )


def motion_config(unet: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of diffusers' UNetMotionModel, as its `from_unet2d` makes it of a UNet's and an adapter's."""
    kinds = {key: [BLOCKS[kind] for kind in unet[key]] for key in ("down_block_types", "up_block_types") if key in unet}
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    sizes = {key: adapter[source] for key, source in SIZES.items()}
    return {**unet, **kinds, **sizes, "num_attention_heads": heads, "_class_name": UNET_KIND}


def frame_range(configs: Mapping[str, Mapping[str, Any]]) -> FrameRange | None:
    """Return how many frames a checkpoint's UNet sees at once; None for one without a motion adapter."""
    if ADAPTER not in configs:
        return None
    most = int(configs[ADAPTER]["motion_max_seq_length"])
    return FrameRange(window=min(TRAINED, most), most=most)


def _from_folder(where: str, path: Path, *, allow_pickle: bool) -> Found:
    config = read_config("motion_adapter", path)
    if config.get("_class_name", KIND) != KIND:
        raise CheckpointError(f"{where} was recognised as {config['_class_name']}, expected a {KIND}")
    source = to_weight_source("motion_adapter", open_network("motion_adapter", path, allow_pickle=allow_pickle))
    return config, source, [path / "config.json", *network_files(path, allow_pickle=allow_pickle)]


def _from_file(where: str, path: Path, *, allow_pickle: bool) -> Found:
    """Return a file's adapter, whose config its keys and shapes tell but for the number of heads: all have 8."""
    file = read_weights_header(path, allow_pickle=allow_pickle)
    firsts = {(int(found[2]), int(found[3])): key for key in file.tensors if (found := FIRST.fullmatch(key))}
    layout, frames = _places(file)
    if not firsts or layout is None:
        raise CheckpointError(f"{where} holds no motion adapter; `latentrt inspect` says what it holds")
    levels, layers = (1 + max(number[side] for number in firsts) for side in (0, 1))
    told = {
        "block_out_channels": [file.tensors[firsts[level, 0]].shape[0] for level in range(levels)],
        "motion_layers_per_block": layers,
        "motion_max_seq_length": frames,
        "use_motion_mid_block": any("mid_block.motion_modules." in key for key in file.tensors),
    }
    config = complete("motion_adapter", told, where=where)
    files = (str(path.absolute()),)
    return config, WeightSource(part="motion_adapter", config=json.dumps(told), files=files, layout=layout), [path]


def _places(file: TensorFile) -> tuple[Layout | None, int]:
    """Return a file's layout and the length of its table of places."""
    for layout, pattern in PLACES.items():
        for key, stored in file.tensors.items():
            if re.search(pattern, key):
                return layout, int(stored.shape[1])
    return None, 0


def _require_fit(where: str, adapter: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    levels = len(unet["block_out_channels"])
    if adapter["conv_in_channels"] is not None:
        raise CheckpointError(f"{where} is a PIA adapter, which sees an image beside the latents: not supported")
    if unet["addition_embed_type"] is not None:
        raise CheckpointError(f"{where}: motion adapters for SDXL are not supported; give a checkpoint of SD 1.x")
    pairs = {
        "block_out_channels": (list(adapter["block_out_channels"]), list(unet["block_out_channels"])),
        "layers per block": tuple(
            per_level(one, levels) for one in (adapter["motion_layers_per_block"], unet["layers_per_block"])
        ),
    }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise CheckpointError(
                f"{where} was made for another UNet: its {what} are {found} where this checkpoint's are {expected}; "
                "give an adapter for this family"
            )
    if unknown := sorted({*unet["down_block_types"], *unet.get("up_block_types", ())} - BLOCKS.keys()):
        raise CheckpointError(f"{where}: this checkpoint's UNet has {', '.join(unknown)}, which take no motion modules")
