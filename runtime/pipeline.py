"""The public class: a loaded bundle that turns prompts into pictures."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from latentrt import __version__
from latentrt.engines.building import OpenEngines, open_engines
from latentrt.engines.bundle import Bundle, Check
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.manifest import Manifest
from latentrt.engines.spec import Array, Engine
from latentrt.runtime.denoise import denoise
from latentrt.runtime.guidance import classifier_free
from latentrt.runtime.noise import TorchCpuNoise
from latentrt.runtime.plan import SamplingPlan
from latentrt.runtime.prompt import PromptTokenizer
from latentrt.runtime.samplers import default_sampler, make_plan

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 26  # a side typed with a digit too many ends here, not in the swap file
NEEDED = ("text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one call asked for, resolved: with these and a seed a picture can be drawn again."""

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    model: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Told to `on_step` after each stage. `latents` is (n, C, h, w), float32: read it, do not keep it."""

    stage: int
    stages: int
    latents: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What was drawn.

    pixels: (n, height, width, 3), uint8, sRGB
    settings: one for each picture, as are the seeds
    seconds: by stage: tokenize, encode, denoise, decode, total
    backend, reason: what ran, and why it was chosen
    """

    pixels: Array
    seeds: tuple[int, ...]
    settings: tuple[Settings, ...]
    seconds: Mapping[str, float]
    step_seconds: tuple[float, ...]
    backend: str
    reason: str

    @property
    def images(self) -> list[Image]:
        """Return the pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pixels]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    guidance: float
    plan: SamplingPlan


class Pipeline:
    """Draws pictures from a bundle. Safe to use from many threads: calls wait for one another."""

    def __init__(self, bundle: Bundle, opened: OpenEngines, *, check: Check = "hash") -> None:
        self.bundle = bundle
        self.load_s = opened.load_s
        self._opened = opened
        self._engines = opened.engines
        self._lock = threading.Lock()
        spec = bundle.manifest.tokenizers["tokenizer"]
        self._tokenizer = PromptTokenizer(bundle.path(spec.file, check=check), spec)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        check: Check = "hash",
    ) -> Self:
        """Open a bundle and the engines that were built for this machine.

        backend: `auto` (the GPU's if one answers, else the CPU's) or a name, which is always obeyed
        threads: CPU threads a run may use; None for the backend's own choice
        check: compare the SHA-256 of every file that is opened, or only its `size` (faster for gigabytes)
        Raises BundleError (files) and EngineError (backend), each with the mend.
        """
        bundle = Bundle.open(path)
        return cls(
            bundle,
            open_engines(bundle, backend, components=NEEDED, threads=threads, check=check),
            check=check,
        )

    @property
    def manifest(self) -> Manifest:
        """Return the bundle's manifest."""
        return self.bundle.manifest

    @property
    def backend(self) -> str:
        """Return the name of the backend that runs."""
        return self._opened.choice.backend

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 20,
        guidance: float = 7.5,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        n: int = 1,
        on_step: Callable[[Step], None] | None = None,
    ) -> Result:
        """Draw n pictures of each prompt.

        sampler: any of `latentrt.runtime.samplers.sampler_names()`, or a name that the community or diffusers has for
            it; None for the checkpoint's own scheduler
        guidance: the scale of classifier-free guidance; at 1 and below, as in diffusers, the prompt alone is followed:
            the negative prompt is not computed and a step costs half
        seed: one for the first picture, the others count up from it; or one for each picture; None draws one at
            random. The same seed gives the picture that diffusers gives with a CPU generator.
        size: (width, height) in pixels, multiples of the VAE's factor; None for the checkpoint's own
        on_step: called after each stage; what it raises ends the call
        Raises RequestError on what cannot be drawn.
        """
        request = self._request(prompt, negative_prompt, steps, guidance, sampler, seed, size, n)
        with self._lock:
            return self._draw(request, on_step)

    def _request(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str],
        steps: int,
        guidance: float,
        sampler: str | None,
        seed: int | Sequence[int] | None,
        size: tuple[int, int] | None,
        n: int,
    ) -> _Request:
        if type(n) is not int or n < 1:
            raise RequestError(f"n: found {n!r}, expected a whole number of pictures from 1 up")
        prompts = tuple(text for text in _texts("prompt", prompt) for _ in range(n))
        negatives = _texts("negative_prompt", negative_prompt)
        if len(negatives) == 1:
            negatives *= len(prompts)
        if len(negatives) != len(prompts):
            raise RequestError(
                f"negative_prompt: found {len(negatives)} for {len(prompts)} pictures, expected one each"
            )
        if not np.isfinite(guidance) or guidance < 0:
            raise RequestError(f"guidance: found {guidance!r}, expected a number from 0 up")
        return _Request(
            prompts=prompts,
            negatives=negatives,
            seeds=_seeds(seed, len(prompts)),
            size=self._size(size),
            guidance=float(guidance),
            plan=make_plan(sampler or default_sampler(self.manifest.schedule), self.manifest.schedule, steps=steps),
        )

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.manifest.default_size
        if len(size) != 2 or any(type(side) is not int for side in size):
            raise RequestError(f"size: found {size!r}, expected (width, height) in whole pixels")
        width, height = size
        factor = self.manifest.latents.factor
        if width < factor or height < factor or width % factor or height % factor:
            nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in size)
            raise RequestError(
                f"size: found {width}x{height}, expected multiples of {factor} pixels; the nearest is {nearest}"
            )
        if width * height > MAX_PIXELS:
            raise RequestError(f"size: {width}x{height} is more than {MAX_PIXELS} pixels; ask for a smaller picture")
        return width, height

    def _draw(self, request: _Request, on_step: Callable[[Step], None] | None) -> Result:
        clock = _Clock()
        start = time.perf_counter()
        guided = request.guidance > 1  # as in diffusers: at 1 and below the prompt alone is followed
        with clock("tokenize"):
            tokens = self._tokenizer(request.prompts + (request.negatives if guided else ()))
        with clock("encode"):
            text = self._encode(tokens)
        pictures = len(request.prompts)
        with clock("denoise"):
            latents, step_seconds = self._denoise(
                request, text[:pictures], text[pictures:] if guided else None, on_step
            )
        with clock("decode"):
            pixels = self._decode(latents)
        return Result(
            pixels=pixels,
            seeds=request.seeds,
            settings=tuple(self._settings(request, i) for i in range(pictures)),
            seconds={**clock.seconds, "total": time.perf_counter() - start},
            step_seconds=step_seconds,
            backend=self._opened.choice.backend,
            reason=self._opened.choice.reason,
        )

    def _encode(self, tokens: Array) -> Array:
        rows, index = np.unique(tokens, axis=0, return_inverse=True)  # the same text is encoded once
        encoded = self._engine("text_encoder")({"input_ids": rows})["last_hidden_state"]
        return encoded[index.reshape(-1)]

    def _denoise(
        self, request: _Request, text: Array, negative: Array | None, on_step: Callable[[Step], None] | None
    ) -> tuple[Array, tuple[float, ...]]:
        width, height = request.size
        space = self.manifest.latents
        shape = (space.channels, height // space.factor, width // space.factor)
        generators = [TorchCpuNoise(seed) for seed in request.seeds]

        def draw() -> Array:
            return np.stack([generator.normal(shape) for generator in generators])

        denoiser = classifier_free(self._unet, text, negative, request.guidance if negative is not None else 1.0)
        marks = [time.perf_counter()]
        for stage, current in enumerate(denoise(request.plan, draw(), denoiser, draw)):
            latents = current
            marks.append(time.perf_counter())
            if on_step is not None:
                on_step(Step(stage=stage + 1, stages=request.plan.stages, latents=latents))
        return latents, tuple(np.diff(marks).tolist())

    def _unet(self, latents: Array, timesteps: Array, text: Array) -> Array:
        inputs = {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text}
        return self._engine("unet")(inputs)["out_sample"]

    def _decode(self, latents: Array) -> Array:
        scaled = latents / np.float32(self.manifest.latents.scaling_factor)
        return self._engine("vae_decoder")({"latent_sample": scaled})["pixels"].copy()

    def _engine(self, component: str) -> Engine:
        try:
            return self._engines[component]
        except KeyError:
            raise EngineError(f"the pipeline on '{self.bundle.root}' is closed; load it again") from None

    def _settings(self, request: _Request, picture: int) -> Settings:
        return Settings(
            prompt=request.prompts[picture],
            negative_prompt=request.negatives[picture],
            steps=request.plan.steps,
            guidance=request.guidance,
            sampler=request.plan.sampler,
            size=request.size,
            model=self.bundle.root.resolve().name,
            version=f"latentrt {__version__}",
        )

    def close(self) -> None:
        """Free the engines. A call that is running ends first."""
        with self._lock:
            self._opened.close()
            self._engines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name}: found {value!r}, expected a string or a list of strings")
    return tuple(texts)


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


class _Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
