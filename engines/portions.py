"""Any number of rows through an engine compiled for a few: rows know nothing of each other, so they are split."""

from __future__ import annotations

import numpy as np

from latentrt.engines.spec import Array, Engine, EngineView, Inputs

BATCH = "batch"


def in_portions(engine: Engine) -> Engine:
    """Return an engine that takes any number of rows, where `engine` is compiled for some numbers of them alone.

    Engines without a batch of independent rows (the fused stage, the decoder from the state) are returned as they
    are, as are those that take any shape.
    """
    return _InPortions(engine) if any(BATCH in profile for profile in engine.spec.profiles) else engine


class _InPortions(EngineView):
    """Largest portions first; the last one is filled up with copies of the last row, whose outputs are dropped."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._batches = sorted({profile[BATCH] for profile in engine.spec.profiles}, reverse=True)
        # Not a row each: the text encoder's second table
        self._shared = {tensor.name for tensor in engine.spec.inputs if tensor.shape[0] != BATCH}

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the engine as often as it takes. The arrays that are returned hold until the next call."""
        rows = {name: np.asarray(array) for name, array in inputs.items() if name not in self._shared}
        shared = {name: array for name, array in inputs.items() if name in self._shared}
        count = len(next(iter(rows.values())))
        if count in self._batches:
            return self._engine(inputs)
        found: list[dict[str, Array]] = []
        start = 0
        while start < count:
            size = next((batch for batch in self._batches if batch <= count - start), self._batches[-1])
            portion = {name: _take(array, start, size) for name, array in rows.items()}
            found.append({name: array.copy() for name, array in self._engine({**portion, **shared}).items()})
            start += size
        return {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}


def _take(array: Array, start: int, size: int) -> Array:
    part = array[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
