"""Whatever a workspace on the device is asked, in whatever order, it gives what the workspace in NumPy gives.

The network is a formula, so that many orders can be tried: tanh(sample / 2 + timestep / 10 + mean of the text).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.compare import to_pixels
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_pixel_tail, prepend_state_head
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PREVIOUS, control_width
from latentrt.engines.tensorrt.engines import TensorRTSession, open_tensorrt
from latentrt.engines.tensorrt.text_encoder import split_texts
from latentrt.engines.workspace.contract import StageInput, Workspace, WorkspaceShape, sums_of_squares
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace
from tests.graphs import model_of
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan
from tests.studio import record_of, spec_of

ROWS, SIZE, TOKENS, WIDTH = 2, (3, 2, 3), 4, 2  # rows of state; latents; the text of a row
CONTEXT = 2  # tokens of one text: a row is two
COMPILED = (1, 3)  # numbers of texts
SPACE = LatentSpec(channels=3, factor=1, scaling_factor=0.5)
CLOSE = 1e-5  # of numbers around 1: the same float32 sums in another order
SLOTS = 2


def unet_graph() -> Any:
    latents = ["batch", 3, "latent_height", "latent_width"]
    constants = {"axes": np.array([1, 2]), "spread": np.array([-1, 1, 1, 1])}
    numbers = {"half": np.float32(2), "tenth": np.float32(10)}
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["timestep", "tenth"], ["time"]),
        helper.make_node("Add", ["mean", "time"], ["shift"]),
        helper.make_node("Reshape", ["shift", "spread"], ["shifts"]),
        helper.make_node("Div", ["sample", "half"], ["halves"]),
        helper.make_node("Add", ["halves", "shifts"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["out_sample"]),
    ]
    inputs = {"sample": latents, "timestep": ["batch"], "encoder_hidden_states": ["batch", "tokens", WIDTH]}
    return model_of(nodes, inputs, {"out_sample": latents}, constants | numbers)


def vae_graph() -> Any:
    latents = ["batch", 3, "latent_height", "latent_width"]
    nodes = [helper.make_node("Identity", ["latent_sample"], ["sample"])]
    model = model_of(nodes, {"latent_sample": latents}, {"sample": latents}, {})
    append_pixel_tail(model)
    prepend_state_head(model, ROWS, SPACE)
    return model


def text_graph() -> Any:
    """Each token is its number over ten, and its negative, moved by what is the same for all texts."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["column"]),
        helper.make_node("Mul", ["column", "signs"], ["apart"]),
        helper.make_node("Add", ["apart", "shift"], ["last_hidden_state"]),
    ]
    constants = {"last": np.array([2]), "signs": np.array([0.1, -0.1], dtype=np.float32)}
    inputs, outputs = (
        {"input_ids": ["batch", CONTEXT], "shift": [1, WIDTH]},
        {"last_hidden_state": ["batch", CONTEXT, WIDTH]},
    )
    return model_of(nodes, inputs, outputs, constants, types={"input_ids": TensorProto.INT64})


def text(inputs: Any) -> dict[str, Array]:
    apart = inputs["input_ids"][..., None].astype(np.float32) * np.float32([0.1, -0.1])
    return {"last_hidden_state": apart + inputs["shift"]}


def unet(inputs: Any) -> dict[str, Array]:
    shift = inputs["encoder_hidden_states"].mean(axis=(1, 2)) + inputs["timestep"] / 10
    return {"out_sample": np.tanh(inputs["sample"] / 2 + shift.reshape(-1, 1, 1, 1))}


unet.spec = SimpleNamespace(  # type: ignore[attr-defined]
    inputs=[SimpleNamespace(name=name) for name in ("sample", "timestep", "encoder_hidden_states")]
)


def vae(inputs: Any) -> dict[str, Array]:
    sums = sums_of_squares(inputs["latent_sample"])
    return {"pixels": to_pixels(inputs["latent_sample"]), "squares": np.stack([sums, sums], axis=1)}


def host_workspace(shape: WorkspaceShape) -> NumpyWorkspace:
    engines: Any = {"unet": unet, "vae_decoder": vae, "text_encoder": text}
    return NumpyWorkspace(engines, SPACE, shape, state_rows=ROWS)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, TensorRTSession]]:
    """One with graphs and one without, each with fewer slots than most examples have stages."""
    directory = tmp_path_factory.mktemp("sketch") / "engines" / "host"
    directory.mkdir(parents=True)
    latents = {"latent_height": SIZE[1], "latent_width": SIZE[2]}
    pictures = (1, 2)
    stages = [{"pictures": p, "rows": p * m, "tokens": TOKENS, **latents} for p in pictures for m in (1, 2)]
    models = {
        "unet": fuse_stage(unet_graph(), state_rows=ROWS),
        "vae_decoder": vae_graph(),
        "text_encoder": text_graph(),
    }
    profiles = {
        "unet": stages,
        "vae_decoder": [{"pictures": p, **latents} for p in pictures],
        "text_encoder": [{"batch": texts} for texts in COMPILED],
    }
    record = record_of({name: spec_of(model, name, profiles[name]) for name, model in models.items()})
    for name, model in models.items():
        write_plan(directory / f"{name}.engine", model, record.specs[name])
    device = HostDevice()
    opened = {
        graphs: open_tensorrt(make_library(device), directory, record, device, factor=1, graphs=graphs, slots=SLOTS)
        for graphs in (True, False)
    }
    yield opened
    for session in opened.values():
        session.close()
    assert device.leftovers() == {}


seeds = st.integers(0, 1 << 30)
STEPS = st.one_of(
    st.tuples(st.just("state"), seeds),
    st.tuples(st.sampled_from(["one row a picture", "two rows a picture"]), seeds),
    st.tuples(st.sampled_from(["one text row a picture", "two text rows a picture"]), seeds),
    st.tuples(st.just("keep"), seeds),
    st.tuples(st.sampled_from(["stage", "stage with noise", "guided stage", "guided stage with noise"]), seeds),
    st.tuples(st.sampled_from(["read state", f"read {PREVIOUS}", "read encoder_hidden_states", "decode"]), seeds),
)


def take(workspace: Workspace, step: str, seed: int) -> Array | None:
    """Do one thing on a workspace; return what it shows. What was handed over is spoilt at once."""
    draw, pictures = np.random.default_rng(seed), workspace.shape.pictures

    def normal(*shape: int) -> Array:
        return draw.standard_normal((pictures, *shape), dtype=np.float32)

    written: dict[str, Array] = {}
    if step == "state":
        written = {"state": normal(ROWS, *SIZE)}
    elif step == "keep":
        written = {"keep_mask": (normal(1, *SIZE[1:]) > 0).astype(np.float32), "known": normal(2, *SIZE)}
    elif step.endswith("a picture"):
        rows = pictures * (2 if step.startswith("two") else 1)
        if "text" in step:
            ids, shift = draw.integers(-9, 9, (rows * TOKENS // CONTEXT, CONTEXT)), normal(WIDTH)[:1]
            workspace.encode({"input_ids": ids, "shift": shift})
            ids.fill(99)
            shift.fill(np.nan)
        else:
            written = {"encoder_hidden_states": draw.standard_normal((rows, TOKENS, WIDTH), dtype=np.float32)}
    elif step.startswith("read"):
        return workspace.read(step.removeprefix("read "))
    elif step == "decode":
        workspace.decode()
        return workspace.pixels()
    else:
        workspace.advance(taken := stage_of(step, draw, pictures))
        for array in (taken.control, taken.guidance, taken.picture_of_row, taken.noise):
            if array is not None:
                array.fill(-1)
    for name, array in written.items():
        workspace.write(name, array)
        array.fill(np.nan)
    return None


def stage_of(step: str, draw: np.random.Generator, pictures: int) -> StageInput:
    rows = pictures * (2 if step.startswith("guided") else 1)
    noise = draw.standard_normal((pictures, *SIZE), dtype=np.float32) if step.endswith("noise") else None
    return StageInput(
        control=draw.uniform(-0.5, 0.5, (pictures, control_width(ROWS))).astype(np.float32),
        guidance=draw.uniform(-1, 1, (pictures, rows)).astype(np.float32),
        picture_of_row=draw.permutation(np.arange(rows) % pictures),
        noise=noise,
    )


@settings(max_examples=120)
@given(
    pictures=st.sampled_from([1, 2]),
    graphs=st.booleans(),
    begin=st.tuples(seeds, seeds),
    steps=st.lists(STEPS, max_size=12),
)
def test_any_order_of_calls_gives_what_numpy_gives(
    sessions: dict[bool, TensorRTSession], pictures: int, graphs: bool, begin: tuple[int, int], steps: Any
) -> None:
    shape = WorkspaceShape(pictures=pictures, tokens=TOKENS, width=SIZE[2], height=SIZE[1])
    workspaces: list[Workspace] = [sessions[graphs].workspace(shape), host_workspace(shape)]
    rows, advanced = 2, False
    for step, seed in [("state", begin[0]), ("two rows a picture", begin[1]), *steps, ("decode", 0), ("read state", 0)]:
        if step.endswith("a picture"):
            rows = 2 if step.startswith("two") else 1
        if step.startswith("guided") and rows == 1:
            continue  # refused, as tests/test_tensorrt_run.py shows
        if step == f"read {PREVIOUS}" and not advanced:
            for workspace in workspaces:
                with pytest.raises(EngineError, match=PREVIOUS):
                    workspace.read(PREVIOUS)
            continue
        advanced = "stage" in step or (advanced and step != "state")
        found, wanted = (take(workspace, step, seed) for workspace in workspaces)
        if wanted is not None:
            assert np.isfinite(wanted).all() and found.dtype == wanted.dtype
            close = 1 if wanted.dtype == np.uint8 else CLOSE * max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=0, atol=close)


@given(texts=st.integers(1, 40), compiled=st.sets(st.integers(1, 9), min_size=1))
def test_texts_are_split_without_a_gap_and_only_the_last_run_is_padded(texts: int, compiled: set[int]) -> None:
    parts = split_texts(texts, compiled)
    assert [index for _, start, count in parts for index in range(start, start + count)] == list(range(texts))
    assert all(batch in compiled for batch, _, _ in parts)
    assert all(batch == count == max(compiled) for batch, _, count in parts[:-1])
    assert all(batch - count < min({size for size in compiled if size >= count}) for batch, _, count in parts)
    assert parts[0][0] >= parts[-1][0]  # what a later run leaves at the beginning reaches no other run's place
