"""Whatever a workspace on the device is asked, in whatever order, it gives what the workspace in NumPy gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PREVIOUS, SKIP_LAYERS, control_width
from latentrt.engines.tensorrt.engines import TensorRTSession
from latentrt.engines.tensorrt.text_encoder import split_texts
from latentrt.engines.workspace.contract import STATE, TEXT, Workspace, own_buffer
from latentrt.runtime.draw.denoise import rest
from latentrt.runtime.sampling.guidance import guidance_rows
from tests.sketch import CONTEXT, SIZE, TOKENS, WIDTH, bound_workspace, compiled, numpy_workspace, shape_for
from tests.studio import DRAWN

ROWS = 2  # of state
# Of the largest number: the same float32 sums in another order. The contrast of a picture that is nearly of one colour,
# by which guidance is rescaled, keeps four digits of them; 5e-5 was measured, a wrong row or weight is above 1e-2.
CLOSE = 5e-4


COMPILED = {2: {1: (1, 2), 2: (2, 4)}, 3: {1: (1, 2, 3), 2: (2, 4, 6)}}  # by the groups of model rows


@pytest.fixture(scope="module", params=COMPILED)
def groups(request: pytest.FixtureRequest) -> int:
    """Return how many groups of model rows there are: three where layers can be skipped."""
    return int(request.param)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, groups: int) -> Iterator[dict[bool, TensorRTSession]]:
    directory = tmp_path_factory.mktemp("sketch") / "engines" / "host"
    with compiled(directory, ROWS, COMPILED[groups], skips=groups == 3) as opened:
        yield opened


seeds = st.integers(0, 1 << 30)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["state", "text", "texts", "encode", "keep"]), seeds),
    st.tuples(st.sampled_from(["stage", "stage with noise", "guided stage", "guided stage with noise"]), seeds),
    st.tuples(st.sampled_from(["guided skipping stage", "guided skipping stage with noise"]), seeds),
    st.tuples(st.sampled_from([f"read {name}" for name in (STATE, PREVIOUS, TEXT)] + ["decode"]), seeds),
)
"""What is done next, and the seed of its numbers and of the slots that it is done for."""


def take(workspace: Workspace, step: str, seed: int, groups: int) -> Array | None:
    """Do one thing on a workspace; return what it shows. What was handed over is spoilt at once."""
    draw, slots = np.random.default_rng(seed), workspace.shape.pictures
    first = int(draw.integers(slots)) if seed % 2 else 0
    part = slice(first, slots)

    def normal(*shape: int) -> Array:
        return draw.standard_normal((slots - first, *shape), dtype=np.float32)

    written: dict[str, tuple[Array, slice]] = {}
    if step == "state":
        written = {STATE: (normal(ROWS, *SIZE), part)}
    elif step == "keep":
        written = {
            "keep_mask": ((normal(1, *SIZE[1:]) > 0).astype(np.float32), part),
            "known": (normal(2, *SIZE), part),
        }
    elif step in ("text", "texts"):
        rows = part if step == "text" else slice(slots + first, 2 * slots)
        written = {TEXT: (normal(TOKENS, WIDTH), rows)}
    elif step == "skips":
        written = {
            TEXT: (normal(TOKENS, WIDTH), slice(2 * slots + first, 3 * slots)),
            SKIP_LAYERS: ((np.arange(3 * slots) >= 2 * slots).astype(np.float32), slice(0, 3 * slots)),
        }
    elif step == "encode":
        texts = (2 * slots - first) * TOKENS // CONTEXT
        for name, array in (("input_ids", draw.integers(-9, 9, (texts, CONTEXT))), ("shift", normal(WIDTH)[:1])):
            workspace.write(own_buffer("text_encoder", name), array)
            array.fill(99)
        workspace.run("text_encoder", slice(first, 2 * slots))
    elif step.startswith("read"):
        return workspace.read(step.removeprefix("read "))
    elif step == "decode":
        workspace.run("vae_decoder")
        return workspace.read("pixels")
    else:
        stage(workspace, step, draw, groups)
    for name, (array, rows) in written.items():
        workspace.write(name, array, rows)
        array.fill(np.nan)
    return None


def stage(workspace: Workspace, step: str, draw: np.random.Generator, groups: int) -> None:
    """Run a stage of some of the pictures, some of which are guided, and some away from skipped layers."""
    slots = workspace.shape.pictures
    own = draw.uniform(0.5, 1, slots) * (draw.integers(3, size=slots) > 0)
    negative = draw.uniform(-1, 1, slots) * (own > 0) * step.startswith("guided")
    skipped = draw.uniform(-1, 0, slots) * (draw.integers(2, size=slots) > 0) * (own > 0) * ("skipping" in step)
    weights = np.stack([own, negative, skipped][:groups])
    needed = max(slots, int(np.flatnonzero(weights).max(initial=-1)) + 1)
    matrix, owners = guidance_rows(weights, workspace.fit("unet", needed))
    control = draw.uniform(-0.5, 0.5, (slots, control_width(ROWS))).astype(np.float32)
    control[own == 0] = rest(ROWS)
    given = {"control": control, "guidance": matrix, "picture_of_row": owners}
    if step.endswith("noise"):
        given["noise"] = draw.standard_normal((slots, *SIZE), dtype=np.float32)
    for name, array in given.items():
        workspace.write(name, array)
    count = len(owners)
    for array in given.values():
        array.fill(-1)
    workspace.run("unet", slice(0, count))


@settings(max_examples=120)
@given(
    pictures=st.sampled_from([1, 2]),
    graphs=st.booleans(),
    begin=st.tuples(seeds, seeds),
    steps=st.lists(STEPS, max_size=12),
)
def test_any_order_of_calls_gives_what_numpy_gives(
    sessions: dict[bool, TensorRTSession],
    groups: int,
    pictures: int,
    graphs: bool,
    begin: tuple[int, int],
    steps: Any,
) -> None:
    """Stages take some of the slots, guided or not, and text and state are written by rows."""
    device = sessions[graphs].workspace(shape_for(pictures), **DRAWN)
    skips = groups == 3
    others = (make(pictures, ROWS, skips=skips) for make in (bound_workspace, numpy_workspace))
    workspaces: list[Workspace] = [device, *others]
    whole = [("state", begin[0] * 2), ("text", begin[1] * 2), ("texts", begin[1] * 2)]
    whole += [("skips", begin[1] * 2)] if skips else []
    for step, seed in [*whole, *steps, ("decode", 0), ("read state", 0)]:
        *found, wanted = (outcome(workspace, step, seed, groups) for workspace in workspaces)
        for one in found:
            assert_close(one, wanted)


def assert_close(found: Array | None, wanted: Array | None) -> None:
    if wanted is None or found is None:
        assert wanted is None and found is None
        return
    assert np.isfinite(wanted).all() and found.dtype == wanted.dtype
    close = 1 if wanted.dtype == np.uint8 else CLOSE * max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=0, atol=close)


REFUSED = np.zeros(0, dtype=bool)


def outcome(workspace: Workspace, step: str, seed: int, groups: int) -> Array | None:
    """Return what a step shows; REFUSED where it asks for what is not there yet."""
    try:
        return take(workspace, step, seed, groups)
    except EngineError:
        assert step == f"read {PREVIOUS}"
        return REFUSED


@given(texts=st.integers(1, 40), compiled=st.sets(st.integers(1, 9), min_size=1))
def test_texts_are_split_without_a_gap_and_only_the_last_run_is_padded(texts: int, compiled: set[int]) -> None:
    parts = split_texts(texts, compiled)
    assert [index for _, start, count in parts for index in range(start, start + count)] == list(range(texts))
    assert all(batch in compiled for batch, _, _ in parts)
    assert all(batch == count == max(compiled) for batch, _, count in parts[:-1])
    assert all(batch - count < min({size for size in compiled if size >= count}) for batch, _, count in parts)
