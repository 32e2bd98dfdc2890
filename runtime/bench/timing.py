"""Engines that are timed: an `Engine` around an `Engine`, so that the time outside of all of them is known."""

from __future__ import annotations

import time
from typing import Any

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.find import FOR_CPUS
from latentrt.engines.open import OpenEngines
from latentrt.engines.spec import Array, Engine, EngineView, Inputs
from latentrt.runtime.pipeline import Pipeline


class Stopwatch:
    """Seconds spent in engines, by component, since the last reset."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, component: str, seconds: float) -> None:
        """Count one call."""
        self.seconds[component] = self.seconds.get(component, 0.0) + seconds

    def reset(self) -> None:
        """Begin again at zero."""
        self.seconds.clear()

    @property
    def total(self) -> float:
        """Return the seconds in all engines."""
        return sum(self.seconds.values())


class TimedEngine(EngineView):
    """An engine that tells a stopwatch how long each call took."""

    def __init__(self, engine: Engine, stopwatch: Stopwatch) -> None:
        super().__init__(engine)
        self._stopwatch = stopwatch

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the engine inside."""
        start = time.perf_counter()
        outputs = self._engine(inputs)
        self._stopwatch.add(self.spec.component, time.perf_counter() - start)
        return outputs


class TimedPipeline(Pipeline):
    """A pipeline with a timed engine around each of its engines; `stopwatch` tells the seconds in all of them.

    Where a device runs its engines in a queue they stay as they are and the stopwatch stays at zero: the queue needs
    more of them than a call, and a call would return before the work is done. The device's own clock tells there.
    """

    def __init__(self, bundle: Bundle, opened: OpenEngines, *rest: Any) -> None:
        self.stopwatch = Stopwatch()
        if opened.choice.backend == FOR_CPUS:
            timed = {name: TimedEngine(engine, self.stopwatch) for name, engine in opened.engines.items()}
            opened.engines.update(timed)
        super().__init__(bundle, opened, *rest)
