"""The public class: a loaded bundle that turns prompts into pictures."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Self, Unpack

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle, Check
from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import ClosedError, EngineError
from latentrt.engines.lora.weight_changes import Changes
from latentrt.engines.open import OpenEngines
from latentrt.engines.workspace.contract import Workspace, WorkspaceShape
from latentrt.runtime.calls import Cancellation, Limits, Stream, finish, limited, tell
from latentrt.runtime.draw.animation import Frame, batches, between, check_keys, frame_draw, frame_rows, frames_between
from latentrt.runtime.draw.draw import BatchSource
from latentrt.runtime.draw.finite import TEXT, finite, one_coloured
from latentrt.runtime.draw.job import Job, latent_shape, ordinary, resolve
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.draw.step import OnStep, Stages
from latentrt.runtime.loaded import Loaded
from latentrt.runtime.opening import needed, one_thread, open_bundle
from latentrt.runtime.request import NOISES, KeyFrame, Options, Request, VideoOptions
from latentrt.runtime.result import Result
from latentrt.runtime.text.encoders import PromptEncoders
from latentrt.runtime.text.textual_inversion import load_embedding
from latentrt.runtime.video.result import VideoResult

logger = logging.getLogger(__name__)


class Pipeline:
    """Draws pictures from a bundle. Safe to use from many threads: calls wait for one another."""

    def __init__(self, bundle: Bundle, opened: OpenEngines, encoders: PromptEncoders) -> None:
        self.bundle = bundle
        self.load_s, self.warm_up_s = opened.load_s, 0.0
        self.loaded = Loaded(bundle, opened, encoders)
        self._closed = False
        self._streams = weakref.WeakSet[Stream]()
        self._worker = one_thread()  # starts with the first await
        self._said: set[str] = set()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        device: int = 0,
        threads: int | None = None,
        cuda_graphs: bool | None = None,
        warm_up: bool = False,
        check: Check = "hash",
        build: bool = False,
        free_text_encoders: bool = False,
        first: Request | None = None,
    ) -> Self:
        """Open a bundle and the engines that were built for this machine.

        backend: `auto` (where a GPU answers the bundle's fastest engines for it, else the CPU's) or a name, which is
            always obeyed
        device: which of the GPUs that CUDA_VISIBLE_DEVICES shows to run on, from 0; pipelines on several of them
            serve side by side in one process. The CPU takes 0 alone
        threads: CPU threads a run may use; None for the backend's own choice
        cuda_graphs: whether a GPU's kernels are recorded and replayed; None and True: they are
        warm_up: draw before the first request comes, see `warm_up`; `warm_up_s` tells how long it took
        check: compare the SHA-256 of every file that is opened, or only its `size` (faster for gigabytes)
        build: where the bundle holds no engines for this machine, build them first, as `latentrt build` does: beside
            the bundle, or in the user's cache where that is read-only. Later loads find them; the log and every
            result's `reason` tell where they are
        free_text_encoders: load them for prompts that are not remembered, and free them before anything is drawn: less
            memory, and their loading time for each such request
        first: what will be drawn first, where that is known: on ONNX Runtime its text is encoded while other networks
            are still being opened
        Raises BundleError (files) and EngineError (backend), each with how to fix it: NotInstalledError where a library
        is missing, WrongMachineError where no such GPU answers or the engines are another machine's, OutOfMemoryError,
        DeviceLostError where CUDA was in use before this process was forked
        """
        bundle = Bundle.open(path)
        opened, encoders = open_bundle(
            bundle,
            first,
            check=check,
            backend=backend,
            device=device,
            components=needed(bundle),
            threads=threads,
            cuda_graphs=cuda_graphs,
            build=build,
            on_demand=bundle.manifest.of_role("text_encoder") if free_text_encoders else (),
        )
        try:
            pipe = cls(bundle, opened, encoders)
        except Exception:
            opened.close()
            raise
        logger.info("loaded '%s' on %s in %.2f s (%s)", bundle.root, pipe.backend, pipe.load_s, opened.choice.reason)
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
            self.draw(request or ordinary(self.manifest))
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
        return self.loaded.opened.choice.backend

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        on_step: OnStep | None = None,
        cancel: Cancellation | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Draw pictures of a prompt. The options are the fields of `Request`; the rest is as `draw` says."""
        return self.draw(Request(prompt=prompt, **options), on_step=on_step, cancel=cancel)

    def draw(self, request: Request, *, on_step: OnStep | None = None, cancel: Cancellation | None = None) -> Result:
        """Draw what a request asks for.

        on_step: called after each stage, on the calling thread; what it raises ends the call
        cancel: what another thread may end the call with, between two stages
        Raises RequestError on what cannot be drawn, and of its kinds DeadlineError where the request's time is over,
        CancelledError where the call was cancelled, and NestedCallError where it comes from `on_step` or from between
        two steps of a stream. Raises EngineError if the backend fails: OutOfMemoryError, ClosedError, and
        NotFiniteError where numbers of a picture left the range of floats. Then none of the call's pictures is given.
        """
        return self._drawn(request, on_step, Limits.of(request, cancel))

    def stream(self, request: Request, *, cancel: Cancellation | None = None) -> Stream:
        """Draw what a request asks for, one stage whenever the next step is asked for.

            with pipe.stream(request) as stream:
                for step in stream:
                    show(step.preview)
            stream.result.images[0].save("picture.png")

        The pipeline's turn is taken with the first step and kept until the stream ends or is closed.
        Raises RequestError at once; the steps raise what `draw` raises.
        """
        stream = Stream(self._call(request, Limits.of(request, cancel), watched=True))
        self._streams.add(stream)
        return stream

    async def draw_async(self, request: Request, *, on_step: OnStep | None = None) -> Result:
        """Draw what a request asks for without blocking the event loop: on one thread of the pipeline's own.

        on_step: as for `draw`, but called on that thread
        Cancelling the task ends the call between two stages. Raises as `draw` does.
        """
        import asyncio

        self.loaded.turn.refuse_nested()
        limits = Limits.of(request, Cancellation())
        try:
            work = self._worker.submit(self._drawn, request, on_step, limits)
        except RuntimeError:
            raise self._closed_error() from None
        drawn = asyncio.wrap_future(work)
        try:
            finished, _ = await asyncio.wait([drawn], timeout=limits.left)
            if not finished and work.cancel():  # it has not begun
                limits.check("while other calls were drawing")
            return await drawn
        except asyncio.CancelledError:
            limits.end()
            drawn.cancel()
            raise

    def _drawn(self, request: Request, on_step: OnStep | None, limits: Limits) -> Result:
        return finish(self._call(request, limits, watched=on_step is not None or limits.any), on_step)

    def _call(self, request: Request, limits: Limits, *, watched: bool) -> Stages[Result]:
        job = resolve(request, self.manifest)
        return self._job(job, lambda: self.loaded.source(job), limits, watched=watched)

    def _job(self, job: Job, source: Callable[[], BatchSource], limits: Limits, *, watched: bool) -> Stages[Result]:
        self._say(self.manifest.schedule.clip_note)
        changes = self.loaded.loras.changes(job.request.loras)
        return self._alone(limits, changes, lambda: self._draw(job, source(), watched=watched))

    def video(
        self,
        prompt: str | Mapping[int, str] | None = None,
        frames: int | None = None,
        *,
        on_step: OnStep | None = None,
        cancel: Cancellation | None = None,
        **options: Unpack[VideoOptions],
    ) -> VideoResult:
        """Draw a video, where the bundle has a motion adapter or makes videos of an image.

        The options are the fields of `VideoRequest`, and those of `Request` that it says, by name. A step's arrays have
        a row for each frame. Raises as `draw` does.
        """
        from latentrt.runtime.video.draw import as_video  # for bundles that can
        from latentrt.runtime.video.request import VideoRequest
        from latentrt.runtime.video.resolve import resolve_video, video_source

        video = resolve_video(VideoRequest.of(prompt, frames, options), self.manifest)
        limits = Limits.of(video.job.request, cancel)
        watched = on_step is not None or limits.any
        stages = self._job(video.job, lambda: video_source(self.loaded, video), limits, watched=watched)
        return as_video(finish(stages, on_step), video)

    def _say(self, note: str | None) -> None:
        """Log a warning that holds for every picture, once."""
        if note is not None and note not in self._said:
            self._said.add(note)
            logger.warning("%s", note)

    def animate(
        self,
        keys: Sequence[KeyFrame],
        frames: int,
        *,
        batch: int = 4,
        loop: bool = False,
        on_step: OnStep | None = None,
        cancel: Cancellation | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Result]:
        """Draw an animation from key frame to key frame; give its frames in order, a batch of them at a time.

        keys: what to go through; text is mixed on a line and noise on an arc, see `animation`
        batch: how many frames are drawn at once; every batch is full but the last, which engines that were compiled
            for full ones alone draw as a full one, and the surplus is dropped
        loop: go on from the last key frame to the first
        options: of every frame, as in a call; keys bring prompt, negative prompt and seed. A deadline is each batch's
        Raises RequestError at once, before a frame is drawn, and EngineError if the engines were compiled for other
        shapes; each batch raises what `draw` raises.
        """
        keys, parts = check_keys(keys), batches(frames_between(len(keys), frames, loop=loop), batch)
        if len(parts) > 1:
            self._check_frames(keys, parts[0], options)
        last, job = self._fit_frames(keys, parts[-1], batch, options)
        Limits.of(job.request, cancel)
        changes = self.loaded.loras.changes(job.request.loras)

        def drawn() -> Iterator[Result]:
            for part, fitted in zip(parts, [*parts[:-1], last], strict=True):
                request = between(keys, fitted, options)
                limits = Limits.of(request, cancel)
                job = resolve(request, self.manifest)
                watched = on_step is not None or limits.any
                draw = partial(self._draw_between, job, keys, fitted, count=len(part), watched=watched)
                yield finish(self._alone(limits, changes, draw), on_step)

        return drawn()

    def _fit_frames(
        self, keys: Sequence[KeyFrame], frames: tuple[Frame, ...], batch: int, options: Options
    ) -> tuple[tuple[Frame, ...], Job]:
        """Return a batch of frames, filled up with the last one if the engines take only full batches, and its job."""
        try:
            return frames, self._check_frames(keys, frames, options)
        except EngineError:
            if len(frames) == batch:
                raise
        return self._fit_frames(keys, (*frames, *[frames[-1]] * (batch - len(frames))), batch, options)

    def _check_frames(self, keys: Sequence[KeyFrame], frames: Sequence[Frame], options: Options) -> Job:
        """Return the job of a batch of frames. Raises what can be refused before it is drawn."""
        job = resolve(between(keys, frames, options), self.manifest)
        texts = [text for side in job.read_keys(keys) for text in side]
        (width, height), pictures = job.size, len(frames)
        for part in job.ranges:
            tokens = self.loaded.encoders.tokens(texts, denoiser=part.denoiser)
            shape = WorkspaceShape(pictures=pictures, tokens=tokens, width=width, height=height)
            self.loaded.opened.require(shape)
        return job

    def _alone(
        self, limits: Limits, changes: Mapping[str, Changes], draw: Callable[[], Stages[Result]]
    ) -> Stages[Result]:
        """Draw when it is this call's turn, with the weights that it asks for, within its limits."""
        self.loaded.turn.take(limits)
        waited = limits.spent
        try:
            if self._closed:
                raise self._closed_error()
            adapt_s = self.loaded.adapt(changes)
            limits.check("before the first stage")
            result = yield from limited(draw(), limits, self.loaded.turn)
        finally:
            self.loaded.turn.give_back()
        tell(result, limits, waited=waited)
        seconds = {"adapt": adapt_s, **result.seconds, "total": adapt_s + result.seconds["total"]}
        return msgspec.structs.replace(result, seconds=seconds)

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the pipeline on '{self.bundle.root}' is closed; load it again")

    def _draw_between(
        self, job: Job, keys: Sequence[KeyFrame], frames: Sequence[Frame], *, count: int, watched: bool
    ) -> Stages[Result]:
        """Draw frames that lie between key frames; give the first `count` of them."""
        start = time.perf_counter()
        prompts, further = job.read_keys(keys)
        texts = {part.denoiser: self.loaded.read(prompts, further, denoiser=part.denoiser) for part in job.ranges}
        parts = [slice(start, start + len(keys)) for start in range(0, job.guidance.most * len(keys), len(keys))]

        def write(workspace: Workspace, denoiser: str, slots: slice) -> None:
            for name, array in texts[denoiser].items():
                rows = np.concatenate([frame_rows(array[part], frames) for part in parts])
                write_rows(workspace, name, finite(rows, TEXT, pictures=len(frames)), slots)
            for name, array in self.loaded.encode_images(job, denoiser).items():
                write_rows(workspace, name, array, slots)

        shape = latent_shape(job.size, self.manifest.latents)
        draw = frame_draw([key.seed for key in keys], frames, shape, stream=NOISES[job.request.noise])
        tokens = {denoiser: arrays["encoder_hidden_states"].shape[1] for denoiser, arrays in texts.items()}
        source = BatchSource(tokens=tokens, tokenize_s=time.perf_counter() - start, write=write, draw=draw)
        return (yield from self._draw(job, source, count=count, watched=watched))

    def _draw(self, job: Job, source: BatchSource, *, count: int | None = None, watched: bool) -> Stages[Result]:
        """Draw a job and say what it was drawn with. count: give only its first pictures, None for all"""
        start = time.perf_counter()
        drawn = yield from self.loaded.drawing(job, source, watched=watched)
        stages = {"encode": drawn.encode_s, "denoise": sum(drawn.step_seconds), "decode": drawn.decode_s}
        total = source.tokenize_s + time.perf_counter() - start
        return Result(
            pixels=drawn.pixels[:count],
            seeds=job.seeds[:count],
            settings=tuple(self.loaded.settings(job, i) for i in range(len(job.prompts)))[:count],
            seconds={"tokenize": source.tokenize_s, **stages, "total": total},
            step_seconds=drawn.step_seconds,
            warnings=one_coloured(drawn.pixels[:count]),
            backend=self.loaded.opened.choice.backend,
            reason=self.loaded.opened.choice.reason,
        )

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Return the learned words (textual inversion) that prompts may use."""
        return self.loaded.encoders.embeddings

    def add_embedding(self, file: str | os.PathLike[str], *, name: str | None = None) -> str:
        """Let prompts use a learned word from a safetensors file; return the word. Raises RequestError."""
        embedding = load_embedding(file, name=name)
        with self.loaded.turn.hold():
            self.loaded.encoders.add(embedding)
        return embedding.name

    def remove_embedding(self, name: str) -> None:
        """Make a learned word plain text again. Raises RequestError if there is no such word."""
        with self.loaded.turn.hold():
            self.loaded.encoders.remove(name)

    def close(self) -> None:
        """Free the engines. Another thread's call ends first; a stream that this thread has not finished is closed.

        In a process that was forked while another thread drew, nothing is freed. Raises NestedCallError in `on_step`.
        """
        for one in list(self._streams) if self.loaded.turn.mine else ():
            one.leave()
        with suppress(ClosedError), self.loaded.turn.hold():
            self._closed = True
            self._worker.shutdown(wait=False)
            self.loaded.opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
