"""The public class: a loaded bundle that turns prompts into pictures."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self, Unpack

import numpy as np

from latentrt import __version__
from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import DeadlineError, EngineError
from latentrt.engines.lora.weight_changes import Changes, keys_of
from latentrt.engines.open import OpenEngines, open_engines
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.draw.animation import Frame, batches, frame_draw, frame_rows, frames_between
from latentrt.runtime.draw.draw import Drawing, Source, stream
from latentrt.runtime.draw.finite import TEXT, finite, one_coloured
from latentrt.runtime.draw.job import Job, latent_shape, repaints, resolve
from latentrt.runtime.draw.loras import Loras
from latentrt.runtime.draw.step import Step, Watch
from latentrt.runtime.request import DECODERS, NOISES, KeyFrame, Options, Request
from latentrt.runtime.result import Result, Settings
from latentrt.runtime.text.encoders import Texts, read_tokenizers
from latentrt.runtime.text.textual_inversion import load_embedding
from latentrt.runtime.text.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)


class Pipeline:
    """Draws pictures from a bundle. Safe to use from many threads: calls wait for one another."""

    def __init__(self, bundle: Bundle, opened: OpenEngines, tokenizers: Mapping[str, PromptTokenizer]) -> None:
        self.bundle = bundle
        self.load_s, self.warm_up_s = opened.load_s, 0.0
        self._opened = opened
        self._engines = opened.engines
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._texts = Texts(bundle.manifest, opened.engines, tokenizers)
        self._loras = Loras(bundle)
        self._drawing = Drawing(opened, bundle.manifest)

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
        build: bool = False,
    ) -> Self:
        """Open a bundle and the engines that were built for this machine.

        backend: `auto` (where a GPU answers the bundle's fastest engines for it, else the CPU's) or a name, which is
            always obeyed
        threads: CPU threads a run may use; None for the backend's own choice
        cuda_graphs: whether a GPU's kernels are recorded and replayed; None: TensorRT's are, ONNX Runtime's not
        warm_up: draw before the first request comes, see `warm_up`; `warm_up_s` tells how long it took
        check: compare the SHA-256 of every file that is opened, or only its `size` (faster for gigabytes)
        build: where the bundle holds no engines for this machine, build them first, as `latentrt build` does: beside
            the bundle, or in the user's cache where that is read-only. Later loads find them; the log and every
            result's `reason` tell where they are
        Raises BundleError (files) and EngineError (backend), each with how to fix it.
        """
        bundle = Bundle.open(path)
        with ThreadPoolExecutor(max_workers=1) as beside:
            reading = beside.submit(read_tokenizers, bundle, check=check)
            opened = open_engines(
                bundle,
                backend,
                components=_needed(bundle),
                threads=threads,
                cuda_graphs=cuda_graphs,
                check=check,
                build=build,
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
        Raises RequestError on what cannot be drawn, DeadlineError where the request's time is over, and NotFiniteError
        where numbers of a picture left the range of floats: then none of the call's pictures is given.
        """
        job = resolve(request, self.manifest)
        self._say(self.manifest.schedule.clip_note)
        return self._locked(job, lambda watch: self._draw(job, self._prompted(job), watch), on_step)

    def _say(self, note: str | None) -> None:
        """Log a warning that holds for every picture, once."""
        if note is not None and note not in self._said:
            self._said.add(note)
            logger.warning("%s", note)

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

    def _prompted(self, job: Job) -> Source:
        """Return what a request's own prompts and seeds give."""
        start = time.perf_counter()
        prompts = job.read(job.prompts)
        negatives = job.read(job.negatives, negative=True) if job.guidance.needed else []
        tokens = {leg.denoiser: self._texts.tokens([*prompts, *negatives], denoiser=leg.denoiser) for leg in job.legs}

        def write(workspace: Workspace, denoiser: str) -> None:
            in_place = self._texts.device_inputs(prompts, negatives, denoiser=denoiser) if workspace.queued else None
            if in_place is not None:
                workspace.encode(in_place)
                return
            for name, array in self._texts(prompts, negatives, denoiser=denoiser).items():
                workspace.write(name, finite(array, TEXT, pictures=len(prompts)))

        shape = latent_shape(job.size, self.manifest.latents)
        return Source(
            tokens=tokens,
            tokenize_s=time.perf_counter() - start,
            write=write,
            draw=stream(job.request.noise, job.seeds, shape),
        )

    def _draw_between(self, job: Job, keys: Sequence[KeyFrame], frames: Sequence[Frame], watch: Watch | None) -> Result:
        """Draw frames that lie between key frames."""
        start = time.perf_counter()
        prompts = job.read([key.prompt for key in keys])
        negatives = job.read([key.negative_prompt for key in keys] if job.guidance.needed else [], negative=True)
        texts = {leg.denoiser: self._texts(prompts, negatives, denoiser=leg.denoiser) for leg in job.legs}
        parts = [slice(None, len(keys)), slice(len(keys), None)][: 2 if negatives else 1]

        def write(workspace: Workspace, denoiser: str) -> None:
            for name, array in texts[denoiser].items():
                rows = np.concatenate([frame_rows(array[part], frames) for part in parts])
                workspace.write(name, finite(rows, TEXT, pictures=len(frames)))

        shape = latent_shape(job.size, self.manifest.latents)
        draw = frame_draw([key.seed for key in keys], frames, shape, stream=NOISES[job.request.noise])
        tokens = {denoiser: arrays["encoder_hidden_states"].shape[1] for denoiser, arrays in texts.items()}
        source = Source(tokens=tokens, tokenize_s=time.perf_counter() - start, write=write, draw=draw)
        return self._draw(job, source, watch)

    def _draw(self, job: Job, source: Source, watch: Watch | None) -> Result:
        start = time.perf_counter()
        drawn = self._drawing(job, source, watch)
        stages = {"encode": drawn.encode_s, "denoise": sum(drawn.step_seconds), "decode": drawn.decode_s}
        total = source.tokenize_s + time.perf_counter() - start
        return Result(
            pixels=drawn.pixels,
            seeds=job.seeds,
            settings=tuple(self._settings(job, i) for i in range(len(job.prompts))),
            seconds={"tokenize": source.tokenize_s, **stages, "total": total},
            step_seconds=drawn.step_seconds,
            warnings=one_coloured(drawn.pixels),
            backend=self._opened.choice.backend,
            reason=self._opened.choice.reason,
        )

    def _settings(self, job: Job, picture: int) -> Settings:
        return Settings(
            prompt=job.prompts[picture],
            negative_prompt=job.negatives[picture],
            steps=job.plan.steps,
            guidance=float(job.request.guidance),
            sampler=job.plan.sampler,
            size=job.size,
            model=self.bundle.name,
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
    return bundle.manifest.of_role("text_encoder", "denoiser", "controlnet", *DECODERS.values())


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
