"""The public class: a loaded bundle that turns prompts into pictures."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from latentrt import __version__
from latentrt.engines.adapting import Changes, keys_of
from latentrt.engines.bundle import Bundle, Check
from latentrt.engines.canvas import REFINER, TINY_DECODER, UNET, Canvas, CanvasShape
from latentrt.engines.errors import BundleError, DeadlineError, EngineError
from latentrt.engines.manifest import Manifest
from latentrt.engines.opening import OpenEngines, open_engines
from latentrt.engines.residuals import PREFIX, hint_of
from latentrt.engines.spec import Array
from latentrt.runtime.animation import Frame, KeyFrame, batches, frame_draw, frame_rows, frames_between
from latentrt.runtime.conditioning import conditions
from latentrt.runtime.decoding import DECODERS, NO_TINY, decode_in_place, on_canvas, through_engine
from latentrt.runtime.denoise import denoise
from latentrt.runtime.embeddings import load_embedding
from latentrt.runtime.legs import Leg
from latentrt.runtime.loras import Loras
from latentrt.runtime.mixing import vary
from latentrt.runtime.prompt import PromptTokenizer
from latentrt.runtime.request import NOISES, Job, NoiseSource, Options, Request, latent_shape, repaints, resolve
from latentrt.runtime.starts import Start, check_latents, start_from_image, start_inpainting
from latentrt.runtime.steering import Features
from latentrt.runtime.steps import Noise, Step, Watch
from latentrt.runtime.texts import Texts, read_tokenizers
from latentrt.runtime.tiling import Grid, decode_tiles, encode_tiles

if TYPE_CHECKING:
    from PIL.Image import Image

AHEAD = 1  # stages in the queue while a caller watches each: enough that a device never waits for the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one call asked for, resolved: with these, its images and a seed a picture can be drawn again.

    further: every other option of the request that was not left at its default, images and latents aside
    """

    prompt: str
    negative_prompt: str
    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    model: str
    version: str
    further: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What was drawn.

    pixels: (n, height, width, 3), uint8, sRGB
    settings: one for each picture, as are the seeds
    seconds: by stage: adapt, tokenize, encode, denoise, decode, total; adapt is what it took to change the weights from
        those of the call before, 0 where they were the same
    step_seconds: of each stage of the plan, as measured where the engines run
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """Where a batch's text and noise come from.

    tokens: the length of the text for a denoiser; tokenize_s: what reading it took
    write: puts it on a canvas, as a denoiser takes it
    draw: gives the next unit normals of every picture's own stream, (n, C, h, w)
    """

    tokens: Mapping[str, int]
    tokenize_s: float
    write: Callable[[Canvas, str], None]
    draw: Callable[[], Array]


class Pipeline:
    """Draws pictures from a bundle. Safe to use from many threads: calls wait for one another."""

    def __init__(self, bundle: Bundle, opened: OpenEngines, tokenizers: Mapping[str, PromptTokenizer]) -> None:
        self.bundle = bundle
        self.load_s, self.warm_up_s = opened.load_s, 0.0
        self._opened = opened
        self._engines = opened.engines
        self._lock = threading.Lock()
        self._texts = Texts(bundle.manifest, opened.engines, tokenizers)
        self._loras = Loras(bundle)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        threads: int | None = None,
        cuda_graphs: bool | None = None,
        warm_up: bool = False,
        check: Check = "hash",
    ) -> Self:
        """Open a bundle and the engines that were built for this machine.

        backend: `auto` (where a GPU answers the bundle's fastest engines for it, else the CPU's) or a name, which is
            always obeyed
        threads: CPU threads a run may use; None for the backend's own choice
        cuda_graphs: whether a GPU's kernels are recorded and replayed; None: TensorRT's are, ONNX Runtime's not
        warm_up: draw before the first request comes, see `warm_up`; `warm_up_s` tells how long it took
        check: compare the SHA-256 of every file that is opened, or only its `size` (faster for gigabytes)
        Raises BundleError (files) and EngineError (backend), each with the mend.
        """
        bundle = Bundle.open(path)
        with ThreadPoolExecutor(max_workers=1) as beside:
            reading = beside.submit(read_tokenizers, bundle, check=check)
            opened = open_engines(
                bundle, backend, components=_needed(bundle), threads=threads, cuda_graphs=cuda_graphs, check=check
            )
        try:
            pipe = cls(bundle, opened, reading.result())
        except Exception:
            opened.close()
            raise
        if warm_up:
            pipe.warm_up()
        return pipe

    def warm_up(self, request: Request | None = None) -> float:
        """Draw what a service will be asked for, twice, and forget it; return and add to `warm_up_s` the seconds.

        request: None for one guided picture of the bundle's own size and, on an inpainting UNet, a grey image
        The first drawing allocates and chooses kernels, the second one records them where that is done.
        """
        start = time.perf_counter()
        for _ in range(2):
            self.draw(request or _ordinary(self.manifest))
        taken = time.perf_counter() - start
        self.warm_up_s += taken
        return taken

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
        on_step: Watch | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw pictures of a prompt. The options are the fields of `Request`; on_step: see `draw`."""
        return self.draw(Request(prompt=prompt, **options), on_step=on_step)

    def draw(self, request: Request, *, on_step: Watch | None = None) -> Result:
        """Draw what a request asks for.

        on_step: called after each stage, on the calling thread; what it raises ends the call
        Raises RequestError on what cannot be drawn, and DeadlineError where the request's time is over.
        """
        job = resolve(request, self.manifest)
        return self._locked(job, lambda watch: self._draw(job, self._prompted(job), watch), on_step)

    def _adapt(self, changes: Mapping[str, Changes]) -> float:
        """Have the engines compute with changed weights. Returns the seconds it took, 0 where they do already."""
        start = time.perf_counter()
        self._texts.adapt(keys_of(changes))
        return time.perf_counter() - start if self._opened.adapt(changes) else 0.0

    def animate(
        self,
        keys: Sequence[KeyFrame],
        frames: int,
        *,
        batch: int = 4,
        loop: bool = False,
        on_step: Watch | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Result]:
        """Draw an animation from key frame to key frame; give its frames in order, a batch of them at a time.

        keys: what to go through; text is mixed on a line and noise on an arc, see `animation`
        batch: how many frames are drawn at once; every batch is full but the last
        loop: go on from the last key frame to the first
        options: of every frame, as in a call; keys bring prompt, negative prompt and seed
        Raises RequestError.
        """
        for part in batches(frames_between(len(keys), frames, loop=loop), batch):
            nearest = [keys[frame.second if frame.weight > 0.5 else frame.first] for frame in part]
            own: Options = {
                "negative_prompt": [key.negative_prompt for key in nearest],
                "seed": [key.seed for key in nearest],
            }
            request = Request(prompt=[key.prompt for key in nearest], **(options | own))
            job = resolve(request, self.manifest)
            yield self._locked(job, partial(self._draw_between, job, keys, part), on_step)

    def _locked(self, job: Job, work: Callable[[Watch | None], Result], on_step: Watch | None) -> Result:
        """Do work alone, with the weights that its request asks for and the deadline counted from now."""
        changes = self._loras.changes(job.request.loras)
        deadline = job.request.deadline
        end = None if deadline is None else time.perf_counter() + deadline
        if not self._lock.acquire(timeout=-1 if deadline is None else deadline):
            raise DeadlineError(f"deadline: {deadline:g} s were over while another call was drawing")
        try:
            if not self._engines:
                raise EngineError(f"the pipeline on '{self.bundle.root}' is closed; load it again")
            adapt_s = self._adapt(changes)
            result = work(_watcher(job, end, on_step))
            seconds = {"adapt": adapt_s, **result.seconds, "total": adapt_s + result.seconds["total"]}
            return dataclasses.replace(result, seconds=seconds)
        finally:
            self._lock.release()

    def _prompted(self, job: Job) -> _Source:
        """Return what a request's own prompts and seeds give."""
        start = time.perf_counter()
        prompts = job.read(job.prompts)
        negatives = job.read(job.negatives, negative=True) if job.guidance.needed else []
        tokens = {leg.denoiser: self._texts.tokens([*prompts, *negatives], denoiser=leg.denoiser) for leg in job.legs}

        def write(canvas: Canvas, denoiser: str) -> None:
            in_place = self._texts.device_inputs(prompts, negatives, denoiser=denoiser) if canvas.queued else None
            if in_place is not None:
                canvas.encode(in_place)
                return
            for name, array in self._texts(prompts, negatives, denoiser=denoiser).items():
                canvas.write(name, array)

        shape = latent_shape(job.size, self.manifest.latents)
        return _Source(
            tokens=tokens,
            tokenize_s=time.perf_counter() - start,
            write=write,
            draw=_stream(job.request.noise, job.seeds, shape),
        )

    def _draw_between(self, job: Job, keys: Sequence[KeyFrame], frames: Sequence[Frame], watch: Watch | None) -> Result:
        """Draw frames that lie between key frames."""
        start = time.perf_counter()
        prompts = job.read([key.prompt for key in keys])
        negatives = job.read([key.negative_prompt for key in keys] if job.guidance.needed else [], negative=True)
        texts = {leg.denoiser: self._texts(prompts, negatives, denoiser=leg.denoiser) for leg in job.legs}
        parts = [slice(None, len(keys)), slice(len(keys), None)][: 2 if negatives else 1]

        def write(canvas: Canvas, denoiser: str) -> None:
            for name, array in texts[denoiser].items():
                canvas.write(name, np.concatenate([frame_rows(array[part], frames) for part in parts]))

        shape = latent_shape(job.size, self.manifest.latents)
        draw = frame_draw([key.seed for key in keys], frames, shape, stream=NOISES[job.request.noise])
        tokens = {denoiser: arrays["encoder_hidden_states"].shape[1] for denoiser, arrays in texts.items()}
        source = _Source(tokens=tokens, tokenize_s=time.perf_counter() - start, write=write, draw=draw)
        return self._draw(job, source, watch)

    def _draw(self, job: Job, source: _Source, watch: Watch | None) -> Result:
        start = time.perf_counter()
        last = job.legs[-1].denoiser
        decode = self._decoder(job, last, tokens=source.tokens[last])
        canvas, encode, steps = self._denoise(job, source, watch)
        pixels = decode(canvas)
        further, *own, decode_s = canvas.elapsed()
        encode, steps = encode + further, [*steps, *own]
        seconds = {"tokenize": source.tokenize_s, "encode": encode, "denoise": sum(steps), "decode": decode_s}
        return Result(
            pixels=pixels,
            seeds=job.seeds,
            settings=tuple(self._settings(job, i) for i in range(len(job.prompts))),
            seconds={**seconds, "total": source.tokenize_s + time.perf_counter() - start},
            step_seconds=tuple(steps),
            backend=self._opened.choice.backend,
            reason=self._opened.choice.reason,
        )

    def _decoder(self, job: Job, denoiser: str, *, tokens: int) -> Callable[[Canvas], Array]:
        """Return what decodes a canvas and then sets a mark: at once, or in tiles.

        The tiles' canvas is asked for before anything is drawn: where no engine fits it, the error comes early.
        """
        grid, factor = job.grid, self.manifest.latents.factor
        if grid is None:
            return decode_in_place
        size = self._decoded_size(job)
        tile = on_canvas(self._canvas(job, denoiser, size, tokens=tokens, decoder=job.decoder))

        def decode(canvas: Canvas) -> Array:
            pixels = decode_tiles(canvas.read("state")[:, 0], tile, grid, factor=factor)
            canvas.mark()
            return pixels

        return decode

    def _decoded_size(self, job: Job) -> tuple[int, int]:
        """Return the (width, height) in pixels that a decoder is given at once: the picture's, or a tile's."""
        grid, factor = job.grid, self.manifest.latents.factor
        return job.size if grid is None else (grid.columns.tile * factor, grid.rows.tile * factor)

    def _sketch(self, job: Job, tokens: int, latents: Array) -> Array:
        """Return what latents show by the tiny decoder: (n, height, width, 3), uint8. Raises BundleError."""
        space = self.manifest.latents
        if TINY_DECODER not in self.manifest.components:
            raise BundleError(NO_TINY)
        width, height = self._decoded_size(job)
        shape = CanvasShape(pictures=len(latents), tokens=tokens, width=width, height=height)
        decode = through_engine(self._opened.engine(TINY_DECODER, shape), space)
        return decode(latents) if job.grid is None else decode_tiles(latents, decode, job.grid, factor=space.factor)

    def _canvas(self, job: Job, denoiser: str, size: tuple[int, int], *, tokens: int, decoder: str | None) -> Canvas:
        width, height = size
        shape = CanvasShape(pictures=len(job.prompts), tokens=tokens, width=width, height=height)
        rows = job.plan.rows
        return self._opened.canvas(self.manifest.latents, shape, state_rows=rows, denoiser=denoiser, decoder=decoder)

    def _denoise(self, job: Job, source: _Source, watch: Watch | None) -> tuple[Canvas, float, list[float]]:
        """Take every stage of the plan, each leg on a canvas of its denoiser.

        Returns the last canvas, with its leg's marks, and what the legs before took: to encode, and each stage.
        """
        encode, steps, draw = 0.0, list[float](), Noise(source.draw)
        whole = job.decoder if job.grid is None else None
        inputs: dict[str, Array] | None = None
        for leg in job.legs:
            decoder = whole if leg is job.legs[-1] else None
            tokens = source.tokens[leg.denoiser]
            canvas = self._canvas(job, leg.denoiser, job.size, tokens=tokens, decoder=decoder)
            canvas.mark()
            source.write(canvas, leg.denoiser)
            canvas.mark()
            if inputs is None:
                inputs = self._begin(job, draw, state_rows=canvas.state_rows)
            self._advance(job, leg, inputs, canvas, draw, watch)
            if leg is not job.legs[-1]:  # read before the next canvas, which may take this one's place
                inputs["state"] = canvas.read("state")
                first, *own = canvas.elapsed()
                encode, steps = encode + first, steps + own
        return canvas, encode, steps

    def _begin(self, job: Job, draw: Callable[[], Array], *, state_rows: int) -> dict[str, Array]:
        """Return what to write to a canvas before the first stage."""
        start = self._start(job, draw)
        if job.variations:
            shape = latent_shape(job.size, self.manifest.latents)
            other = _stream(job.request.noise, job.variations, shape)()
            varied = vary(start.noise, other, job.request.variation_strength)
            start = dataclasses.replace(start, noise=varied)
        return start.inputs(job.plan, state_rows=state_rows)

    def _advance(
        self,
        job: Job,
        leg: Leg,
        inputs: Mapping[str, Array],
        canvas: Canvas,
        draw: Noise,
        watch: Watch | None,
    ) -> None:
        """Take the stages of one leg, from the state and what lies beside it among the inputs."""
        further = conditions(self.manifest, job, rows=job.rows, denoiser=leg.denoiser)
        for name, array in {**further, **inputs}.items():
            canvas.write(name, array)
        steering = job.steering if leg.denoiser == UNET else ()  # what is added to the UNet is made for it alone
        for one in steering:
            if one.component.startswith(PREFIX):
                canvas.write(hint_of(one.component), one.pixels)
        features = Features(steering, self.manifest, self._run, size=job.size, rows=job.rows)
        stages = denoise(canvas, job.plan, job.guidance, draw, steering=steering, features=features, stages=leg.stages)
        for stage in stages:
            if watch is not None:
                canvas.settle(AHEAD)
                watch(
                    Step(
                        stage=stage,
                        stages=job.plan.stages,
                        _canvas=canvas,
                        _plan=job.plan,
                        _manifest=self.manifest,
                        _noise=draw.last,
                        _keeps="known" in inputs,
                        _sketch=partial(self._sketch, job, canvas.shape.tokens),
                    )
                )

    def _start(self, job: Job, draw: Callable[[], Array]) -> Start:
        space, latents = self.manifest.latents, job.request.latents
        shape, encoder = latent_shape(job.size, space), partial(self._encode_image, grid=job.grid)
        given = None if latents is None else check_latents(latents, pictures=len(job.prompts), shape=shape)
        if job.pixels is None:
            return Start(noise=draw() if given is None else given)
        if job.mask is None:
            start = start_from_image(job.pixels, encoder, draw, scaling_factor=space.scaling_factor)
        else:
            start = start_inpainting(
                job.pixels,
                job.mask,
                encoder,
                draw,
                scaling_factor=space.scaling_factor,
                factor=space.factor,
                strength=job.strength,
                inpainting_model=repaints(self.manifest),
            )
        return start if given is None else dataclasses.replace(start, noise=given)

    def _encode_image(self, pixels: Array, *, grid: Grid | None) -> Array:
        if grid is not None:
            encoder = partial(self._encode_image, grid=None)
            return encode_tiles(pixels, encoder, grid, factor=self.manifest.latents.factor)
        return self._run("vae_encoder", {"sample": pixels})["latent_parameters"]

    def _run(self, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a network that is loaded when the first image comes: most services draw from text alone."""
        if component not in self._engines:
            self._engines[component] = self._opened.load(component)
        return self._engines[component](inputs)

    def _settings(self, job: Job, picture: int) -> Settings:
        return Settings(
            prompt=job.prompts[picture],
            negative_prompt=job.negatives[picture],
            steps=job.plan.steps,
            guidance=float(job.request.guidance),
            sampler=job.plan.sampler,
            size=job.size,
            model=self.bundle.root.resolve().name,
            version=f"latentrt {__version__}",
            further=job.request.further,
        )

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the learned words (textual inversion) that prompts may use."""
        return self._texts.embeddings

    def add_embedding(self, file: str | os.PathLike[str], *, name: str | None = None) -> str:
        """Let prompts use a learned word from a safetensors file; return the word. Raises RequestError."""
        embedding = load_embedding(file, name=name)
        with self._lock:
            self._texts.add(embedding)
        return embedding.name

    def remove_embedding(self, name: str) -> None:
        """Make a learned word plain text again. Raises RequestError where there is no such word."""
        with self._lock:
            self._texts.remove(name)

    def close(self) -> None:
        """Free the engines. A call that is running ends first."""
        with self._lock:
            self._opened.close()
            self._engines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ordinary(manifest: Manifest) -> Request:
    """Return a request like those that come: a few steps, guided, of the bundle's own size."""
    if not repaints(manifest):
        return Request(prompt="", steps=3, seed=0)
    width, height = manifest.default_size
    grey = np.full((height, width, 3), 127, dtype=np.uint8)
    return Request(prompt="", steps=3, seed=0, image=grey, mask=np.full((height, width), 255, dtype=np.uint8))


def _needed(bundle: Bundle) -> tuple[str, ...]:
    """Return the components that drawing from text takes; an image's encoder is loaded when the first image comes."""
    texts, refiner = bundle.manifest.text_encoders, bundle.manifest.refiner
    controlnets = (name for name in bundle.manifest.components if name.startswith(PREFIX))
    further = (*controlnets, *((REFINER,) if refiner else ()))
    decoders = (name for name in DECODERS.values() if name in bundle.manifest.components)
    return (*(text.component for text in texts), UNET, *further, *decoders)


def _watcher(job: Job, end: float | None, on_step: Watch | None) -> Watch | None:
    """Return what looks at each stage: the deadline, then the caller. None where nobody does."""
    if end is None:
        return on_step

    def watch(step: Step) -> None:
        if time.perf_counter() > end:
            raise DeadlineError(
                f"deadline: {job.request.deadline:g} s were over after stage {step.stage} of {step.stages}"
            )
        if on_step is not None:
            on_step(step)

    return watch


def _stream(source: NoiseSource, seeds: Sequence[int], shape: tuple[int, int, int]) -> Callable[[], Array]:
    """Return what draws the next unit normals of each seed's own stream: (n, *shape), float32."""
    generators = [NOISES[source](seed) for seed in seeds]
    return lambda: np.stack([generator.normal(shape) for generator in generators])
