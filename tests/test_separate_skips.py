"""A UNet whose skip connections are copied before they are joined: the same numbers, and no view that is added to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.compiled import on_device, separate_skips
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.progress import silent
from latentrt.engines.tensor_names import control_width
from latentrt.engines.tensorrt import build as builder
from latentrt.engines.tensorrt import compile as compiler
from latentrt.engines.tensorrt.library import require
from latentrt.engines.tensorrt.logger import LogScope


def stage(bundle: Bundle, *, separate: bool) -> Any:
    model = onnx.load(str(bundle.path(bundle.manifest.components["unet"].graph)))
    if separate:
        separate_skips(model)
    return on_device(model, "denoiser", bundle.manifest.latents)


def shared_joins(model: Any) -> list[str]:
    """Return what concatenations of channels read that others read too."""
    users = Counter(name for node in model.graph.node for name in node.input)
    joins = (node for node in model.graph.node if node.op_type == "Concat" and len(node.input) == 2)
    joined = [node for node in joins if any(one.name == "axis" and one.i == 1 for one in node.attribute)]
    return [name for node in joined for name in node.input if users[name] > 1 and not name.startswith("stage.")]


def test_nothing_that_is_joined_is_used_elsewhere(sd1_bundle: Path) -> None:
    bundle = Bundle.open(sd1_bundle)
    plain, separate = (shared_joins(stage(bundle, separate=separate)) for separate in (False, True))
    assert len(plain) >= 4 and separate == []


def test_the_numbers_are_the_same(sd1_bundle: Path) -> None:
    bundle, draw = Bundle.open(sd1_bundle), np.random.default_rng(0)
    sessions = [
        onnxruntime.InferenceSession(stage(bundle, separate=separate).SerializeToString()) for separate in (False, True)
    ]
    feeds = {
        "state": draw.standard_normal((2, 6, 4, 8, 8)),
        "control": draw.uniform(0.1, 1, (2, control_width(6))),
        "noise": draw.standard_normal((2, 4, 8, 8)),
        "guidance": np.array([[4, 0, -3, 0], [0, 2, 0, -1]]),
        "picture_of_row": np.array([1, 1, 0, 1]),  # a first row that is not the first picture's
        "keep_mask": np.ones((2, 1, 8, 8)),
        "known": np.zeros((2, 2, 4, 8, 8)),
        "encoder_hidden_states": draw.standard_normal((4, 77, 32)),
    }
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    given = {one.name: feeds[one.name].astype(types[one.type]) for one in sessions[0].get_inputs()}
    plain, separate = (session.run(None, given)[0] for session in sessions)
    np.testing.assert_array_equal(plain, separate)


@pytest.fixture
def library() -> Any:
    try:
        return require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("separate", [False, True])
def test_the_option_reaches_the_compiler(
    library: Any, separate: bool, sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {}

    def compile_graph(_: Any, graph: Path, spec: Any, *__: Any, **___: Any) -> bytes:
        compiled[spec.component] = len(shared_joins(load_graph(graph)))
        return b""

    monkeypatch.setattr(builder, "compile_graph", compile_graph)
    options = BuildOptions(sizes=((32, 32),), separate_skips=separate)
    builder.build(Bundle.open(sd1_bundle), tmp_path, "tensorrt-rtx", options, silent)
    assert (compiled["unet"] == 0) == separate
    assert compiled["vae_decoder"] == 0


def test_tensorrt_rtx_compiles_it(library: Any, sd1_bundle: Path, tmp_path: Path) -> None:
    options = BuildOptions(sizes=((32, 32),), compute_capability="8.9", optimization_level=0, separate_skips=True)
    built = builder.build(Bundle.open(sd1_bundle), tmp_path, "tensorrt-rtx", options, silent)
    assert (tmp_path / built["unet"][0]).stat().st_size > 1_000_000


@pytest.mark.parametrize("streams", [0, 2])
def test_the_compiler_is_told_how_many_streams_it_may_use(library: Any, streams: int) -> None:
    log = LogScope(library)
    options = BuildOptions(aux_streams=streams)
    config = compiler._configure(library, library.Builder(log.logger), options, log, tf32=False)
    assert config.max_aux_streams == streams
