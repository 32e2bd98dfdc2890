"""What one call asks for, and what it means for a bundle: checked once, before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.manifest import LatentSpec, Manifest
from latentrt.runtime.guidance import ALWAYS, Guidance, plan_guidance
from latentrt.runtime.noise import TorchCpuNoise, TorchCudaNoise
from latentrt.runtime.plan import SamplingPlan
from latentrt.runtime.samplers import default_sampler, make_plan

MAX_PIXELS = 1 << 26  # a side typed with a digit too many ends here, not in the swap file
NoiseSource = Literal["cpu", "cuda"]
NOISES = {"cpu": TorchCpuNoise, "cuda": TorchCudaNoise}


class Options(TypedDict, total=False):
    """The fields of a `Request` besides its prompt, as keywords of a call."""

    negative_prompt: str | Sequence[str]
    n: int
    seed: int | Sequence[int] | None
    size: tuple[int, int] | None
    steps: int | None
    sampler: str | None
    spacing: str | None
    eta: float | None
    stop: float
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    noise: NoiseSource
    deadline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw. Only the prompt is needed.

    prompt: a text, or one for each picture; each is drawn n times
    negative_prompt: what not to show: one for all, or one for each picture
    seed: one for the first picture, the others count up from it; or one for each picture; None draws one at random.
        The same seed gives the picture that diffusers gives with a generator of the same kind, see `noise`.
    size: (width, height) in pixels, multiples of the VAE's factor; None for the checkpoint's own
    steps: None for 20, or as many as `timesteps` or `sigmas` say
    sampler: any of `latentrt.runtime.samplers.sampler_names()`, or a name that the community or diffusers has for it;
        None for the checkpoint's own scheduler
    spacing, eta, stop, timesteps, sigmas: see `latentrt.runtime.samplers.make_plan`
    guidance: the scale of classifier-free guidance; at 1 and below, as in diffusers, the prompt alone is followed: the
        negative prompt is not computed and a step costs half
    guidance_interval: the fractions of the steps between which guidance is on; outside, a step costs half
    guidance_rescale: how much of the prompt's own contrast to restore, 0 to 1
    noise: whose generator a seed is for: torch's on the CPU, or torch's on a GPU (`cuda`)
    deadline: seconds from the call to the picture, waiting for other calls included; None for no end
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    n: int = 1
    seed: int | Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    stop: float = 1.0
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance: float = 7.5
    guidance_interval: tuple[float, float] = ALWAYS
    guidance_rescale: float = 0.0
    noise: NoiseSource = "cpu"
    deadline: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A request that can be drawn: one prompt, negative prompt and seed for each picture, and its plan."""

    request: Request
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    plan: SamplingPlan
    guidance: Guidance

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the text of each model row: the prompts, then the negative prompts if any stage needs them."""
        return self.prompts + (self.negatives if self.guidance.needed else ())


def resolve(request: Request, manifest: Manifest) -> Job:
    """Check a request against a bundle. Raises RequestError, with one sentence, on what cannot be drawn."""
    if type(request.n) is not int or request.n < 1:
        raise RequestError(f"n: found {request.n!r}, expected a whole number of pictures from 1 up")
    prompts = tuple(text for text in _texts("prompt", request.prompt) for _ in range(request.n))
    if request.deadline is not None and not request.deadline > 0:
        raise RequestError(f"deadline: found {request.deadline!r}, expected seconds above 0")
    if request.noise not in NOISES:
        raise RequestError(f"noise: found {request.noise!r}, expected one of {', '.join(NOISES)}")
    plan = _plan(request, manifest)
    return Job(
        request=request,
        prompts=prompts,
        negatives=_negatives(request.negative_prompt, len(prompts)),
        seeds=_seeds(request.seed, len(prompts)),
        size=check_size(request.size, manifest),
        plan=plan,
        guidance=plan_guidance(
            plan,
            _number("guidance", request.guidance),
            len(prompts),
            interval=request.guidance_interval,
            rescale=_number("guidance_rescale", request.guidance_rescale),
        ),
    )


def _plan(request: Request, manifest: Manifest) -> SamplingPlan:
    free = request.timesteps is None and request.sigmas is None
    return make_plan(
        request.sampler or default_sampler(manifest.schedule),
        manifest.schedule,
        steps=20 if request.steps is None and free else request.steps,
        spacing=request.spacing,
        eta=request.eta,
        stop=request.stop,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
    )


def check_size(size: tuple[int, int] | None, manifest: Manifest) -> tuple[int, int]:
    """Return (width, height) in pixels, the bundle's own for None. Raises RequestError on what it cannot draw."""
    if size is None:
        return manifest.default_size
    if len(size) != 2 or any(type(side) is not int for side in size):
        raise RequestError(f"size: found {size!r}, expected (width, height) in whole pixels")
    width, height = size
    factor = manifest.latents.factor
    if width < factor or height < factor or width % factor or height % factor:
        nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in size)
        raise RequestError(
            f"size: found {width}x{height}, expected multiples of {factor} pixels; the nearest is {nearest}"
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


def _negatives(value: str | Sequence[str], pictures: int) -> tuple[str, ...]:
    negatives = _texts("negative_prompt", value)
    if len(negatives) == 1:
        negatives *= pictures
    if len(negatives) != pictures:
        raise RequestError(f"negative_prompt: found {len(negatives)} for {pictures} pictures, expected one each")
    return negatives


def _seeds(seed: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        return tuple(int(seed) + i for i in range(pictures))
    if not isinstance(seed, Sequence) or not all(type(one) is int for one in seed):
        raise RequestError(f"seed: found {seed!r}, expected a whole number or a list of them")
    if len(seed) != pictures:
        raise RequestError(f"seed: found {len(seed)} seeds for {pictures} pictures, expected one each")
    return tuple(seed)
