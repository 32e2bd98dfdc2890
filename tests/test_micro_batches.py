"""Any number of rows gives what that many single rows give, and never runs more than it must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.spec import Array, EngineSpec, Inputs, TensorSpec
from latentrt.engines.tensorrt.engine import in_micro_batches


class Doubling:
    """An engine of independent rows for fixed batches, whose output buffer is reused as a real one's is.

    It doubles them by looking the factor up in a table that all rows share.
    """

    def __init__(self, batches: set[int]) -> None:
        tensor = TensorSpec(name="x", dtype="int64", shape=("batch", 2))
        table = TensorSpec(name="table", dtype="int64", shape=(3,))
        profiles = tuple({"batch": batch} for batch in batches)
        self.spec = EngineSpec(component="text_encoder", inputs=(table, tensor), outputs=(tensor,), profiles=profiles)
        self.buffers = {batch: np.zeros((batch, 2), dtype=np.int64) for batch in batches}
        self.runs: list[int] = []

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        rows = np.asarray(inputs["x"])
        buffer = self.buffers[len(rows)]  # KeyError: not compiled for it
        assert np.shape(inputs["table"]) == (3,)
        buffer[:] = np.asarray(inputs["table"])[1] * rows
        self.runs.append(len(rows))
        return {"x": buffer}

    def close(self) -> None: ...
    def __enter__(self) -> Doubling:
        return self

    def __exit__(self, *_: object) -> None: ...


@given(batches=st.sets(st.integers(1, 9), min_size=1, max_size=4), count=st.integers(1, 40))
def test_any_number_of_rows_is_computed_and_in_order(batches: set[int], count: int) -> None:
    engine = Doubling(batches)
    rows = np.arange(2 * count).reshape(count, 2)
    np.testing.assert_array_equal(in_micro_batches(engine)({"x": rows, "table": [0, 2, 4]})["x"], 2 * rows)
    assert sum(engine.runs) < count + min(batches)  # less than the smallest batch is computed in vain
    assert len(engine.runs) == 1 or count not in batches


@pytest.mark.parametrize("profiles", [(), ({"pictures": 2},)])
def test_engines_without_independent_rows_stay_as_they_are(profiles: Any) -> None:
    engine = Doubling({1})
    engine.spec = EngineSpec(component="unet", inputs=(), outputs=(), profiles=profiles)
    assert in_micro_batches(engine) is engine
