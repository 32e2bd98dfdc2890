"""The simulator against the real batcher and pipeline, on engines that take known times: they sleep.

What is measured then hardly depends on how busy a machine is: it is the policy, the threads and the simulator that are
compared, with room for a machine that is. What real engines give is measured on a quiet one: `python
benchmarks/load.py`, whose results must be within 15 % (tests/test_figures.py).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.open import OpenEngines
from latentrt.engines.progress import silent
from latentrt.engines.spec import Array, Engine, EngineView, Inputs
from latentrt.runtime.bench.load.arrivals import Share
from latentrt.runtime.bench.load.measure import Asked, bundle_target, run_load
from latentrt.runtime.pipeline import Pipeline

SECONDS = {"unet": (0.020, 0.006), "vae_decoder": (0.0, 0.03), "text_encoder": (0.01, 0.0)}  # and for each row


class Sleeping(EngineView):
    """An engine that takes its time, and no processor for most of it."""

    def __init__(self, engine: Engine, fixed: float, each: float) -> None:
        super().__init__(engine)
        self._fixed, self._each = fixed, each

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self._engine(inputs)
        rows = len(next(iter(inputs.values())))
        time.sleep(max(0.0, start + self._fixed + self._each * rows - time.perf_counter()))
        return outputs


class SleepingPipeline(Pipeline):
    def __init__(self, bundle: Bundle, opened: OpenEngines, *rest: Any) -> None:
        opened.engines.update({name: Sleeping(opened.engines[name], *SECONDS[name]) for name in SECONDS})
        super().__init__(bundle, opened, *rest)


@pytest.mark.slow
def test_the_simulator_predicts_what_the_batcher_and_its_rivals_give(sd1_bundle: Path) -> None:
    asked = Asked(
        mix=(Share(steps=2, share=40), Share(steps=6, share=40), Share(steps=14, share=20)),
        requests=50,
        seeds=3,
        most=4,
        simulate=True,
        seconds=900.0,
    )
    with SleepingPipeline.load(sd1_bundle, "cpu", threads=1) as pipe, bundle_target(pipe, asked) as target:
        report = run_load(asked, target, command="", progress=silent)
    found = {serving.name: serving for serving in report.servings}
    print({name: (one.goodput, one.prediction, one.better) for name, one in found.items()}, target.times)
    for serving in found.values():
        assert serving.prediction is not None
        assert serving.prediction.median == pytest.approx(1.0, abs=0.35)
    assert all(found[name].better.median > 1.3 for name in ("one", "static"))  # type: ignore[union-attr]
