"""Open a checkpoint and say what it is: its family, its networks, its sizes, its schedule. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.files import hash_file
from latentrt.engines.bundle.manifest import Family, FrameRange, LatentSpec
from latentrt.engines.bundle.training import Prediction, TrainingSchedule
from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.controlnets import add_controlnets
from latentrt.export.additions.ip_adapters import add_ip_adapters, image_dimensions
from latentrt.export.additions.loras import add_loras
from latentrt.export.additions.motion import add_motion, frame_range
from latentrt.export.additions.replace import replace_unet, replace_vae
from latentrt.export.additions.skip_layers import add_skip_layers
from latentrt.export.additions.t2i_adapters import add_adapters, feature_dimensions
from latentrt.export.additions.text_encoders import find_text_encoders, put_text_encoders, with_their_tokenizers
from latentrt.export.additions.tiny_vae import add_tiny_vae, check_tiny_vae
from latentrt.export.configs.defaults import complete, per_level, require_levels
from latentrt.export.configs.denoisers import Kind, kind_of
from latentrt.export.configs.families import FAMILIES, OPTIONAL_TEXT
from latentrt.export.configs.published import DEFAULT_SAMPLE_SIZE, sample_size
from latentrt.export.configs.residuals import NONE
from latentrt.export.configs.schedule import training_schedule
from latentrt.export.graphs.normalised_latents import Affine, read_normalising
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.diffusers_folder import open_folder, refuse_other_vae
from latentrt.export.sources.hub import download
from latentrt.export.sources.parts import (
    CLIPS,
    FURTHER,
    ControlNetwork,
    ImageAdapter,
    Parts,
    Source,
    WeightSource,
)
from latentrt.export.sources.places import HUB_ID, find_place
from latentrt.export.sources.single_file import open_file

DEMO = Path(__file__).parent / "demo" / "checkpoint"
CLIP_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
ENLARGED_BEFORE = (0, 9, 0)  # diffusers' version, see `FamilyRow.enlarges`
OPTIONS = {
    "unet": "--unet",
    "vae": "--vae",
    "loras": "--lora",
    "controlnets": "--controlnet",
    "adapters": "--adapter",
    "ip_adapters": "--ip-adapter",
    "motion_adapter": "--motion-adapter",
    "refiner": "--refiner",
}  # fields of the options that are not for every denoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be exported.

    source: `torch` for weights, `onnx` for graphs that optimum exported
    configs: the parsed config.json of each network
    networks: the folder that each network is loaded from, or how to write one
    tokenizers: the folder with each one's vocabulary; special_tokens: what that folder does not decide
    files: what the export reads, by name
    options: choices that changed the result
    controls: its ControlNets and adapters, by component
    rows: as in `Parts`
    frames: how many its denoiser sees at once, None where it draws pictures
    image_adapters: its IP-Adapters
    dimensions: the sizes that the tables of shapes refer to by name
    normalising: what normalised latents add to the VAE's halves, by component
    refiner: the checkpoint whose UNet becomes the component `refiner`
    texts: tokens of real prompts, by the text encoder that is shown them
    """

    name: str
    source: Source
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    networks: Mapping[str, Path | WeightSource]
    tokenizers: Mapping[str, Path]
    special_tokens: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Path]
    options: Mapping[str, str]
    controls: Mapping[str, ControlNetwork]
    rows: Mapping[str, str]
    frames: FrameRange | None
    skip_layers: tuple[int, ...]
    schedule: TrainingSchedule
    latents: LatentSpec
    default_size: tuple[int, int]
    dimensions: Mapping[str, int]
    normalising: Mapping[str, Affine]
    image_adapters: tuple[ImageAdapter, ...] = ()
    refiner: Checkpoint | None = None
    texts: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def zero_negative(self) -> bool:
        """Tell whether zeros replace a negative prompt that is not given, as in SDXL by default."""
        return FAMILIES[self.family].sized and bool(self.index.get("force_zeros_for_empty_prompt", True))

    @property
    def denoiser(self) -> str:
        """Return the component that draws."""
        return FAMILIES[self.family].denoiser

    def hashes(self) -> dict[str, str]:
        """Hash every file that the export reads."""
        return {name: hash_file(path) for name, path in self.files.items()}


def open_checkpoint(name: str, *, options: CheckpointOptions | None = None) -> Checkpoint:
    """Find a checkpoint and read all of it but the weights.

    name: a directory in diffusers' or optimum's layout, a single safetensors file, a hub id, or `demo`
    Raises CheckpointError.
    """
    options = options or CheckpointOptions()
    without = () if options.t5 else OPTIONAL_TEXT
    path = locate(name, revision=options.revision, without=without)
    if path.is_file():
        parts = _open_single(path, options)
    elif options.text_encoders:
        raise CheckpointError(f"--text-encoder is for single files, and '{name}' is a directory; omit it")
    else:
        parts = open_folder(path, allow_pickle=options.allow_pickle, without=without)
    if not options.t5:
        parts = replace(parts, options={**parts.options, "t5": "left out"})
    return _read(name, _adjust(parts, options))


def _open_single(path: Path, options: CheckpointOptions) -> Parts:
    """Take apart a checkpoint in one file, with the text encoders that are given beside it."""
    found = find_text_encoders(options)
    return put_text_encoders(open_file(path, with_their_tokenizers(options, found), beside=found.keys()), found)


def _adjust(parts: Parts, options: CheckpointOptions) -> Parts:
    """Apply the options to a checkpoint: replaced networks, LoRAs, ControlNets and adapters."""
    _require_fitting(parts, options)
    if options.vae:
        parts = replace_vae(parts, options.vae, allow_pickle=options.allow_pickle)
    if options.unet:
        parts = replace_unet(parts, options.unet, allow_pickle=options.allow_pickle, prediction=options.prediction_type)
    parts = add_skip_layers(add_motion(parts, options), options.skip_layers)
    if options.loras:
        parts = add_loras(parts, options.loras)
    if options.controlnets:
        parts = add_controlnets(parts, options.controlnets, allow_pickle=options.allow_pickle)
    if options.tiny_vae:
        parts = add_tiny_vae(parts, options.tiny_vae)
    if options.adapters:
        parts = add_adapters(parts, options.adapters, allow_pickle=options.allow_pickle)
    if options.ip_adapters:
        parts = add_ip_adapters(parts, options)
    if options.prediction_type:
        parts = replace(
            parts,
            scheduler={**parts.scheduler, "prediction_type": options.prediction_type},
            options={**parts.options, "prediction_type": options.prediction_type},
        )
    return parts


def _require_fitting(parts: Parts, options: CheckpointOptions) -> None:
    """Refuse what changes or controls another kind of denoiser."""
    kind = _kind(parts)
    found = next((option for name, option in OPTIONS.items() if name in kind.refuses and getattr(options, name)), None)
    if found:
        raise CheckpointError(f"{found}: it is not for a {kind.label}, which {parts.root} holds; omit it")


def _kind(parts: Parts) -> Kind:
    return kind_of(parts.denoiser, parts.configs[parts.denoiser])


def _read(name: str, parts: Parts) -> Checkpoint:
    """Say what a checkpoint is from its documents."""
    denoiser, family = parts.configs[parts.denoiser], _family(parts)
    latents = _latents(parts, family)
    check_tiny_vae(parts.configs, latents)
    schedule = training_schedule(
        parts.scheduler,
        where=f"{parts.root}: the scheduler's config",
        family=family,
        repaints=denoiser["in_channels"] == 2 * latents.channels + 1,
    )
    return Checkpoint(
        name=name,
        source=parts.source,
        family=family,
        index=parts.index,
        configs=parts.configs,
        scheduler=parts.scheduler,
        networks=parts.networks,
        tokenizers=parts.tokenizers,
        special_tokens=parts.special_tokens,
        files=parts.files,
        options=parts.options,
        controls=parts.controls,
        rows={**FAMILIES[family].rows, **parts.rows},
        frames=frame_range(parts.configs) or _kind(parts).frames(denoiser),
        image_adapters=parts.image_adapters,
        skip_layers=parts.skip_layers,
        schedule=schedule,
        latents=latents,
        default_size=_default_size(denoiser, family, schedule.prediction_type, factor=latents.factor),
        dimensions=_dimensions(parts, latents)
        | _residuals(parts)
        | feature_dimensions(parts)
        | image_dimensions(parts),
        normalising=read_normalising(
            parts.configs["vae_decoder"],
            family=family,
            channels=latents.channels,
            where=f"{parts.root}: the VAE's config",
        ),
    )


def locate(name: str, *, revision: str | None = None, without: Collection[str] = ()) -> Path:
    """Return a checkpoint's directory or file, downloading a hub id's files. Raises CheckpointError.

    without: text encoders that are not fetched
    """
    if name == "demo":
        if revision is not None:
            raise CheckpointError(f"the demo checkpoint has no revision '{revision}'; omit --revision")
        if not (DEMO / "model_index.json").is_file():
            raise CheckpointError(f"the demo checkpoint is missing at {DEMO}; install latentrt again")
        return DEMO
    path = find_place(name, revision=revision)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"'{path}' is not a checkpoint: it holds no model_index.json; "
                f"give a directory in diffusers' or optimum's layout; `latentrt inspect {path}` says what it is"
            )
        return path
    if HUB_ID.fullmatch(name):
        return download(name, revision=revision, without=without)
    raise CheckpointError(
        f"there is no checkpoint at '{name}'; "
        "give a directory, a safetensors file, a hub id such as user/model, or 'demo'"
    )


def _family(parts: Parts) -> Family:
    root, denoiser, texts = parts.root, parts.configs[parts.denoiser], _clips(parts)
    activations = [row.activation for row in FAMILIES.values() if row.activation]
    for name, text in texts.items():
        kinds, activation = text.get("architectures") or CLIP_MODELS, text["hidden_act"]
        known = isinstance(kinds, list | tuple) and any(kind in CLIP_MODELS for kind in kinds)
        if activation not in activations or not known:
            raise CheckpointError(
                f"{root}/{name}/config.json: found {kinds} with hidden_act '{activation}', expected "
                f"{' or '.join(CLIP_MODELS)} with one of {', '.join(activations)}; this family is not supported"
            )
    kind = _kind(parts)
    further = FURTHER.get(str(denoiser.get("_class_name")), ())
    last = next((parts.configs[name] for name in ("text_encoder_3", *further) if name in parts.configs), None)
    for sentence in kind.objections(denoiser, texts, last):
        raise CheckpointError(f"{root}: {sentence}; they are not from the same checkpoint")
    added = denoiser.get("addition_embed_type")
    matching = [
        family
        for family, row in FAMILIES.items()
        if row.denoiser == parts.denoiser
        and row.sized == (added == "text_time")
        and tuple(filter(None, [row.shown])) == further
    ]
    fitting = [family for family in matching if FAMILIES[family].networks == tuple(texts)]
    if not fitting:
        expected = " or ".join(" and ".join(names) for names in dict.fromkeys(FAMILIES[f].networks for f in matching))
        raise CheckpointError(
            f"{root}: found {' and '.join(texts) or 'no text encoder'} beside a {kind.label} whose "
            f"addition_embed_type is {added}, expected {expected}; download the whole checkpoint"
        )
    first = next((text["hidden_act"] for text in texts.values()), None)
    return next(family for family in fitting if FAMILIES[family].activation in (None, first))


def _clips(parts: Parts) -> dict[str, Mapping[str, Any]]:
    """Return the configs of the CLIP text encoders that a checkpoint has."""
    return {name: parts.configs[name] for name in CLIPS if name in parts.configs}


def _latents(parts: Parts, family: Family) -> LatentSpec:
    vae, denoiser, kind = parts.configs["vae_decoder"], parts.configs[parts.denoiser], _kind(parts)
    refuse_other_vae(parts.root / "vae", vae, kind.vae)
    require_levels(vae, where=f"{parts.root}: the VAE's config")
    if "block_out_channels" in denoiser:
        require_levels(denoiser, where=f"{parts.root}: the {kind.label}'s config")
    channels, takes = vae["latent_channels"], denoiser["in_channels"]
    gives = denoiser["out_channels"] or takes
    if gives != channels or takes not in kind.takes(channels):
        drawing, *further = kind.takes(channels)
        expected = f"{drawing}, or {further[0]} for inpainting" if further else str(drawing)
        raise CheckpointError(
            f"{parts.root}: the {kind.label} takes {takes} channels and gives {gives} where the VAE has {channels} "
            f"latent channels; expected {expected}; other conditioned {kind.label}s are not supported"
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return LatentSpec(
        channels=channels,
        factor=factor,
        scaling_factor=float(vae["scaling_factor"]),
        shift=float(vae["shift_factor"] or 0) if FAMILIES[family].shifts else 0.0,
        multiple=kind.patch(denoiser),
        largest=kind.largest(denoiser),
    )


def _default_size(
    denoiser: Mapping[str, Any], family: Family, prediction: Prediction, *, factor: int
) -> tuple[int, int]:
    """Return the width and the height that diffusers' pipelines draw if they get none."""
    given = denoiser["sample_size"]
    if given is None:  # they draw nothing then
        given = sample_size(family, prediction)
    version = tuple(int(part) for part in re.findall(r"\d+", str(denoiser.get("_diffusers_version", "")))[:3])
    if isinstance(given, int) and FAMILIES[family].enlarges and () < version < ENLARGED_BEFORE:
        given = max(given, DEFAULT_SAMPLE_SIZE)
    height, width = per_level(given, 2)
    if FAMILIES[family].wide and height == width:
        height, width = height * 3 // 4, width * 4 // 3
    return width * factor, height * factor


def _dimensions(parts: Parts, latents: LatentSpec) -> dict[str, int]:
    """Name the sizes that the tables of shapes refer to; 0 for what a checkpoint does not have."""
    configs, denoiser, held = parts.configs, parts.configs[parts.denoiser], _clips(parts)
    first = configs.get("text_encoder") or complete("text_encoder", {}, where="")
    second = configs.get("text_encoder_2") or complete("text_encoder_2", {}, where="")
    return {
        "latent_channels": latents.channels,
        "latent_parameters": 2 * latents.channels,
        "unet_channels": denoiser["in_channels"],
        "picture_channels": configs["vae_decoder"]["out_channels"],
        "text_width": first["hidden_size"],
        "text_width_2": second["hidden_size"],
        "text_width_3": configs["text_encoder_3"]["d_model"] if "text_encoder_3" in configs else 0,
        "skipped_layers": first["num_hidden_layers"] - 1,
        "skipped_layers_2": second["num_hidden_layers"] - 1,
        "projection_width": first["projection_dim"] or 0,
        "projection_width_2": second["projection_dim"],
        "context": next(iter(held.values()), first)["max_position_embeddings"],
        "vocabulary": min(text["vocab_size"] for text in (*held.values(), *([] if held else [first]))),
        "factor": latents.factor,
        "skip_layers": len(parts.skip_layers),
        **_kind(parts).dimensions(denoiser, held),
    }


def _residuals(parts: Parts) -> dict[str, int]:
    """Name the sizes of what ControlNets add to the denoiser; there is nothing to add if there is none."""
    controlnets = [parts.configs[name] for name in parts.controls_of("controlnet")]
    return _kind(parts).residuals(parts.configs[parts.denoiser], controlnets) if controlnets else dict(NONE)
