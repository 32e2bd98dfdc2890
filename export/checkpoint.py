"""Open a checkpoint and say what it is: its family, its networks, its sizes, its schedule. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle import hash_file
from latentrt.engines.errors import CheckpointError
from latentrt.engines.manifest import Family, LatentSpec, TrainingSchedule
from latentrt.engines.residuals import PREFIX
from latentrt.export.adapters import add_adapters, feature_dimensions
from latentrt.export.assembly import open_file
from latentrt.export.components import residual_dimensions
from latentrt.export.controlnets import add_controlnets, per_level
from latentrt.export.families import ACTIVATIONS
from latentrt.export.folders import open_folder, refuse_other_vae
from latentrt.export.fusing import add_loras
from latentrt.export.hub import download
from latentrt.export.options import CheckpointOptions
from latentrt.export.parts import TEXT_ENCODERS, Parts, Recipe, Source
from latentrt.export.replacing import replace_unet, replace_vae
from latentrt.export.schedule import training_schedule
from latentrt.export.tiny_vae import add_tiny_vae, check_tiny_vae

DEMO = Path(__file__).parent / "demo" / "checkpoint"
CLIP_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be exported.

    source: `torch` for weights, `onnx` for graphs that optimum exported
    configs: the parsed config.json of each network
    networks: the folder that each network is loaded from, or how to write one
    tokenizers: the folder with each one's vocabulary; special_tokens: what that folder does not decide
    files: what the export reads, by name
    options: choices that changed the result
    dimensions: the sizes that the tables of shapes refer to by name
    refiner: the checkpoint whose UNet becomes the component `refiner`
    """

    name: str
    source: Source
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    networks: Mapping[str, Path | Recipe]
    tokenizers: Mapping[str, Path]
    special_tokens: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Path]
    options: Mapping[str, str]
    schedule: TrainingSchedule
    latents: LatentSpec
    default_size: tuple[int, int]
    dimensions: Mapping[str, int]
    refiner: Checkpoint | None = None

    @property
    def zero_negative(self) -> bool:
        """Tell whether zeros stand for a negative prompt that is not given: SDXL's pipelines do so unless told."""
        return bool(self.dimensions["pooled_width"] and self.index.get("force_zeros_for_empty_prompt", True))

    def hashes(self) -> dict[str, str]:
        """Hash every file that the export reads."""
        return {name: hash_file(path) for name, path in self.files.items()}


def open_checkpoint(name: str, *, options: CheckpointOptions | None = None) -> Checkpoint:
    """Find a checkpoint and read all of it but the weights.

    name: a directory in diffusers' or optimum's layout, a single safetensors file, a hub id, or `demo`
    Raises CheckpointError.
    """
    options = options or CheckpointOptions()
    path = locate(name, revision=options.revision)
    parts = open_file(path, options) if path.is_file() else open_folder(path, allow_pickle=options.allow_pickle)
    return _read(name, _adjust(parts, options))


def _adjust(parts: Parts, options: CheckpointOptions) -> Parts:
    """Put in place what was given beside the checkpoint."""
    if options.vae:
        parts = replace_vae(parts, options.vae, allow_pickle=options.allow_pickle)
    if options.unet:
        parts = replace_unet(parts, options.unet, allow_pickle=options.allow_pickle, prediction=options.prediction_type)
    if options.loras:
        parts = add_loras(parts, options.loras)
    if options.controlnets:
        parts = add_controlnets(parts, options.controlnets, allow_pickle=options.allow_pickle)
    if options.tiny_vae:
        parts = add_tiny_vae(parts, options.tiny_vae)
    if options.adapters:
        parts = add_adapters(parts, options.adapters, allow_pickle=options.allow_pickle)
    if options.prediction_type:
        parts = replace(
            parts,
            scheduler={**parts.scheduler, "prediction_type": options.prediction_type},
            options={**parts.options, "prediction_type": options.prediction_type},
        )
    return parts


def _read(name: str, parts: Parts) -> Checkpoint:
    """Say what a checkpoint is from its documents."""
    latents = _latents(parts)
    check_tiny_vae(parts.configs, latents)
    sample = _need(parts.configs["unet"], "sample_size", int, f"{parts.root}: the UNet's config", default=64)
    return Checkpoint(
        name=name,
        source=parts.source,
        family=_family(parts.root, parts.configs),
        index=parts.index,
        configs=parts.configs,
        scheduler=parts.scheduler,
        networks=parts.networks,
        tokenizers=parts.tokenizers,
        special_tokens=parts.special_tokens,
        files=parts.files,
        options=parts.options,
        schedule=training_schedule(parts.scheduler, where=f"{parts.root}: the scheduler's config"),
        latents=latents,
        default_size=(sample * latents.factor, sample * latents.factor),
        dimensions=_dimensions(parts.configs, latents) | _residuals(parts.configs) | feature_dimensions(parts.configs),
    )


def locate(name: str, *, revision: str | None = None) -> Path:
    """Return a checkpoint's directory or file, downloading a hub id's files. Raises CheckpointError."""
    if name == "demo":
        if not (DEMO / "model_index.json").is_file():
            raise CheckpointError(f"the demo checkpoint is missing at {DEMO}; install latentrt again")
        return DEMO
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"'{path}' is not a checkpoint: it holds no model_index.json; "
                "give a directory in diffusers' or optimum's layout"
            )
        return path
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return download(name, revision=revision)
    raise CheckpointError(
        f"there is no checkpoint at '{name}'; "
        "give a directory, a safetensors file, a hub id such as user/model, or 'demo'"
    )


def _family(root: Path, configs: Mapping[str, Mapping[str, Any]]) -> Family:
    unet = configs["unet"]
    texts = {name: configs[name] for name in TEXT_ENCODERS if name in configs}
    for name, text in texts.items():
        kinds, activation = text.get("architectures", CLIP_MODELS), text.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS or not set(kinds) & set(CLIP_MODELS):
            raise CheckpointError(
                f"{root}/{name}/config.json: found {kinds} with hidden_act '{activation}', expected "
                f"{' or '.join(CLIP_MODELS)} with one of {', '.join(ACTIVATIONS)}; this family is not supported"
            )
    width = sum(text.get("hidden_size", 512) for text in texts.values())
    if unet.get("cross_attention_dim") not in (width, [width]):
        raise CheckpointError(
            f"{root}: the text {'encoder is' if len(texts) == 1 else 'encoders are'} {width} wide but the UNet's "
            f"cross_attention_dim is {unet.get('cross_attention_dim')}; they are not of one checkpoint"
        )
    if unet.get("addition_embed_type") == "text_time":
        if "text_encoder_2" not in texts:
            raise CheckpointError(
                f"'{root}' was recognised as Stable Diffusion XL by its UNet and holds no text_encoder_2; "
                "download the whole checkpoint"
            )
        return "sdxl" if "text_encoder" in texts else "sdxl_refiner"
    return ACTIVATIONS[texts["text_encoder"].get("hidden_act", "quick_gelu")]


def _latents(parts: Parts) -> LatentSpec:
    where = f"{parts.root}: the VAE's config"
    vae, unet = parts.configs["vae_decoder"], parts.configs["unet"]
    refuse_other_vae(parts.root / "vae", vae)
    channels = _need(vae, "latent_channels", int, where, default=4)
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if gives != channels or takes not in (channels, 2 * channels + 1):
        raise CheckpointError(
            f"{parts.root}: the UNet takes {takes} channels and gives {gives} where the VAE has {channels} latent "
            f"channels; expected {channels}, or {2 * channels + 1} for inpainting; "
            "other conditioned UNets are not supported"
        )
    levels = _need(vae, "block_out_channels", list, where)
    scaling = float(_need(vae, "scaling_factor", (int, float), where, default=0.18215))
    return LatentSpec(channels=channels, factor=2 ** (len(levels) - 1), scaling_factor=scaling)


def _dimensions(configs: Mapping[str, Mapping[str, Any]], latents: LatentSpec) -> dict[str, int]:
    """Name the sizes that the tables of shapes refer to; 0 for what a checkpoint has not."""
    vae, unet = configs["vae_decoder"], configs["unet"]
    first, second = configs.get("text_encoder", {}), configs.get("text_encoder_2", {})
    text = first or second
    pooled = second.get("projection_dim", 512) if unet.get("addition_embed_type") else 0
    return {
        "latent_channels": latents.channels,
        "latent_parameters": 2 * latents.channels,
        "unet_channels": unet.get("in_channels", 4),
        "picture_channels": vae.get("out_channels", 3),
        "text_width": first.get("hidden_size", 512),
        "text_width_2": second.get("hidden_size", 512),
        "skipped_layers": first.get("num_hidden_layers", 12) - 1,
        "skipped_layers_2": second.get("num_hidden_layers", 12) - 1,
        "attention_width": sum(part.get("hidden_size", 512) for part in (first, second) if part),
        "pooled_width": pooled,
        "size_numbers": _size_numbers(unet, pooled) if pooled else 0,
        "guidance_width": unet.get("time_cond_proj_dim") or 0,
        "context": text.get("max_position_embeddings", 77),
        "vocabulary": min(part.get("vocab_size", 49408) for part in (first, second) if part),
        "factor": latents.factor,
        "unet_factor": 2 ** (len(unet["block_out_channels"]) - 1),
    }


def _residuals(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Name the sizes of what ControlNets add to the UNet; there is nothing to add where there is none."""
    if not any(name.startswith(PREFIX) for name in configs):
        return {"down_residuals": 0}
    channels = configs["unet"]["block_out_channels"]
    return residual_dimensions(channels, per_level(configs["unet"].get("layers_per_block", 2), len(channels)))


def _size_numbers(unet: Mapping[str, Any], pooled: int) -> int:
    """Return how many numbers of sizes a UNet takes beside the pooled text: 6 for SDXL, 5 for its refiner."""
    where = "the UNet's config"
    rest = _need(unet, "projection_class_embeddings_input_dim", int, where) - pooled
    return int(rest // _need(unet, "addition_time_embed_dim", int, where))


def _need(config: Mapping[str, Any], key: str, kind: Any, where: str, *, default: Any = None) -> Any:
    value = config.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{where} $.{key}: found {value!r}; this checkpoint is not supported")
    return value
