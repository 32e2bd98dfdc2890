"""Pictures that fill a workspace, taken through one plan from its first stage to its last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import Workspace
from latentrt.runtime.draw.denoise import Batch, Loop, stages_of
from latentrt.runtime.sampling.guidance import Guidance
from latentrt.runtime.sampling.plan import SamplingPlan


def denoise(
    workspace: Workspace, plan: SamplingPlan, guidance: Guidance, draw: Callable[[], Array], *, denoiser: str
) -> Iterator[int]:
    """Yield after each stage the number of those that are done."""
    slots, stages = slice(0, workspace.shape.pictures), range(plan.stages)
    batch = Batch(plan=plan, guidance=guidance, draw=draw, slots=slots, stages=stages)
    loop = Loop(workspace, denoiser)
    loop.join(batch)
    yield from stages_of(loop, batch)
