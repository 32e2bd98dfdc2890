"""The denoising loop: it executes a plan on a workspace and knows nothing of samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from latentrt.engines.errors import EngineError, NotFiniteError
from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import StageInput, Workspace
from latentrt.runtime.draw.controls import Features, Steering, scales_at
from latentrt.runtime.draw.finite import LATENTS
from latentrt.runtime.sampling.guidance import Guidance, guidance_rows
from latentrt.runtime.sampling.plan import SamplingPlan


def denoise(
    workspace: Workspace,
    plan: SamplingPlan,
    guidance: Guidance,
    draw: Callable[[], Array],
    *,
    steering: Sequence[Steering] = (),
    features: Features | None = None,
    stages: range | None = None,
) -> Iterator[int]:
    """Advance a workspace stage by stage; yield the number of stages done after each.

    The workspace has text and state. draw: called at the stages in which the sampler draws, returns unit
    normals, (n, C, h, w). steering: what is followed, whose pixels are on the workspace; features: what is written
    to it along the way. A caller that stops iterating leaves the workspace where it is.
    Raises NotFiniteError where the workspace knows of latents that are not finite any more.
    stages: which of the plan's to take, None for all; the state is then that before the first of them
    """
    stages = range(plan.stages) if stages is None else stages
    inputs = stage_inputs(plan, guidance, draw, state_rows=workspace.state_rows, steering=steering, stages=stages)
    for k, stage in zip(stages, inputs, strict=True):
        for name, array in features.at(k).items() if features else ():
            workspace.write(name, array)
        workspace.advance(stage)
        workspace.mark()
        if lost := workspace.lost():
            raise NotFiniteError(LATENTS, lost, stage=k + 1, stages=plan.stages)
        yield k + 1


def stage_inputs(
    plan: SamplingPlan,
    guidance: Guidance,
    draw: Callable[[], Array],
    *,
    state_rows: int,
    steering: Sequence[Steering] = (),
    stages: range | None = None,
) -> Iterator[StageInput]:
    """Yield what each stage of a plan takes, or each of some stages, the noise being drawn only when it is reached."""
    pictures = len(guidance.scales)
    rows = {on: guidance_rows(guidance.scales, guided=on) for on in (False, True)}
    weighted = plan.uses_noise
    for k in range(plan.stages) if stages is None else stages:
        on = bool(guidance.stages[k])
        control = pack_control(plan, k, state_rows, rescale=guidance.rescale if on else 0.0)
        noise = draw() if plan.draws_noise[k] else None  # drawn where diffusers draws, even if it weighs nothing
        matrix, picture_of_row = rows[on]
        yield StageInput(
            control=np.broadcast_to(control, (pictures, len(control))),
            guidance=matrix,
            picture_of_row=picture_of_row,
            noise=noise if weighted[k] else None,
            scales=scales_at(steering, k, len(picture_of_row)),
        )


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


def pack_control(plan: SamplingPlan, stage: int, state_rows: int, *, rescale: float = 0.0) -> Array:
    """Return what controls one stage of one picture: (control_width(R),), float32, with R = state_rows.

    In the order that `engines.stage.control_width` gives. A plan with fewer rows of state than the graph leaves the
    others zero. rescale is guidance's, 0 to 1. Raises EngineError where the plan has more rows.
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
