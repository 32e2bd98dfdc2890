"""The denoising loop: it takes pictures through their plans on a workspace and knows nothing of samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.errors import EngineError, NotFiniteError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import SCALE, hint_of
from latentrt.engines.workspace.contract import (
    CONTROL,
    GUIDANCE,
    NOISE,
    OWNERS,
    STATE,
    Workspace,
    own_buffer,
    sums_of_squares,
)
from latentrt.runtime.draw.controls import Features, ResolvedControl, strengths_at
from latentrt.runtime.draw.finite import LATENTS
from latentrt.runtime.draw.slots import write_rows
from latentrt.runtime.sampling.guidance import GROUPS, Guidance, guidance_rows
from latentrt.runtime.sampling.plan import SamplingPlan

if TYPE_CHECKING:
    import numpy.typing as npt


class Batch(msgspec.Struct, kw_only=True, eq=False):
    """Pictures that go through one plan together, each in a slot of its own.

    slots: where their text and state are when they join, (n)
    draw: called at the stages in which the sampler draws, returns unit normals, (n, C, h, w)
    controls: the ControlNets that are followed, whose pixels are in the slots
    features: what T2I-Adapters add from stage to stage
    stages: which of the plan's to take; the state is that before the first of them
    taken: how many of these are done
    shares: what each row of a group says of its picture, of those rows that are its pictures': (rows,); None for all
    """

    plan: SamplingPlan
    guidance: Guidance
    draw: Callable[[], Array]
    slots: slice
    stages: range
    controls: Sequence[ResolvedControl] = ()
    features: Features | None = None
    taken: int = 0
    shares: Array | None = None

    @property
    def done(self) -> int:
        """Return how many of the plan's stages are done, skipped ones included: the number of the next."""
        return self.stages.start + self.taken

    @property
    def running(self) -> bool:
        """Tell whether there is a stage left."""
        return self.done < self.stages.stop


class Course(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the stages of a batch take, known before the first of them.

    controls: the numbers of each, see `pack_controls`; groups: of model rows at each, see `Guidance`
    draws: whether the sampler draws at each, as diffusers does; uses: whether that has a weight
    """

    controls: Array
    groups: Sequence[int]
    draws: Sequence[bool]
    uses: Sequence[bool]


def course_of(batch: Batch, state_rows: int) -> Course:
    """Return the course of a batch on a workspace. Raises EngineError if its plan has more rows of state."""
    plan, groups = batch.plan, batch.guidance.groups
    return Course(
        controls=pack_controls(plan, state_rows, rescale=np.where(groups > 1, batch.guidance.rescale, 0.0)),
        groups=groups.tolist(),
        draws=plan.draws_noise.tolist(),
        uses=plan.uses_noise.tolist(),
    )


class Loop:
    """Takes all pictures on a workspace from stage to stage, each by its own plan: they join and leave in between."""

    def __init__(self, workspace: Workspace, denoiser: str) -> None:
        self._workspace, self._denoiser = workspace, denoiser
        self.batches: list[Batch] = []
        self.rows = 0  # that the last stage computed
        self._courses: dict[Batch, Course] = {}
        self._control = np.tile(rest(workspace.state_rows), (workspace.shape.pictures, 1))
        self._shared: tuple[tuple[Batch, int], ...] | None = None  # who took the last stage, with how many groups
        self._rows = slice(0, 0)  # of that stage, padded ones included
        self._slots = workspace.shape.slot_of_row  # of one group
        self._sums: Array | None = None  # of the squares of each picture's latents, once somebody asks
        self._scales: dict[str, Array] = {}  # of ControlNets, as they were written last
        self._blank: set[tuple[str, Batch]] = set()  # who shares stages with a ControlNet that it does not follow

    def join(self, batch: Batch) -> None:
        """Let pictures take part from the next stage on. Raises EngineError if a slot is taken, or not there."""
        taken = {slot for other in self.batches for slot in range(other.slots.start, other.slots.stop)}
        slots = range(batch.slots.start, batch.slots.stop)
        if (
            taken & set(slots)
            or slots.stop > self._workspace.shape.pictures
            or len(batch.guidance.scales) != len(slots)
        ):
            raise EngineError(
                f"slots: found {slots.start} to {slots.stop} for {len(batch.guidance.scales)} pictures, expected free "
                f"ones below {self._workspace.shape.pictures}"
            )
        self._courses[batch] = course_of(batch, self._workspace.state_rows)
        self.batches.append(batch)

    def leave(self, batch: Batch) -> None:
        """Free the slots of pictures, finished or not; nothing of them is left to meet those that come next."""
        self.batches.remove(batch)
        del self._courses[batch]
        self._blank = {one for one in self._blank if one[1] is not batch}
        for name, number in (("keep_mask", 1.0), ("known", 0.0), (STATE, 0.0)):
            self._workspace.write(name, number, batch.slots)

    def advance(self) -> None:
        """Take one stage of every picture that has one left. What is not finite is told by `lost`."""
        batches = [batch for batch in self.batches if batch.running]
        for batch in batches:
            for name, array in (
                batch.features.at(batch.done, since=batch.stages.start).items() if batch.features else ()
            ):
                write_rows(self._workspace, name, array, batch.slots)
        self._write_stage(batches)
        for component, strengths in self._strengths(batches).items():
            self._show_nothing(component, batches)
            self._follow(component, np.resize(strengths[self._slots], self._rows.stop), self._rows)
        self._workspace.run(self._denoiser, self._rows)
        self._sums = None
        for batch in batches:
            batch.taken += 1

    def _write_stage(self, batches: Sequence[Batch]) -> None:
        """Write what changes from stage to stage, and who shares this one where that is not who shared the last."""
        courses = [(batch, batch.done, self._courses[batch]) for batch in batches]
        sharing = tuple((batch, course.groups[stage]) for batch, stage, course in courses)
        if sharing != self._shared:
            self._share(sharing)
        noises = list[tuple[slice, Array]]()
        for batch, stage, course in courses:
            self._control[batch.slots] = course.controls[stage]
            noise = batch.draw() if course.draws[stage] else None
            if noise is not None and course.uses[stage]:
                noises.append((batch.slots, noise))
        self._workspace.write(CONTROL, self._control)
        if noises:
            self._workspace.write(NOISE, _spread(noises, self._workspace.shape.pictures))

    def _share(self, sharing: tuple[tuple[Batch, int], ...]) -> None:
        """Write the weights of the model rows for those that take the next stages; the other slots rest."""
        workspace, shape, slots = self._workspace, self._workspace.shape, self._slots
        weights = np.zeros((GROUPS, shape.pictures), dtype=np.float32)
        shares = np.ones(len(slots), dtype=np.float32)
        for batch, groups in sharing:
            weights[:, batch.slots] = batch.guidance.weights(groups)
            if batch.shares is not None:
                shares[(slots >= batch.slots.start) & (slots < batch.slots.stop)] = batch.shares
        windows = -(-int(np.flatnonzero(weights[:, slots]).max(initial=-1) + 1) // shape.frames)
        rows = workspace.fit(self._denoiser, max(len(slots), windows * shape.frames))
        matrix, owners = guidance_rows(weights, rows, slots=slots, shares=shares)
        workspace.write(GUIDANCE, matrix)
        workspace.write(OWNERS, owners)
        self._control[:] = rest(workspace.state_rows)
        self.rows = int(np.count_nonzero(matrix)) if workspace.local else rows
        self._shared, self._rows = sharing, slice(0, rows)

    def _show_nothing(self, component: str, batches: Sequence[Batch]) -> None:
        """Give a ControlNet zeros for the pictures that do not follow it; what it adds to them is nothing."""
        for batch in batches:
            if (component, batch) in self._blank or component in [one.component for one in batch.controls]:
                continue
            self._workspace.write(hint_of(component), 0.0, batch.slots)
            self._blank.add((component, batch))

    def _follow(self, component: str, scales: Array, rows: slice) -> None:
        """Run a ControlNet. How strongly rows follow it is written where that changed: mostly once a picture."""
        if not np.array_equal(self._scales.get(component, scales[:0])[: rows.stop], scales):
            self._workspace.write(own_buffer(component, SCALE), scales, rows)
            self._scales[component] = scales
        self._workspace.run(component, rows)

    def _strengths(self, batches: Sequence[Batch]) -> dict[str, Array]:
        """Return the ControlNets that run at the next stage, and how strongly each slot follows them: (P,) float32."""
        found: dict[str, Array] = {}
        for batch in batches:
            for component, strength in strengths_at(batch.controls, batch.done).items():
                zeros = np.zeros(self._workspace.shape.pictures, dtype=np.float32)
                found.setdefault(component, zeros)[batch.slots] = strength
        return found

    def lost(self, batch: Batch) -> tuple[int, ...]:
        """Return which of the pictures are known to be lost: a device knows of none before the end."""
        if not self._workspace.local:
            return ()
        if self._sums is None:
            self._sums = sums_of_squares(self._workspace.read(STATE)[:, 0])
        sums = self._sums[batch.slots]
        return () if np.isfinite(sums).all() else tuple(np.flatnonzero(~np.isfinite(sums)).tolist())


def _spread(noises: Sequence[tuple[slice, Array]], slots: int) -> Array:
    """Return the noise of every slot, (slots, C, h, w), zeros where nothing was drawn."""
    if len(noises) == 1 and len(noises[0][1]) == slots:
        return noises[0][1]
    spread = np.zeros((slots, *noises[0][1].shape[1:]), dtype=np.float32)
    for place, noise in noises:
        spread[place] = noise
    return spread


def stages_of(loop: Loop, batch: Batch) -> Iterator[int]:
    """Advance a loop until a batch is done; yield after each stage how many of its are. Raises NotFiniteError."""
    while batch.running:
        loop.advance()
        if lost := loop.lost(batch):
            raise NotFiniteError(LATENTS, lost, stage=batch.done, stages=batch.plan.stages)
        yield batch.done


def begin(plan: SamplingPlan, noise: Array, *, state_rows: int, image: Array | None = None) -> Array:
    """Return the state before the first stage: (n, R, C, h, w), float32.

    noise: (n, C, h, w), unit normal; image: the same shape, clean latents to start from instead of noise alone
    """
    state = np.zeros((len(noise), state_rows, *noise.shape[1:]), dtype=np.float32)
    state[:, 0] = plan.initial_scale * noise if image is None else blend(plan.levels[0], image, noise)
    return state


def blend(level: Array, image: Array, noise: Array) -> Array:
    """Return the image at a noise level, one of `plan.levels`: the shape of the image, float32."""
    return np.asarray(level[0] * image + level[1] * noise, dtype=np.float32)


def rest(state_rows: int) -> Array:
    """Return what controls a slot that takes no part in a stage: its state stays. (control_width(R),), float32"""
    head, row = [0, 0, 1, 0], np.zeros(state_rows)
    return np.concatenate([head, row, np.eye(state_rows, state_rows + 2).reshape(-1)], dtype=np.float32)


def pack_controls(plan: SamplingPlan, state_rows: int, *, rescale: npt.ArrayLike = 0.0) -> Array:
    """Return what controls each stage of one picture: (K, control_width(R)), float32, with R = state_rows.

    In the order that `engines.stage.control_width` gives. A plan with fewer rows of state than the graph leaves the
    others zero. rescale is guidance's, 0 to 1, one or (K,). Raises EngineError if the plan has more rows.
    """
    if plan.rows > state_rows:
        raise EngineError(
            f"{plan.sampler} keeps {plan.rows} rows of state and this engine was built for {state_rows}; "
            "build it again with a larger --state-rows"
        )
    stages, rows = plan.stages, plan.rows
    head = np.column_stack([plan.timesteps, np.broadcast_to(rescale, stages), plan.levels[1:]])
    row = np.zeros((stages, state_rows))
    row[:, :rows] = plan.input_rows
    transition = np.zeros((stages, state_rows, state_rows + 2))
    transition[:, :rows, :rows] = plan.transitions[:, :, :rows]
    transition[:, :rows, state_rows:] = plan.transitions[:, :, rows:]
    return np.concatenate([head, row, transition.reshape(stages, -1)], axis=1, dtype=np.float32)
