"""Write the folder that a network is loaded from: the tensors of a recipe's files under diffusers' names.

The names of the original layout are turned into diffusers' by diffusers' own conversion.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentrt.engines.bundle.safetensors_header import weights_format
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.transformer_names import ALL, Share, split_joint
from latentrt.engines.spec import Array
from latentrt.export.additions.loras import WeightDeltas, find_weight_deltas, fuse
from latentrt.export.configs.families import DENOISER_PREFIX
from latentrt.export.networks.streamed_weights import windows
from latentrt.export.sources.parts import Part, WeightSource
from latentrt.export.sources.pickles import load_pickle

Tensors = dict[str, Tensor]
# Types that no network is loaded in, and the one that holds their numbers exactly.
EIGHT_BITS = {torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.float16}
SHARD_BYTES = 1 << 28  # what is held in memory at once, and once more while it is written
STEMS: Mapping[Part, str] = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "text_encoder_3": "model",
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
    "transformer_controlnet": "diffusion_pytorch_model",
    "adapter": "diffusion_pytorch_model",
    "image_encoder": "model",
    "image_projection": "model",
}
PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
        "",  # a text encoder's own file has no prefix
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.transformer.",
        "",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.", ""),
    "unet": (DENOISER_PREFIX, ""),  # a UNet's own file has no prefix
    "transformer": (DENOISER_PREFIX, ""),
    "vae": ("first_stage_model.", ""),  # a VAE's own file has no prefix
    "controlnet": ("control_model.", ""),
    "motion_adapter": ("module.", ""),
    "image_projection": ("image_proj.",),
    "image_attention": ("ip_adapter.",),
}
ORIGINAL = ("joint_blocks.", "final_layer.", "x_embedder.", "t_embedder.", "y_embedder.")  # of SD 3's first authors
# Left by training, derived, or a mark; no network reads them.
UNUSED = re.compile(r"(^|\.)(loss\.|position_ids$|logit_scale$|model_ema\.|difference$)")


@contextmanager
def written(weight_source: WeightSource, folder: Path) -> Iterator[Path]:
    """Give a folder with a config and weights to load from; it is gone after the block. Raises CheckpointError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        (folder / "config.json").write_text(weight_source.config, encoding="utf-8")
        tensors = read_tensors(weight_source)
        _save(folder, STEMS[weight_source.part], tensors, _all_changes(weight_source, tensors))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _all_changes(weight_source: WeightSource, tensors: Tensors) -> WeightDeltas:
    """Find what is added to each tensor: LoRAs, and the weights of the network that it is a difference to."""
    own = find_weight_deltas(weight_source, tensors)
    if weight_source.base is None:
        return own
    weights = read_tensors(weight_source.base)
    further, stored = find_weight_deltas(weight_source.base, weights), windows(weights)
    for key in sorted(tensors.keys() & weights.keys()):
        if tensors[key].shape != weights[key].shape:
            raise CheckpointError(
                f"{weight_source.files[0]} holds differences to a network of other sizes: its {key} is "
                f"{list(tensors[key].shape)} where this checkpoint's is {list(weights[key].shape)}"
            )

    def whole(key: str, _: Array) -> Array:
        """Return the other network's weight with its own changes, whatever it is added to."""
        weight = stored[key].read() if key in stored else weights[key]
        return fuse(weight, further.get(key, ())).float().numpy()

    added = {key: [partial(whole, key)] for key in tensors if key in weights}
    return {key: [*own.get(key, ()), *added.get(key, ())] for key in own.keys() | added.keys()}


def read_tensors(weight_source: WeightSource) -> Tensors:
    """Return a network's tensors under diffusers' names, mapped from the files. Raises CheckpointError."""
    beside = read_tensors(weight_source.beside) if weight_source.beside else {}
    own = _own_tensors(weight_source)
    return {**{key: own[key] for key in own if key.startswith(weight_source.starts)}, **beside}


def _own_tensors(weight_source: WeightSource) -> Tensors:
    tensors = {key: tensor for file in weight_source.files for key, tensor in _mapped(Path(file)).items()}
    if weight_source.layout == "diffusers":
        return tensors
    prefix = next(prefix for prefix in PREFIXES[weight_source.part] if any(key.startswith(prefix) for key in tensors))
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix) and not UNUSED.search(key)}
    converted = _CONVERT[weight_source.part](mine, prefix, json.loads(weight_source.config))
    return {key: tensor.contiguous() for key, tensor in converted.items()}


def _mapped(file: Path) -> Tensors:
    if weights_format(file) == "pickle":  # allowed, or the recipe would not name it
        return load_pickle(file)
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def _text_encoder(tensors: Tensors, prefix: str, config: Mapping[str, Any], *, projected: bool) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    if prefix.startswith("text_encoders.") or not prefix:  # under the names of transformers
        found = _renamed(tensors, prefix, config)
        if not projected and config["projection_dim"] == config["hidden_size"]:
            # SD 3 reads the pooled text of CLIP L as it is, and files leave the projection out or hold CLIP's own
            found["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=_written_type(found))
    elif prefix.endswith(".model."):
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        found = convert_open_clip_checkpoint(model, tensors, prefix=prefix)
        if not projected:
            found.pop("text_projection.weight", None)
    else:
        found = convert_ldm_clip_checkpoint(tensors)
    start = "text_model."  # some merges of models have lost it
    named = {
        key if key == "text_projection.weight" else start + key.removeprefix(start): tensor
        for key, tensor in found.items()
    }
    return {key: tensor for key, tensor in named.items() if _layer(key) < config["num_hidden_layers"]}


def _renamed(tensors: Tensors, prefix: str, _: Mapping[str, Any]) -> Tensors:
    """Return tensors that have transformers' names behind a prefix."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _written_type(tensors: Tensors) -> torch.dtype:
    dtype = next(iter(tensors.values())).dtype
    return EIGHT_BITS.get(dtype, dtype)


def _transformer(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> Tensors:
    """Name SD 3's tensors as diffusers does. What is a part of a matrix is that part of the file: none is read here."""
    found: Tensors = {}
    for key, tensor in tensors.items():
        module, _, parameter = key.removeprefix(prefix).rpartition(".")
        names = split_joint(module, blocks=config["num_layers"]) if module else {parameter: ALL}  # the positions' table
        found |= {f"{name}.{parameter}": _rows(tensor, share) for name, share in names.items()}
    if strangers := sorted(name for name in found if name.startswith(ORIGINAL)):
        raise CheckpointError(
            f"the transformer holds {len(strangers)} tensors that its architecture does not have "
            f"({', '.join(strangers[:3])}, …); pass --config DIRECTORY with its own configs"
        )
    return found


def _rows(tensor: Tensor, share: Share) -> Tensor:
    parts = tensor.chunk(share.parts)
    if len(share.taken) == 1:
        return parts[share.taken[0]]
    return torch.cat([parts[part].to(EIGHT_BITS.get(tensor.dtype, tensor.dtype)) for part in share.taken])


def _layer(key: str) -> int:
    """Return the number of a layer: published files hold one more than is used."""
    found = re.search(r"\.layers\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _unet(tensors: Tensors, prefix: str, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    named = {f"{DENOISER_PREFIX}{key.removeprefix(prefix)}": tensor for key, tensor in tensors.items()}
    converted = convert_ldm_unet_checkpoint(named, dict(config))
    scaled = named.get(f"{DENOISER_PREFIX}time_embed.cond_proj.weight")
    if scaled is not None:
        converted["time_embedding.cond_proj.weight"] = scaled  # of latent consistency models: diffusers leaves it out
    return _whole(tensors, converted, "UNet")


def _vae(tensors: Tensors, _: str, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return _whole(tensors, convert_ldm_vae_checkpoint(tensors, dict(config)), "VAE")


def _controlnet(tensors: Tensors, _: str, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    converted = convert_controlnet_checkpoint(tensors, dict(config))
    return _whole(tensors, {key: t for key, t in converted.items() if t is not None}, "ControlNet")


PLACES = re.compile(r"\.attention_blocks\.\d+\.pos_encoder\.pe$")


def _motion(tensors: Tensors, prefix: str, _: Mapping[str, Any]) -> Tensors:
    """Name a motion adapter's tensors as diffusers does, which reads one table of places for both attentions."""
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    places = {PLACES.sub(".pos_embed.pe", key): tensor for key, tensor in own.items() if PLACES.search(key)}
    placed = {key.replace(".temporal_transformer", ""): tensor for key, tensor in places.items()}
    return {**convert_animatediff_checkpoint_to_diffusers(own), **placed}


def _part_of_adapter(tensors: Tensors, prefix: str, _: Mapping[str, Any]) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


_CONVERT: Mapping[Part, Callable[[Tensors, str, Mapping[str, Any]], Tensors]] = {
    "text_encoder": partial(_text_encoder, projected=False),
    "text_encoder_2": partial(_text_encoder, projected=True),
    "text_encoder_3": _renamed,
    "unet": _unet,
    "transformer": _transformer,
    "vae": _vae,
    "controlnet": _controlnet,
    "motion_adapter": _motion,
    "image_projection": _part_of_adapter,
    "image_attention": _part_of_adapter,
}


def _whole(tensors: Tensors, converted: Tensors, network: str) -> Tensors:
    """Refuse a conversion that left something out, which diffusers' does without a word."""
    lost = len(tensors) - len(converted)
    if lost:
        kept = {tensor.data_ptr() for tensor in converted.values()}
        names = sorted(key for key, tensor in tensors.items() if tensor.data_ptr() not in kept)
        raise CheckpointError(
            f"the {network} holds {lost} tensors that its architecture does not have ({', '.join(names[:3])}, …); "
            "pass --config DIRECTORY with its own configs"
        )
    return converted


def _save(folder: Path, stem: str, tensors: Tensors, changes: WeightDeltas) -> None:
    """Write tensors as shards, of which one is in memory at a time: the mapped files are not touched.

    All are written in one type, or the libraries, which load into one, would hold copies: in float32 where LoRAs
    change some of them, or where they are of several types.
    """
    stored = windows(tensors)
    types = {key: EIGHT_BITS.get(tensor.dtype, tensor.dtype) for key, tensor in tensors.items()}
    kinds = {types[key] for key, tensor in tensors.items() if tensor.is_floating_point()}
    widened = bool(changes) or len(kinds) > 1
    wide = {key for key, tensor in tensors.items() if widened and tensor.is_floating_point()}
    sizes = {key: tensor.numel() * (4 if key in wide else types[key].itemsize) for key, tensor in tensors.items()}
    shards = _shards(sizes)
    places: dict[str, str] = {}
    for number, keys in enumerate(shards):
        name = f"{stem}-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        shard = {}
        for key in keys:
            tensor = fuse(stored[key].read() if key in stored else tensors[key], changes.get(key, ()))
            shard[key] = tensor.float() if key in wide else tensor.to(types[key])
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / name}: weights in between could not be written ({error}); free some disk, or give a "
                "path on a larger one, and run the command again"
            ) from error
        places |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return which tensors go into which file, in their order, each file no larger than it may be."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(key)
        room -= size
    return shards
