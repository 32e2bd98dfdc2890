"""A plan as the fused denoise stage takes it: one row of numbers for each stage of each picture."""

from __future__ import annotations

import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.runtime.plan import SamplingPlan


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
