"""One job drawn: its text, stages and pixels on the workspaces of opened engines."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.errors import BundleError, NotFiniteError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import hint_of
from latentrt.engines.workspace.contract import STATE, Event, Workspace, WorkspaceShape
from latentrt.runtime.draw.advice import explain
from latentrt.runtime.draw.animation import vary
from latentrt.runtime.draw.conditioning import conditions
from latentrt.runtime.draw.controls import Features, feature_shapes
from latentrt.runtime.draw.decode import decode_in_place, on_workspace, takes_frames, through_engine
from latentrt.runtime.draw.denoise import Batch, Loop, stages_of
from latentrt.runtime.draw.finite import HINTED, LATENTS, START, finite
from latentrt.runtime.draw.job import Job, latent_shape, repaints
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.draw.start import Start, check_latents, hint_latents, start_from_image, start_inpainting
from latentrt.runtime.draw.step import Look, Noise, Stages, Step
from latentrt.runtime.images.tiling import Tiling, decode_tiles, encode_tiles
from latentrt.runtime.request import NO_TINY, NOISES, NoiseSource
from latentrt.runtime.sampling.plan import DenoiserRange

if TYPE_CHECKING:
    from latentrt.engines.open import OpenEngines

MOST = 16  # images that are encoded at once: a video's are many
AHEAD = 1  # stages in the queue while a caller watches each: enough that a device never waits for the host


Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""runs a component of the bundle on its inputs"""


class BatchSource(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Where a batch's text and noise come from.

    tokens: the length of the text for a denoiser; tokenize_s: what reading it took
    write: puts it on a workspace, as a denoiser takes it, for the pictures in some slots
    draw: gives the next unit normals of every picture's own stream, (n, C, h, w)
    """

    tokens: Mapping[str, int]
    tokenize_s: float
    write: Callable[[Workspace, str, slice], None]
    draw: Callable[[], Array]


class Drawn(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The pictures, (n, height, width, 3), uint8, and the seconds that was where the engines run."""

    pixels: Array
    encode_s: float
    step_seconds: tuple[float, ...]
    decode_s: float


class Drawing:
    """Draws jobs on the workspaces of opened engines, one at a time."""

    def __init__(self, opened: OpenEngines, manifest: Manifest) -> None:
        self._opened, self._manifest = opened, manifest
        self._decoding = threading.Lock()  # what decodes beside the workspaces does so one call at a time

    def __call__(self, job: Job, source: BatchSource, *, watched: bool) -> Stages[Drawn]:
        """Draw a job, whose text and noise come from a source; a generator that returns what was drawn.

        watched: it yields after each stage, and the queue is kept short; else it runs through
        Raises NotFiniteError with its likely causes. Closing it ends the call where it is.
        """
        with self.explaining(job):
            return (yield from self._draw(job, source, watched=watched))

    @contextmanager
    def explaining(self, job: Job) -> Iterator[None]:
        """Tell of numbers that are not finite with their likely causes."""
        try:
            yield
        except NotFiniteError as error:
            raise explain(error, job, self._opened.key.precision) from None

    def _draw(self, job: Job, source: BatchSource, *, watched: bool) -> Stages[Drawn]:
        last = job.ranges[-1].denoiser
        decode = self._decoder(job, last, tokens=source.tokens[last])
        workspace, encode, steps, events = yield from self._denoise(job, source, watched=watched)
        pixels = decode(workspace, events)
        further, *own, decode_s = _seconds(events)
        return Drawn(pixels=pixels, encode_s=encode + further, step_seconds=(*steps, *own), decode_s=decode_s)

    def _decoder(self, job: Job, denoiser: str, *, tokens: int) -> Callable[[Workspace, list[Event]], Array]:
        """Return what decodes a workspace and notes when that was done: at once, or in tiles.

        The tiles' workspace is asked for before anything is drawn: where no engine fits it, the error comes early.
        """
        tiling, factor = job.tiling, self._manifest.latents.factor
        if job.chunk is not None:
            return partial(self._in_chunks, job, tokens=tokens)
        if tiling is None:
            slots = slice(0, len(job.prompts))
            some = (self._together(job, job.decoder) or 1) if job.windows else None
            return partial(decode_in_place, decoder=job.decoder, slots=slots, some=some)
        size = self._decoded_size(job)
        tile = on_workspace(self._workspace(job, denoiser, size, tokens=tokens, decoder=job.decoder), job.decoder)

        def decode(workspace: Workspace, events: list[Event]) -> Array:
            pixels = decode_tiles(_latents_of(job, workspace.read(STATE), job.plan.stages), tile, tiling, factor=factor)
            events.append(workspace.event())
            return pixels

        return decode

    def _in_chunks(self, job: Job, workspace: Workspace, events: list[Event], *, tokens: int) -> Array:
        """Decode some frames of a video at a time, and note when that was done; return the pixels."""
        assert job.chunk is not None
        latents, frames = _latents_of(job, workspace.read(STATE), job.plan.stages), len(job.windows[0])
        videos = np.split(latents[: len(job.prompts)], len(job.prompts) // frames)
        parts = [part for one in videos for part in np.split(one, list(range(0, frames, job.chunk))[1:])]
        pixels = [self.decode(job, job.decoder, part, tokens=tokens) for part in parts]
        events.append(workspace.event())
        return np.concatenate(pixels)

    def _together(self, job: Job, decoder: str) -> int | None:
        """Return how many frames of a video a decoder sees at once; None for one that sees each alone."""
        temporal = takes_frames(self._manifest.components[decoder].inputs)
        return len(job.windows[0]) if temporal and job.windows else None

    def _decoded_size(self, job: Job) -> tuple[int, int]:
        """Return the (width, height) in pixels that a decoder is given at once: the picture's, or a tile's."""
        tiling, factor = job.tiling, self._manifest.latents.factor
        return job.size if tiling is None else (tiling.columns.tile * factor, tiling.rows.tile * factor)

    def _sketch(self, job: Job, tokens: int, latents: Array) -> Array:
        """Return what latents show by the tiny decoder: (n, height, width, 3), uint8. Raises BundleError."""
        tiny = self._manifest.find("tiny_decoder")
        if tiny is None:
            raise BundleError(NO_TINY)
        return self.decode(job, tiny, latents, tokens=tokens)

    def decode(self, job: Job, decoder: str, latents: Array, *, tokens: int) -> Array:
        """Return what latents show by a decoder that runs beside any workspace: (n, height, width, 3), uint8.

        Raises NotFiniteError.
        """
        space, (width, height) = self._manifest.latents, self._decoded_size(job)
        asked = WorkspaceShape(pictures=len(latents), tokens=tokens, width=width, height=height, windows=job.windows)
        if job.windows and len(latents) != len(job.prompts):  # a part of a video
            asked = msgspec.structs.replace(asked, windows=(tuple(range(len(latents))),))
        shape = self.fitting(asked)
        with self._decoding:
            decode = through_engine(self._opened.engine(decoder, shape), space, slots=shape.pictures)
            tiling = job.tiling
            return decode(latents) if tiling is None else decode_tiles(latents, decode, tiling, factor=space.factor)

    def fitting(self, shape: WorkspaceShape) -> WorkspaceShape:
        """Return a shape with as many slots as engines are compiled for, as few as hold its pictures.

        Raises EngineError.
        """
        slots = (self._opened.slot_counts(shape) or (shape.pictures,))[-1]
        return msgspec.structs.replace(shape, pictures=max(slots, shape.pictures))

    def _workspace(
        self, job: Job, denoiser: str, size: tuple[int, int], *, tokens: int, decoder: str | None
    ) -> Workspace:
        width, height = size
        shape = WorkspaceShape(
            pictures=len(job.prompts), tokens=tokens, width=width, height=height, windows=job.windows
        )
        rows = job.plan.rows
        return self._opened.workspace(
            self._manifest.latents, shape, state_rows=rows, denoiser=denoiser, decoder=decoder
        )

    def _denoise(
        self, job: Job, source: BatchSource, *, watched: bool
    ) -> Stages[tuple[Workspace, float, list[float], list[Event]]]:
        """Take every stage of the plan, each range on a workspace of its denoiser.

        Returns the last workspace, what the ranges before took to encode and for each stage, and the last
        range's events: before its text was written, after that, and after each stage.
        """
        encode, steps, draw = 0.0, list[float](), Noise(source.draw)
        whole = job.decoder if job.tiling is None else None
        inputs: dict[str, Array] | None = None
        slots = slice(0, len(job.prompts))
        for part in job.ranges:
            decoder = whole if part is job.ranges[-1] else None
            tokens = source.tokens[part.denoiser]
            workspace = self._workspace(job, part.denoiser, job.size, tokens=tokens, decoder=decoder)
            events = [workspace.event()]
            source.write(workspace, part.denoiser, slots)
            events.append(workspace.event())
            if inputs is None:
                inputs = self.begin(job, draw, workspace.shape, state_rows=workspace.state_rows)
            yield from self._advance(job, part, inputs, workspace, draw, events, watched=watched)
            if part is not job.ranges[-1]:  # read before the next workspace, which may take this one's place
                inputs[STATE] = workspace.read(STATE)
                _latents_of(job, inputs[STATE], part.stages.stop)
                first, *own = _seconds(events)
                encode, steps = encode + first, steps + own
        return workspace, encode, steps, events

    def begin(self, job: Job, draw: Callable[[], Array], shape: WorkspaceShape, *, state_rows: int) -> dict[str, Array]:
        """Return what to write to a workspace of a shape before the first stage.

        Raises RequestError and NotFiniteError.
        """
        run = partial(self._run, shape)
        start = self._start(job, draw, run)
        if job.variations:
            size = latent_shape(job.size, self._manifest.latents)
            other = stream(job.request.noise, job.variations, size)()
            varied = vary(start.noise, other, job.request.variation_strength)
            start = msgspec.structs.replace(start, noise=varied)
        written = start.inputs(job.plan, state_rows=state_rows)
        checked = {name: finite(array, START, pictures=len(job.prompts)) for name, array in written.items()}
        return checked | self._hints(job, run)

    def _hints(self, job: Job, run: Run) -> dict[str, Array]:
        """Return what the ControlNets of a job follow, by buffer: pixels, or the latents that are made of them here."""
        encoder, space = partial(self._encode_image, run, tiling=job.tiling), self._manifest.latents
        found = {}
        for one in job.controls:
            if one.role == "controlnet":
                hint = one.pixels
                if self._manifest.components[one.component].follows_latents:
                    hint = finite(hint_latents(hint, encoder, space=space), HINTED, pictures=len(job.prompts))
                found[hint_of(one.component)] = hint
        return found

    def _advance(
        self,
        job: Job,
        part: DenoiserRange,
        inputs: Mapping[str, Array],
        workspace: Workspace,
        draw: Noise,
        events: list[Event],
        *,
        watched: bool,
    ) -> Stages[None]:
        """Take the stages of one range, from the inputs (the state and what goes with it); note the end of each."""
        loop = Loop(workspace, part.denoiser)
        batch = self.seat(job, part, inputs, workspace, draw, slots=slice(0, len(job.prompts)))
        loop.join(batch)
        for _ in stages_of(loop, batch):
            events.append(workspace.event())
            if watched:
                events[-1 - AHEAD].wait()
                with self.step(job, batch, workspace, draw, keeps="known" in inputs) as step:
                    yield step

    def seat(
        self,
        job: Job,
        part: DenoiserRange,
        inputs: Mapping[str, Array],
        workspace: Workspace,
        draw: Noise,
        *,
        slots: slice,
    ) -> Batch:
        """Write to some slots all that the pictures of a job have beside their text; return what is to join a loop.

        inputs: the state before the first stage of the range, and what goes with it
        """
        controls = [one for one in job.controls if one.of == part.denoiser]  # it is made for that one alone
        others = {hint_of(one.component) for one in job.controls} - {hint_of(one.component) for one in controls}
        for name, array in conditions(self._manifest, job, rows=job.rows, denoiser=part.denoiser).items():
            write_rows(workspace, name, array, slots)
        for name, array in inputs.items():
            if name not in others:
                workspace.write(name, array, slots)
        shapes = feature_shapes(self._manifest, part.denoiser, size=job.size, rows=job.rows)
        return Batch(
            plan=job.plan,
            guidance=job.guidance,
            draw=draw,
            slots=slots,
            stages=part.stages,
            controls=controls,
            features=Features(controls, shapes, partial(self._run, workspace.shape)),
            shares=job.shares,
        )

    @contextmanager
    def step(self, job: Job, batch: Batch, workspace: Workspace, draw: Noise, *, keeps: bool) -> Iterator[Step]:
        """Show the stage that is done, until the next one begins. keeps: a mask keeps a part"""
        look = self._look(job, workspace, batch)
        try:
            yield Step(
                stage=batch.done,
                stages=job.plan.stages,
                _look=look,
                _plan=job.plan,
                _manifest=self._manifest,
                _noise=draw.last,
                _keeps=keeps,
            )
        finally:
            look.end()

    def _look(self, job: Job, workspace: Workspace, batch: Batch) -> Look:
        """Return what a caller may look at after a stage, until the next one begins."""
        stage, tokens = batch.done, workspace.shape.tokens

        def read(name: str) -> Array:
            array = workspace.read(name, batch.slots)
            if name == STATE:
                with self.explaining(job):
                    _latents_of(job, array, stage)
            return array

        def sketch(latents: Array) -> Array:
            with self.explaining(job):
                return self._sketch(job, tokens, latents)

        return Look(read, sketch, f"stage {stage} of {job.plan.stages}")

    def _start(self, job: Job, draw: Callable[[], Array], run: Run) -> Start:
        space, latents = self._manifest.latents, job.request.latents
        shape, encoder = latent_shape(job.size, space), partial(self._encode_image, run, tiling=job.tiling)
        given = None if latents is None else check_latents(latents, pictures=len(job.prompts), shape=shape)
        if job.pixels is None:
            return Start(noise=draw() if given is None else given)
        if job.mask is None:
            start = start_from_image(job.pixels, encoder, draw, space=space)
        else:
            start = start_inpainting(
                job.pixels,
                job.mask,
                encoder,
                draw,
                space=space,
                strength=job.strength,
                inpainting_model=repaints(self._manifest),
            )
        return start if given is None else msgspec.structs.replace(start, noise=given)

    def _encode_image(self, run: Run, pixels: Array, *, tiling: Tiling | None) -> Array:
        if tiling is not None:
            encoder = partial(self._encode_image, run, tiling=None)
            return encode_tiles(pixels, encoder, tiling, factor=self._manifest.latents.factor)
        (component,) = self._manifest.of_role("encoder")
        some = [run(component, {"sample": pixels[first : first + MOST]}) for first in range(0, len(pixels), MOST)]
        return np.concatenate([one["latent_parameters"] for one in some])

    def encode(self, job: Job, near: WorkspaceShape, pixels: Array) -> Array:
        """Return the distributions of the latents of images, see `start.Encoder`. near: of the workspace beside it"""
        return self._encode_image(partial(self._run, near), pixels, tiling=job.tiling)

    def _run(self, near: WorkspaceShape, component: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a network on pictures that belong to those of a workspace, which may have another size.

        It is opened when the first image comes: most services draw from text alone.
        """
        height, width = next(iter(inputs.values())).shape[-2:]
        return self._opened.engine(component, msgspec.structs.replace(near, width=width, height=height))(inputs)


def _seconds(events: Sequence[Event]) -> list[float]:
    """Return the seconds from each event to the next one."""
    events[-1].wait()  # a device is waited for once
    return [later.since(earlier) for earlier, later in itertools.pairwise(events)]


def _latents_of(job: Job, state: Array, stage: int) -> Array:
    """Return the latents of a state after a stage, (n, C, h, w). Raises NotFiniteError."""
    return finite(state[:, 0], LATENTS, pictures=len(job.prompts), stage=stage, stages=job.plan.stages)


def stream(source: NoiseSource, seeds: Sequence[int], shape: tuple[int, int, int]) -> Callable[[], Array]:
    """Return what draws the next unit normals of each seed's own stream: (n, *shape), float32."""
    generators = [NOISES[source](seed) for seed in seeds]
    return lambda: np.stack([generator.normal(shape) for generator in generators])
