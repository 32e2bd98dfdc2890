"""The kinds of denoisers, by their folder in a checkpoint: what their configs say, and which text they go with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentrt.engines.bundle.manifest import SIZES, FrameRange
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.residuals import NONE, transformer_residuals, unet_residuals

Config = Mapping[str, Any]
Texts = Mapping[str, Config]
"""The configs of a checkpoint's CLIP text encoders, in the order in which they join."""

OF_UNETS = ("unet", "adapters", "motion_adapter")  # fields of the options that are for UNets
MOST_FRAMES = 64  # of a video that is seen as a whole
VIDEO_GUIDANCE = (1.0, 3.0)  # of the first frame and of the last: diffusers' own
MEDIUM = (7, 8, 9)  # blocks of Stable Diffusion 3.5 medium, see `_skipped`


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of denoiser.

    label: in sentences
    objections: what keeps it from reading what these text encoders give, T5 the last, a sentence each; an image encoder
        stands in T5's place where an image is read
    dimensions: the sizes that the tables of shapes refer to by name
    residuals: of these, the sizes of what ControlNets of some configs add, of which there is at least one
    patch: what a side of latents is a multiple of; largest: the longest side, None for any
    takes: the channels that it may take, by those of the latents
    frames: of a video, how many it sees at once; None where it draws pictures
    vae: the class of the VAE that it goes with
    refuses: the fields of the options that are not for it
    blocks: how many it has that a model row may skip; skipped: those that its publisher recommends to skip
    """

    label: str
    objections: Callable[[Config, Texts, Config | None], list[str]]
    dimensions: Callable[[Config, Texts], dict[str, int]]
    residuals: Callable[[Config, Sequence[Config]], dict[str, int]] = lambda _, __: dict(NONE)
    patch: Callable[[Config], int] = lambda _: 1
    largest: Callable[[Config], int | None] = lambda _: None
    takes: Callable[[int], tuple[int, ...]] = lambda channels: (channels, 2 * channels + 1)
    frames: Callable[[Config], FrameRange | None] = lambda _: None
    vae: str = "AutoencoderKL"
    refuses: tuple[str, ...] = ()
    blocks: Callable[[Config], int] = lambda _: 0
    skipped: Callable[[Config], tuple[int, ...]] = lambda _: ()


def _unet_objections(unet: Config, texts: Texts, _: Config | None) -> list[str]:
    width, attends = _width(texts), unet["cross_attention_dim"]
    if set(attends if isinstance(attends, list | tuple) else [attends]) == {width}:
        return []
    return [
        f"the text {'encoder is' if len(texts) == 1 else 'encoders are'} {width} wide but the UNet's "
        f"cross_attention_dim is {attends}"
    ]


def _unet_dimensions(unet: Config, texts: Texts) -> dict[str, int]:
    last = list(texts.values())[-1]
    pooled = last["projection_dim"] if unet["addition_embed_type"] else 0
    return {
        "attention_width": _width(texts),
        "pooled_width": pooled,
        "size_numbers": _size_numbers(unet, pooled) if pooled else 0,
        "guidance_width": unet["time_cond_proj_dim"] or 0,
        "unet_factor": 2 ** (len(unet["block_out_channels"]) - 1),
    }


def _size_numbers(unet: Config, pooled: int) -> int:
    """Return how many numbers of sizes a UNet takes beside the pooled text. Raises CheckpointError."""
    numbers_in, width = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
    if numbers_in is None or width is None or numbers_in <= pooled or (numbers_in - pooled) % width:
        raise CheckpointError(
            f"the UNet's config $.projection_class_embeddings_input_dim: found {numbers_in}, expected "
            f"the text's {pooled} and a multiple of addition_time_embed_dim, which is {width}; restore the config"
        )
    numbers = int((numbers_in - pooled) // width)
    if numbers not in SIZES:
        raise CheckpointError(
            f"the UNet takes {numbers} numbers of sizes beside the text, expected 6 (SDXL) or 5 (its refiner); "
            "this kind of UNet is not supported"
        )
    return numbers


def _transformer_objections(transformer: Config, texts: Texts, t5: Config | None) -> list[str]:
    found = []
    width, joint = _width(texts), transformer["joint_attention_dim"]
    if t5 is not None and t5["d_model"] != joint:
        found.append(f"text_encoder_3 is {t5['d_model']} wide but the transformer's joint_attention_dim is {joint}")
    if width > joint:
        found.append(f"the text encoders are {width} wide but the transformer's joint_attention_dim is {joint}")
    pooled = sum(text["projection_dim"] or 0 for text in texts.values())
    if pooled != transformer["pooled_projection_dim"]:
        found.append(
            f"the text encoders project to {pooled} numbers but the transformer's pooled_projection_dim is "
            f"{transformer['pooled_projection_dim']}"
        )
    return found


def _transformer_dimensions(transformer: Config, _: Texts) -> dict[str, int]:
    return {
        "attention_width": transformer["joint_attention_dim"],
        "pooled_width": transformer["pooled_projection_dim"],
        "size_numbers": 0,
        "guidance_width": 0,
        "unet_factor": transformer["patch_size"],
    }


def _largest(transformer: Config) -> int | None:
    """Return the longest side that the table of positions has room for."""
    return int(transformer["pos_embed_max_size"]) * int(transformer["patch_size"])


def _skipped(transformer: Config) -> tuple[int, ...]:
    """Return the blocks that Stability AI recommends to skip for Stable Diffusion 3.5 medium, as diffusers'
    StableDiffusion3Pipeline says; it is the only one with dual attention in some blocks (SD3Transformer2DModel).
    """
    medium = transformer["dual_attention_layers"] and int(transformer["num_layers"]) > max(MEDIUM)
    return MEDIUM if medium else ()


def _video_objections(unet: Config, _: Texts, vision: Config | None) -> list[str]:
    attends, given = unet["cross_attention_dim"], None if vision is None else vision["projection_dim"]
    if set(attends if isinstance(attends, list | tuple) else [attends]) == {given}:
        return []
    return [f"the image encoder projects to {given} numbers but the UNet's cross_attention_dim is {attends}"]


def _video_dimensions(unet: Config, _: Texts) -> dict[str, int]:
    return {
        "attention_width": _first(unet["cross_attention_dim"]),
        "pooled_width": 0,
        "size_numbers": unet["projection_class_embeddings_input_dim"] // unet["addition_time_embed_dim"],
        "guidance_width": 0,
        "unet_factor": 2 ** (len(unet["block_out_channels"]) - 1),
        "unet_channels": unet["out_channels"],  # the image's are an input of its own
    }


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _video_frames(unet: Config) -> FrameRange:
    return FrameRange(window=unet["num_frames"], most=MOST_FRAMES, whole=True, guidance=VIDEO_GUIDANCE)


def _width(texts: Texts) -> int:
    return sum(text["hidden_size"] for text in texts.values())


# By a denoiser's class or, where that is not here, by its folder.
KINDS: Mapping[str, Kind] = {
    "unet": Kind(label="UNet", objections=_unet_objections, dimensions=_unet_dimensions, residuals=unet_residuals),
    "transformer": Kind(
        label="transformer",
        objections=_transformer_objections,
        dimensions=_transformer_dimensions,
        residuals=transformer_residuals,
        refuses=OF_UNETS,
        patch=lambda transformer: int(transformer["patch_size"]),
        largest=_largest,
        blocks=lambda transformer: int(transformer["num_layers"]),
        skipped=_skipped,
    ),
    "UNetSpatioTemporalConditionModel": Kind(
        label="UNet for videos of an image",
        objections=_video_objections,
        dimensions=_video_dimensions,
        takes=lambda channels: (2 * channels,),
        frames=_video_frames,
        vae="AutoencoderKLTemporalDecoder",
        refuses=(*OF_UNETS, "controlnets", "vae", "loras", "ip_adapters", "refiner"),
    ),
}


def kind_of(folder: str, config: Config) -> Kind:
    """Return the kind of a denoiser. folder: of it; config: its own, or what else names its class"""
    return KINDS.get(str(config.get("_class_name"))) or KINDS[folder]
