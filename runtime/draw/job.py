"""A request checked against a bundle: what is drawn, with which plan. Whatever can be refused is refused here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec, Manifest, SizeName
from latentrt.engines.bundle.windows import Windows
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.draw.animation import variation_seeds
from latentrt.runtime.draw.controls import ResolvedControl, resolve_controls
from latentrt.runtime.draw.loras import check_loras
from latentrt.runtime.image_prompts.resolve import ResolvedImage, resolve_images
from latentrt.runtime.images.sources import MAX_PIXELS, ImageSource
from latentrt.runtime.images.tiling import Tiling, plan_tiles
from latentrt.runtime.request import DECODERS, NO_TINY, NOISES, SCORES, Control, KeyFrame, Request
from latentrt.runtime.sampling.forecast import forecast
from latentrt.runtime.sampling.guidance import Guidance, plan_guidance
from latentrt.runtime.sampling.make import make_plan
from latentrt.runtime.sampling.plan import DenoiserRange, SamplingPlan, split
from latentrt.runtime.text.tokenizer import Prompt


class Job(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request that can be drawn: one prompt, negative prompt and seed for each picture, and its plan.

    variations: the variation seed of each picture, empty if the noise is the seeds' own
    scale: of guidance, as it was asked for; what that is at each stage, `guidance` says
    ranges: which denoiser takes which stages of the plan
    decoder: the component that makes the pixels
    windows, shares: where the pictures are frames of videos, those that the denoiser sees at once, and what each row of
        these says of its frame; none where each is a picture of its own
    numbers: what else than a request's fields the denoiser is told of, see `DenoiserSpec.sizes`
    chunk: how many frames are decoded at once, None for all of a video
    """

    request: Request
    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]
    seeds: tuple[int, ...]
    variations: tuple[int, ...]
    size: tuple[int, int]
    plan: SamplingPlan
    scale: float
    guidance: Guidance
    ranges: tuple[DenoiserRange, ...]
    decoder: str
    pixels: Array | None = None  # (1 or n, height, width, 3), float32, -1 to 1
    mask: Array | None = None  # (1, height, width), float32
    strength: float = 1.0
    tiling: Tiling | None = None  # the tiles that the VAE sees, None for the whole picture
    controls: tuple[ResolvedControl, ...] = ()
    images: tuple[ResolvedImage, ...] = ()
    windows: Windows = ()
    shares: Array | None = None
    numbers: Mapping[SizeName, float] = msgspec.field(default_factory=dict)
    chunk: int | None = None

    @property
    def rows(self) -> int:
        """Return how many model rows a batch has at the stage that has most: a group after another."""
        return len(self.prompts) * self.guidance.most

    def read(self, texts: Sequence[str | None], *, negative: bool = False) -> list[Prompt]:
        """Return texts with how this request reads them. Raises RequestError.

        negative: they are negative prompts, for which no layer is left out, as in diffusers; None for one not given
        """
        how, skip = self.request, 0 if negative else self.request.clip_skip
        return [
            Prompt(
                text=text or "",
                syntax=how.prompt_syntax,
                overflow=how.overflow,
                clip_skip=skip,
                given=text is not None,
                t5=how.t5,
                t5_tokens=how.t5_tokens,
            )
            for text in texts
        ]

    def read_groups(self, prompts: Sequence[str], negatives: Sequence[str | None]) -> tuple[list[Prompt], list[Prompt]]:
        """Return prompts, and what further groups of model rows are told: negative prompts, then the prompts again.

        These are there as far as any stage needs them.
        """
        own, told = self.read(prompts), self.read(negatives, negative=True)
        return own, [*told, *own][: len(own) * (self.guidance.most - 1)]

    def read_keys(self, keys: Sequence[KeyFrame]) -> tuple[list[Prompt], list[Prompt]]:
        """Return key frames' prompts and those of the further groups, see `read_groups`."""
        return self.read_groups([key.prompt for key in keys], [key.negative_prompt for key in keys])


def resolve(request: Request, manifest: Manifest) -> Job:
    """Check a request against a bundle. Raises RequestError, with one sentence, on what cannot be drawn."""
    require_pictures(manifest)
    return resolve_any(request, manifest)


def require_pictures(manifest: Manifest) -> None:
    """Raise RequestError where a bundle draws no pictures."""
    if manifest.denoisers[manifest.denoiser].shown is not None:
        raise RequestError(
            "this bundle makes videos of an image, not pictures; use `latentrt video BUNDLE --image FILE`, or "
            "pipe.video(image=…)"
        )


def resolve_any(request: Request, manifest: Manifest) -> Job:
    """Check a request as `resolve` does, whose pictures may be the frames of a video."""
    if type(request.n) is not int or request.n < 1:
        raise RequestError(f"n: found {request.n!r}, expected a whole number of pictures from 1 up")
    prompts = tuple(text for text in _texts("prompt", request.prompt) for _ in range(request.n))
    if request.noise not in NOISES:
        raise RequestError(f"noise: found {request.noise!r}, expected one of {', '.join(NOISES)}")
    if type(request.t5) is not bool:
        raise RequestError(f"t5: found {request.t5!r}, expected true or false")
    if request.t5_tokens is not None and not any(
        text.tokens for spec in manifest.denoisers.values() for text in spec.text_encoders
    ):
        raise RequestError("t5_tokens: this checkpoint's denoiser reads no text of T5; omit it")
    request = msgspec.structs.replace(request, loras=check_loras(request.loras))
    decoder = _decoder(request, manifest)
    pixels, mask, size = _pictures(request, manifest)
    if mask is None and repaints(manifest):
        raise RequestError("mask: this is an inpainting checkpoint; give `image` and `mask`")
    if pixels is not None and len(pixels) not in (1, len(prompts)):
        raise RequestError(f"image: found {len(pixels)} for {len(prompts)} pictures, expected one, or one for each")
    seeds, variations = _all_seeds(request, len(prompts))
    scale = manifest.defaults.guidance if request.guidance is None else _number("guidance", request.guidance)
    if not any("original_height" in spec.sizes for spec in manifest.denoisers.values()):
        for name, default in (("original_size", None), ("target_size", None), ("crop", (0, 0))):
            if getattr(request, name) != default:
                raise RequestError(f"{name}: this checkpoint was not trained with picture sizes; omit it")
    _check_scores(request, manifest)
    plan = _plan(request, manifest, size)
    ranges = _denoiser_ranges(plan, request, manifest)
    return Job(
        request=request,
        prompts=prompts,
        negatives=_negatives(request.negative_prompt, len(prompts)),
        seeds=seeds,
        variations=variations,
        size=size,
        pixels=pixels,
        mask=mask,
        strength=_strength(request, manifest),
        tiling=plan_tiles(size, request.tile, factor=manifest.latents.factor),
        controls=resolve_controls(request.controls, manifest, pictures=len(prompts), size=size, stages=plan.stages),
        images=resolve_images(request.image_prompts, manifest, pictures=len(prompts)),
        plan=plan,
        scale=scale,
        guidance=plan_guidance(
            plan,
            1.0 if _distilled(manifest) else scale,
            len(prompts),
            interval=request.guidance_interval,
            rescale=_number("guidance_rescale", request.guidance_rescale),
            skip=_skip(request, manifest, ranges),
            skip_interval=request.skip_layer_interval,
        ),
        ranges=ranges,
        decoder=decoder,
    )


def _decoder(request: Request, manifest: Manifest) -> str:
    if request.decoder not in DECODERS:
        raise RequestError(f"decoder: found {request.decoder!r}, expected one of {', '.join(DECODERS)}")
    found = manifest.find(DECODERS[request.decoder])
    if found is None:
        raise RequestError(f"decoder: {NO_TINY}, or omit it")
    return found


def _denoiser_ranges(plan: SamplingPlan, request: Request, manifest: Manifest) -> tuple[DenoiserRange, ...]:
    if request.refine_from is None:
        return (DenoiserRange(denoiser=manifest.denoiser, stages=range(plan.stages)),)
    if manifest.refiner is None:
        raise RequestError(
            "refine_from: this bundle holds no refiner; export it again with --refiner CHECKPOINT, or omit it"
        )
    share = _number("refine_from", request.refine_from)
    return split(plan, share, tuple(manifest.denoisers), train_timesteps=manifest.schedule.num_train_timesteps)


def _check_scores(request: Request, manifest: Manifest) -> None:
    """Refuse scores that no denoiser of the bundle would be told, and what is not a number."""
    scored = any("aesthetic_score" in spec.sizes for spec in manifest.denoisers.values())
    for name, default in SCORES.items():
        if _number(name, getattr(request, name)) != default and not scored:
            raise RequestError(f"{name}: this checkpoint was not trained with aesthetic scores; omit it")


def _skip(request: Request, manifest: Manifest, ranges: Sequence[DenoiserRange]) -> float:
    """Return the scale of skip-layer guidance. Raises RequestError where a denoiser has no layers to skip."""
    skip = _number("skip_layer_guidance", request.skip_layer_guidance)
    if skip and not all(manifest.denoisers[part.denoiser].skip_layers for part in ranges):
        raise RequestError(
            "skip_layer_guidance: no layers of this bundle's denoiser can be skipped; export a transformer with "
            "--skip-layers, or omit it"
        )
    return skip


def _distilled(manifest: Manifest) -> bool:
    """Tell whether guidance was distilled into the denoiser: then it takes the scale and no negative prompt."""
    return any(spec.name == "timestep_cond" for spec in manifest.components[manifest.denoiser].inputs)


def repaints(manifest: Manifest) -> bool:
    """Tell whether the denoiser is an inpainting one, which sees mask and masked image beside the latents."""
    sample = next(spec for spec in manifest.components[manifest.denoiser].inputs if spec.name == "sample")
    return sample.shape[1] != manifest.latents.channels


def _pictures(request: Request, manifest: Manifest) -> tuple[Array | None, Array | None, tuple[int, int]]:
    """Return image and mask as the networks take them, where there are any, and the size to draw."""
    if request.image is None:
        for name in ("mask", "strength"):
            if getattr(request, name) is not None:
                raise RequestError(f"{name}: it changes an image, and there is none; give `image` too")
        return None, None, check_size(request.size or _controlled_size(request, manifest), manifest)

    from latentrt.runtime.images.read import decode, read_mask, read_pictures, rounded_size, size_of  # with Pillow

    cell, size = manifest.latents.cell, request.size and check_size(request.size, manifest)
    if request.mask is None:
        pixels = read_pictures(request.image, factor=cell, size=size)
        return pixels, None, check_size((pixels.shape[2], pixels.shape[1]), manifest)
    if isinstance(request.image, list | tuple):
        raise RequestError(f"mask: found {len(request.image)} images, expected one")
    image = decode(cast(ImageSource, request.image), name="image")
    size = check_size(size or rounded_size(size_of(image), cell), manifest)
    mask = read_mask(request.mask, size=size, picture_size=size_of(image))
    return read_pictures(image, factor=cell, size=size), mask, size


def _controlled_size(request: Request, manifest: Manifest) -> tuple[int, int] | None:
    """Return the size of the first image to follow, cut to a size that can be drawn; None if there is none."""
    first = next(iter(request.controls), None) if isinstance(request.controls, list | tuple) else None
    if not isinstance(first, Control):
        return None

    from latentrt.runtime.images.read import first_of, rounded_size, size_of  # with Pillow

    name = f"controls, '{first.name}'"
    return rounded_size(size_of(first_of(first.image, name=name)), manifest.latents.cell, name=name)


def _strength(request: Request, manifest: Manifest) -> float:
    if request.image is None:
        return 1.0
    default = manifest.defaults.strength if request.mask is None else manifest.defaults.masked_strength
    return default if request.strength is None else _number("strength", request.strength)


def _plan(request: Request, manifest: Manifest, size: tuple[int, int]) -> SamplingPlan:
    free = request.timesteps is None and request.sigmas is None
    plan = make_plan(
        request.sampler,
        manifest.schedule,
        steps=20 if request.steps is None and free else request.steps,
        spacing=request.spacing,
        eta=request.eta,
        shift=None if request.shift is None else _number("shift", request.shift),
        tokens=manifest.latents.tokens(size),
        strength=_strength(request, manifest),
        stop=request.stop,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
    )
    if request.forecast is None:
        return plan
    if request.midway is not None:
        raise RequestError(
            f"forecast: {request.midway} changes midway what the denoiser gives, and what it gave before says nothing "
            "of that; omit one of the two"
        )
    return forecast(plan, request.forecast)


def check_size(size: tuple[int, int] | None, manifest: Manifest) -> tuple[int, int]:
    """Return (width, height) in pixels, the bundle's own for None. Raises RequestError on what it cannot draw."""
    if size is None:
        return manifest.default_size
    if len(size) != 2 or any(type(side) is not int for side in size):
        raise RequestError(f"size: found {size!r}, expected (width, height) in whole pixels")
    width, height = size
    space = manifest.latents
    cell, largest = space.cell, max(size) if space.largest is None else space.largest * space.factor
    if min(size) < cell or width % cell or height % cell:
        nearest = "x".join(str(max(1, round(side / cell)) * cell) for side in size)
        raise RequestError(
            f"size: found {width}x{height}, expected multiples of {cell} pixels; the nearest is {nearest}"
        )
    if max(size) > largest:
        raise RequestError(
            f"size: found {width}x{height}, and this checkpoint draws at most {largest} pixels a side; "
            "ask for a smaller picture"
        )
    if width * height > MAX_PIXELS:
        raise RequestError(f"size: {width}x{height} is more than {MAX_PIXELS} pixels; ask for a smaller picture")
    return width, height


def latent_shape(size: tuple[int, int], space: LatentSpec) -> tuple[int, int, int]:
    """Return (channels, height, width) of the latents of a picture of (width, height) pixels."""
    width, height = size
    return space.channels, height // space.factor, width // space.factor


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise RequestError(f"{name}: found {value!r}, expected a number")
    return float(value)


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name}: found {value!r}, expected a string or a list of strings")
    return tuple(texts)


def _negatives(value: str | Sequence[str | None] | None, pictures: int) -> tuple[str | None, ...]:
    negatives = (value,) if value is None or isinstance(value, str) else value
    if (
        not isinstance(negatives, Sequence)
        or not negatives
        or not all(isinstance(one, str | None) for one in negatives)
    ):
        raise RequestError(f"negative_prompt: found {value!r}, expected a string, None, or a list of them")
    if len(negatives) not in (1, pictures):
        raise RequestError(f"negative_prompt: found {len(negatives)} for {pictures} pictures, expected one for each")
    return tuple(negatives) * (pictures // len(negatives))


def _all_seeds(request: Request, pictures: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the seed and the variation seed of each picture; no variation seeds where there is no variation."""
    if (request.variation_seed is None) != (request.variation_strength == 0):
        raise RequestError("variation_seed: it and variation_strength belong together; give both or neither")
    seeds = seeds_of(request.seed, pictures)
    if request.variation_seed is None:
        return seeds, ()
    if isinstance(request.seed, Sequence):
        raise RequestError("variation_seed: it varies one seed, and seed is a list; give one seed")
    _number("variation_strength", request.variation_strength)
    return variation_seeds(seeds[0], seeds_of(request.variation_seed, 1)[0], pictures)


def seeds_of(seed: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    """Return the seed of each picture: one counts up, None is random. Raises RequestError."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return tuple(int(seed) + i for i in range(pictures))
    if not isinstance(seed, Sequence) or not all(type(one) is int for one in seed):
        raise RequestError(f"seed: found {seed!r}, expected a whole number or a list of them")
    if len(seed) != pictures:
        raise RequestError(f"seed: found {len(seed)} seeds for {pictures} pictures, expected one for each")
    return tuple(seed)


def ordinary(manifest: Manifest) -> Request:
    """Return a request like those that come: a few steps, guided, of the bundle's own size."""
    if not repaints(manifest):
        return Request(prompt="", steps=3, seed=0)
    width, height = manifest.default_size
    grey = np.full((height, width, 3), 127, dtype=np.uint8)
    return Request(prompt="", steps=3, seed=0, image=grey, mask=np.full((height, width), 255, dtype=np.uint8))
