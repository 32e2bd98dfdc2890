"""One picture that a service owes: what is drawn, by when, for whom, and where it has come to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future

import msgspec
import numpy as np

from latentrt.engines.lora.weight_changes import Changes, keys_of
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import STATE_ROWS
from latentrt.runtime.batching.observer import When
from latentrt.runtime.batching.stage_times import PATIENCE_S
from latentrt.runtime.calls import Limits
from latentrt.runtime.draw.denoise import Batch
from latentrt.runtime.draw.job import Job
from latentrt.runtime.draw.step import Noise, OnStep
from latentrt.runtime.result import Result
from latentrt.runtime.sampling.plan import DenoiserRange


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What pictures must have in common to share their stages.

    weights: the keys of what LoRAs change, by component
    controls: the ControlNets that are followed, where others would pay for their passes
    """

    weights: tuple[tuple[str, str], ...]
    denoiser: str
    size: tuple[int, int]
    tokens: int
    controls: tuple[str, ...]
    state_rows: int


class Picture(msgspec.Struct, kw_only=True, eq=False):
    """A picture that is being drawn.

    texts: what each denoiser reads, by its inputs' names; inputs: its state, as it was when it was last written to a
        workspace or read from one, and what lies beside it; draw: its own stream of noise
    part: which of its job's ranges it is on; done: the stages of its plan that are done
    """

    texts: Mapping[str, Mapping[str, Array]]
    inputs: dict[str, Array]
    draw: Noise
    encode_s: float
    part: int = 0
    done: int = 0
    batch: Batch | None = None


class Ticket(msgspec.Struct, kw_only=True, eq=False):
    """A picture that is owed to somebody.

    job: of one picture; tokens: the length of its text, by denoiser; changes: of the weights
    mixes: it may share stages with those that follow other ControlNets
    due: the moment that it was promised for, on the clock of time.perf_counter; None for no promise
    alone: it may share no stage, since one that it shared failed
    picture: what was prepared for drawing it, None before
    ended: it was answered for with an error
    """

    number: int
    job: Job
    tokens: Mapping[str, int]
    changes: Mapping[str, Changes]
    limits: Limits
    on_step: OnStep | None = None
    mixes: bool = True
    due: float | None = None
    alone: bool = False
    picture: Picture | None = None
    preparing: bool = False
    began: float | None = None
    ended: bool = False
    step_seconds: list[float] = msgspec.field(default_factory=list)
    done: Future[Result] = msgspec.field(default_factory=Future)
    _rows: int | None = None  # likewise
    _groups: dict[int, Group] = msgspec.field(default_factory=dict)  # by part: they are asked for at every stage

    @property
    def part(self) -> DenoiserRange:
        """Return the part of the plan that it is on, or begins with."""
        picture = self.picture  # read once: whoever asks how long others take is on another thread than who draws
        return self.job.ranges[picture.part if picture else 0]

    @property
    def stages_left(self) -> int:
        """Return how many stages of the whole plan are left."""
        picture = self.picture  # as above
        done = picture.done if picture else self.job.ranges[0].stages.start
        return self.job.ranges[-1].stages.stop - done

    @property
    def controls(self) -> tuple[str, ...]:
        """Return the ControlNets that it follows in this part of the plan."""
        of, controls = self.part.denoiser, self.job.controls
        return tuple(sorted(one.component for one in controls if one.of == of and one.role == "controlnet"))

    @property
    def group(self) -> Group:
        """Return what it shares with those that it can share stages with."""
        picture = self.picture  # as above
        number = picture.part if picture else 0
        if number not in self._groups:
            self._groups[number] = self._group_in(self.job.ranges[number])
        return self._groups[number]

    def _group_in(self, part: DenoiserRange) -> Group:
        return Group(
            weights=tuple(sorted(keys_of(self.changes).items())),
            denoiser=part.denoiser,
            size=self.job.size,
            tokens=self.tokens[part.denoiser],
            controls=() if self.mixes else self.controls,
            state_rows=max(STATE_ROWS, self.job.plan.rows),
        )

    @property
    def rows(self) -> int:
        """Return how many model rows it has in most of its stages, and two at least where it is guided."""
        if self._rows is None:
            guidance = self.job.guidance
            self._rows = max(min(guidance.most, 2), int(np.median(guidance.groups)))
        return self._rows

    @property
    def when(self) -> When:
        """Return how far it has come."""
        if self.began is None:
            return "waiting"
        return "drawing" if self.stages_left else "decoding"

    @property
    def urgency(self) -> tuple[float, int]:
        """Return what puts tickets in order: the earliest promise first, then the first that came.

        One without a promise has the place of one that was promised in `PATIENCE_S`, so that others that keep coming
        with deadlines cannot keep it waiting for ever.
        """
        return (self.limits.began + PATIENCE_S if self.due is None else self.due, self.number)

    def begin_again(self) -> None:
        """Forget what was drawn of it."""
        self.picture, self.preparing = None, False
        self.step_seconds.clear()

    def waited(self) -> float:
        """Return the seconds that it waited before its first stage, or has waited until now."""
        return (self.began or time.perf_counter()) - self.limits.began


def single(job: Job, picture: int) -> Job:
    """Return the job of one of a job's pictures. Drawn alone, it is the same picture."""

    def one(array: Array | None) -> Array | None:
        return array if array is None or len(array) == 1 else array[picture : picture + 1]

    only = slice(picture, picture + 1)
    latents = job.request.latents
    alone = None if latents is None or latents.ndim == 3 else one(latents)
    request = msgspec.structs.replace(
        job.request,
        latents=latents if alone is None else alone,
        variation_seed=job.variations[picture] if job.variations else None,
    )
    return msgspec.structs.replace(
        job,
        request=request,
        prompts=job.prompts[only],
        negatives=job.negatives[only],
        seeds=job.seeds[only],
        variations=job.variations[only],
        pixels=one(job.pixels),
        guidance=msgspec.structs.replace(job.guidance, scales=job.guidance.scales[only]),
        controls=tuple(msgspec.structs.replace(control, pixels=control.pixels[only]) for control in job.controls),
        images=tuple(msgspec.structs.replace(image, images=image.images[only]) for image in job.images),
    )
