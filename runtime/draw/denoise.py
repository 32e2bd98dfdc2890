"""The denoising loop: it takes pictures through their plans on a workspace and knows nothing of samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
from latentrt.runtime.sampling.guidance import Guidance, guidance_rows
from latentrt.runtime.sampling.plan import SamplingPlan


class Batch(msgspec.Struct, kw_only=True, eq=False):
    """Pictures that go through one plan together, each in a slot of its own.

    slots: where their text and state are when they join, (n)
    draw: called at the stages in which the sampler draws, returns unit normals, (n, C, h, w)
    controls: the ControlNets that are followed, whose pixels are in the slots
    features: what T2I-Adapters add from stage to stage
    stages: which of the plan's to take; the state is that before the first of them
    taken: how many of these are done
    """

    plan: SamplingPlan
    guidance: Guidance
    draw: Callable[[], Array]
    slots: slice
    stages: range
    controls: Sequence[ResolvedControl] = ()
    features: Features | None = None
    taken: int = 0

    @property
    def done(self) -> int:
        """Return how many of the plan's stages are done, skipped ones included: the number of the next."""
        return self.stages.start + self.taken

    @property
    def running(self) -> bool:
        """Tell whether there is a stage left."""
        return self.done < self.stages.stop

    def weights(self) -> tuple[Array, Array]:
        """Return the weights of the prompts and of the negative prompts in the next stage, (n,) each."""
        scales = self.guidance.scales if self.guidance.stages[self.done] else np.ones_like(self.guidance.scales)
        return scales, 1 - scales

    def control(self, state_rows: int) -> Array:
        """Return the numbers of the next stage, see `pack_control`."""
        rescale = self.guidance.rescale if self.guidance.stages[self.done] else 0.0
        return pack_control(self.plan, self.done, state_rows, rescale=rescale)

    def noise(self) -> Array | None:
        """Draw for the next stage, where diffusers draws; None if that weighs nothing."""
        drawn = self.draw() if self.plan.draws_noise[self.done] else None
        return drawn if self.plan.uses_noise[self.done] else None


class Loop:
    """Takes all pictures on a workspace from stage to stage, each by its own plan: they join and leave in between."""

    def __init__(self, workspace: Workspace, denoiser: str) -> None:
        self._workspace, self._denoiser = workspace, denoiser
        self.batches: list[Batch] = []
        self.rows = 0  # that the last stage computed
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
        self.batches.append(batch)

    def leave(self, batch: Batch) -> None:
        """Free the slots of pictures, finished or not; nothing of them is left to meet those that come next."""
        self.batches.remove(batch)
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
        rows = self._write_stage(batches)
        for component, strengths in self._strengths(batches).items():
            self._show_nothing(component, batches)
            self._follow(component, np.resize(strengths, rows.stop), rows)
        self._workspace.run(self._denoiser, rows)
        for batch in batches:
            batch.taken += 1

    def _write_stage(self, batches: Sequence[Batch]) -> slice:
        """Write what changes from stage to stage; return the model rows of this one."""
        workspace, slots = self._workspace, self._workspace.shape.pictures
        own, negative = np.zeros(slots, dtype=np.float32), np.zeros(slots, dtype=np.float32)
        control = np.tile(rest(workspace.state_rows), (slots, 1))
        noises = list[tuple[slice, Array]]()
        for batch in batches:
            own[batch.slots], negative[batch.slots] = batch.weights()
            control[batch.slots] = batch.control(workspace.state_rows)
            if (noise := batch.noise()) is not None:
                noises.append((batch.slots, noise))
        rows = workspace.fit(self._denoiser, slots + int(np.flatnonzero(negative).max(initial=-1)) + 1)
        matrix, owners = guidance_rows(own, negative, rows)
        self.rows = int(np.count_nonzero(matrix)) if workspace.local else rows
        for name, array in ((CONTROL, control), (GUIDANCE, matrix), (OWNERS, owners)):
            workspace.write(name, array)
        if noises:
            workspace.write(NOISE, _spread(noises, slots))
        return slice(0, rows)

    def _show_nothing(self, component: str, batches: Sequence[Batch]) -> None:
        """Give a ControlNet a black image for the pictures that do not follow it; what it adds to them is nothing."""
        width, height = self._workspace.shape.width, self._workspace.shape.height
        for batch in batches:
            if (component, batch) in self._blank or component in [one.component for one in batch.controls]:
                continue
            black = np.zeros((batch.slots.stop - batch.slots.start, 3, height, width), dtype=np.float32)
            self._workspace.write(hint_of(component), black, batch.slots)
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
        sums = sums_of_squares(self._workspace.read(STATE, batch.slots)[:, 0])
        return tuple(np.flatnonzero(~np.isfinite(sums)).tolist())


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


def pack_control(plan: SamplingPlan, stage: int, state_rows: int, *, rescale: float = 0.0) -> Array:
    """Return what controls one stage of one picture: (control_width(R),), float32, with R = state_rows.

    In the order that `engines.stage.control_width` gives. A plan with fewer rows of state than the graph leaves the
    others zero. rescale is guidance's, 0 to 1. Raises EngineError if the plan has more rows.
    """
    if plan.rows > state_rows:
        raise EngineError(
            f"{plan.sampler} keeps {plan.rows} rows of state and this engine was built for {state_rows}; "
            "build it again with a larger --state-rows"
        )
    head = [plan.timesteps[stage], rescale, *plan.levels[stage + 1]]
    row = np.zeros(state_rows, dtype=np.float32)
    row[: plan.rows] = plan.input_rows[stage]
    transition = np.zeros((state_rows, state_rows + 2), dtype=np.float32)
    transition[: plan.rows, : plan.rows] = plan.transitions[stage][:, : plan.rows]
    transition[: plan.rows, state_rows:] = plan.transitions[stage][:, plan.rows :]
    return np.concatenate([head, row, transition.reshape(-1)], dtype=np.float32)
