"""What one call asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec

from latentrt.engines.bundle.manifest import Role
from latentrt.engines.spec import Array
from latentrt.runtime.images.sources import ImageSource
from latentrt.runtime.sampling.guidance import ALWAYS, EARLY
from latentrt.runtime.sampling.noise import TorchCpuNoise, TorchCudaNoise
from latentrt.runtime.text.syntax import Syntax
from latentrt.runtime.text.tokenizer import Overflow

# What changes a picture besides prompt, steps, guidance, sampler, size and seed, and can be written down.
FURTHER = frozenset(
    {
        "prompt_syntax",
        "overflow",
        "clip_skip",
        "t5",
        "t5_tokens",
        "spacing",
        "eta",
        "shift",
        "stop",
        "timesteps",
        "sigmas",
        "forecast",
        "guidance_interval",
        "guidance_rescale",
        "skip_layer_guidance",
        "skip_layer_interval",
        "strength",
        "variation_seed",
        "variation_strength",
        "original_size",
        "target_size",
        "crop",
        "noise",
        "decoder",
        "refine_from",
        "aesthetic_score",
        "negative_aesthetic_score",
        "tile",
    }
)
SCORES = {"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5}  # where none are given: diffusers' own
NoiseSource = Literal["cpu", "cuda"]
NOISES = {"cpu": TorchCpuNoise, "cuda": TorchCudaNoise}


class Options(TypedDict, total=False):
    """The fields of a `Request` besides its prompt, as keywords of a call."""

    negative_prompt: str | Sequence[str | None] | None
    prompt_syntax: Syntax
    overflow: Overflow
    clip_skip: int
    t5: bool
    t5_tokens: int | None
    n: int
    seed: int | Sequence[int] | None
    size: tuple[int, int] | None
    steps: int | None
    sampler: str | None
    spacing: str | None
    eta: float | None
    shift: float | None
    stop: float
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    forecast: int | None
    guidance: float | None
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    skip_layer_guidance: float
    skip_layer_interval: tuple[float, float]
    image: ImageSource | Sequence[ImageSource] | None
    mask: ImageSource | None
    controls: Sequence[Control]
    image_prompts: Sequence[ImagePrompt]
    strength: float | None
    latents: Array | None
    loras: Sequence[Lora]
    variation_seed: int | None
    variation_strength: float
    original_size: tuple[int, int] | None
    target_size: tuple[int, int] | None
    crop: tuple[int, int]
    noise: NoiseSource
    decoder: DecoderName
    refine_from: float | None
    aesthetic_score: float
    negative_aesthetic_score: float
    tile: int | None
    deadline: float | None


class VideoOptions(Options, total=False):
    """The fields of a `VideoRequest` besides its prompt and frames, and those of a `Request`, as keywords of a call."""

    window: int | None
    overlap: int | None
    fps: float | None
    first_guidance: float | None
    motion_bucket: float | None
    noise_augmentation: float | None
    decode_chunk: int | None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to draw. Only the prompt is needed.

    prompt: a text, or one for each picture; each is drawn n times
    negative_prompt: what not to show: one for all pictures, or one for each. None means no negative prompt, alone or in
        the list: as in diffusers, SDXL then gets zeros if its checkpoint says so, while "" is encoded; for other
        checkpoints both are the empty prompt
    prompt_syntax: `plain` takes every sign as text, as diffusers does; `weighted` reads (words:1.2), [words], BREAK
    overflow: what happens to the tokens of a long prompt: further `chunks`, or `truncate` as in diffusers
    clip_skip: how many of the text encoder's last layers to skip for the prompt, counted as in diffusers
    t5: whether T5 reads the prompt beside the other text encoders, where the bundle holds one (SD 3); without it zeros
        stand for what it would give, as in diffusers without text_encoder_3
    t5_tokens: how many tokens of the prompt it reads, from 1 to 512: diffusers' max_sequence_length; None for 256
    seed: one for the first picture, from which the others count up; or one for each picture; None for a random one.
        The same seed gives the picture that diffusers gives with a generator of the same kind, see `noise`.
    size: (width, height) in pixels, multiples of the VAE's factor; None for the checkpoint's own
    steps: None for 20, or as many as `timesteps` or `sigmas` say
    sampler: any of `latentrt.runtime.sampling.sampler_names()`, or a name that the community or diffusers has for it;
        None for the checkpoint's own scheduler
    spacing, eta, shift, stop, timesteps, sigmas: see `latentrt.runtime.sampling.make_plan`
    forecast: how many steps call the denoiser, 7 and more; what it gives in the others is extrapolated. It comes near
        the picture of all steps, see docs/samplers.md; None for all
    guidance: the scale of classifier-free guidance; None for the bundle's own: 7.5, and 7 for SD 3. At 1 and below, as
        in diffusers, the prompt alone is followed: the negative prompt is not computed and a step costs half as much
    guidance_interval: the fractions of the steps between which guidance is on; outside, a step costs half as much
    guidance_rescale: how much of the prompt's own contrast to restore, 0 to 1
    skip_layer_guidance: the scale of guidance away from what the denoiser gives without some of its layers, those that
        a bundle was exported with; 2.8 for Stable Diffusion 3.5 medium, 0 for none
    skip_layer_interval: the fractions of the steps between which that is on; a step then costs half as much again
    image: what to start from: a file, its bytes, a Pillow image or an array, one for all pictures or one for each; the
        size, where none is given, is the first image's own, cut to the VAE's factor
    mask: with an image: white is repainted, black is kept
    controls: images to follow, each with one of the bundle's ControlNets; the size, where neither it nor an image is
        given, is that of the first
    image_prompts: images that say what to draw beside the text, each through one of the bundle's IP-Adapters
    strength: how much of the image to change, as the share of the steps to take, 0 to 1; None for the bundle's own:
        0.8, with a mask 1, and 0.6 for SD 3
    latents: unit noise to start from instead of the seed's, (n, C, h, w) or one for all; with an image, what is
        added to it
    loras: LoRAs to apply to the weights for this call; their order does not matter
    variation_seed, variation_strength: another seed, and how far to blend the noise with that one's, 0 to 1. The
        pictures then share the seed, and the variation seed counts up, as in A1111's interface.
    original_size, target_size: for SDXL, which was trained with the size of each picture before and after resizing:
        (width, height) in pixels, None for the size drawn
    crop: for SDXL too: how many pixels were cut off at the top and at the left
    noise: whose generator a seed is for: torch's on the CPU, or torch's on a GPU (`cuda`)
    decoder: the checkpoint's own, or the `tiny` one that a bundle may hold: many times faster, with less detail
    refine_from: the share of the noise after which the bundle's refiner takes over, between 0 and 1, as diffusers'
        denoising_end and denoising_start; None for no refiner. It takes no controls: a ControlNet is for one UNet
    aesthetic_score, negative_aesthetic_score: for SDXL's refiner, which was trained with a rating of each picture:
        the score to aim for, and the one to avoid
    tile: decode, and read an image, in tiles of this many pixels a side, which overlap and are blended: a large picture
        then takes the VAE no more memory than a tile; None for the whole picture at once
    deadline: seconds from the call to the picture, including the wait for other calls; None for no limit
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str | None] | None = None
    prompt_syntax: Syntax = "plain"
    overflow: Overflow = "chunks"
    clip_skip: int = 0
    t5: bool = True
    t5_tokens: int | None = None
    n: int = 1
    seed: int | Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    shift: float | None = None
    stop: float = 1.0
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    forecast: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] = ALWAYS
    guidance_rescale: float = 0.0
    skip_layer_guidance: float = 0.0
    skip_layer_interval: tuple[float, float] = EARLY
    image: ImageSource | Sequence[ImageSource] | None = None
    mask: ImageSource | None = None
    controls: Sequence[Control] = ()
    image_prompts: Sequence[ImagePrompt] = ()
    strength: float | None = None
    latents: Array | None = None
    loras: Sequence[Lora] = ()
    variation_seed: int | None = None
    variation_strength: float = 0.0
    original_size: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    noise: NoiseSource = "cpu"
    decoder: DecoderName = "full"
    refine_from: float | None = None
    aesthetic_score: float = SCORES["aesthetic_score"]
    negative_aesthetic_score: float = SCORES["negative_aesthetic_score"]
    tile: int | None = None
    deadline: float | None = None

    @property
    def midway(self) -> str | None:
        """Return an option that changes midway through the steps what the denoiser gives, None where none does."""
        steady = Request(prompt="")
        names = ("guidance_interval", "skip_layer_guidance", "refine_from")
        changes = {name: getattr(self, name) != getattr(steady, name) for name in names}
        controls = self.controls if isinstance(self.controls, list | tuple) else ()
        changes["controls"] = any(isinstance(one, Control) and (one.start, one.stop) != (0, 1) for one in controls)
        return next((name for name, changed in changes.items() if changed), None)

    @property
    def further(self) -> dict[str, Any]:
        """Return the options that change a picture besides the common ones, where they differ from their defaults."""
        plain, names = Request(prompt=""), (name for name in self.__struct_fields__ if name in FURTHER)
        kept = {name: value for name in names if (value := getattr(self, name)) != getattr(plain, name)}
        followed = {"controls": [str(control) for control in self.controls]} if self.controls else {}
        shown = {"image_prompts": [str(one) for one in self.image_prompts]} if self.image_prompts else {}
        changed = {"loras": [str(lora) for lora in self.loras]} if self.loras else {}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
        return listed | followed | shown | changed


class KeyFrame(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that an animation starts from or leads to: the one drawn from this prompt and seed alone."""

    prompt: str
    seed: int
    negative_prompt: str | None = None


DecoderName = Literal["full", "tiny"]
DECODERS: Mapping[DecoderName, Role] = {"full": "decoder", "tiny": "tiny_decoder"}
NO_TINY = "this bundle holds no tiny decoder; export the checkpoint again with --tiny-vae DIRECTORY"


class Lora(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA file, in kohya's, diffusers' or PEFT's names, and how strongly it changes the weights.

    scale: 1 as it was trained, 0 for no effect, negative for the opposite
    """

    file: str | os.PathLike[str]
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.scale:g}"


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """An image to follow, as one of the bundle's ControlNets or T2I-Adapters reads it.

    name: the ControlNet's or adapter's name in the bundle
    image: as `Request.image`, one for all pictures or one for each; it is resized to the size that is drawn
    scale: how strongly to follow it; 0 for no effect
    start, stop: the fractions of the steps between which it is followed, as diffusers' control_guidance_start and _end;
        an adapter's stop is its adapter_conditioning_factor
    """

    name: str
    image: ImageSource | Sequence[ImageSource]
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __str__(self) -> str:
        part = f":{self.start:g}:{self.stop:g}" if (self.start, self.stop) != (0, 1) else ""
        return f"{self.name}:{self.scale:g}{part}"


ImageScale = float | Sequence[float] | Mapping[str, Any]
"""One scale for all layers, one for each, or one for each block by name, see `ImagePrompt`."""


class ImagePrompt(msgspec.Struct, frozen=True, kw_only=True):
    """An image that says what to draw, as one of the bundle's IP-Adapters reads it.

    name: the IP-Adapter's name in the bundle
    image: as `Request.image`, one for all pictures or one for each; the middle square of it is seen
    scale: how strongly the denoiser's layers attend to it, 0 for not at all: one number, one for each layer, or one for
        blocks by name and 0 for the others, as diffusers' set_ip_adapter_scale takes them, `{"up": {"block_0": [0.0,
        1.0, 0.0]}}` for the style alone, or by the names of layers as the bundle has them, `{"up_blocks.0": 1.0}`
    """

    name: str
    image: ImageSource | Sequence[ImageSource]
    scale: ImageScale = 1.0

    def __str__(self) -> str:
        number = isinstance(self.scale, int | float)
        return f"{self.name}:{self.scale:g}" if number else f"{self.name}:{json.dumps(self.scale, default=float)}"
