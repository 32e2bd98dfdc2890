"""The probe of TensorRT-RTX runs on the product as it is: its build for real, its run on the stand-in."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.engines.cuda import device as cuda
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt import compile as compiler
from latentrt.engines.tensorrt.library import require
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, write_plan

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(compiler, "_target", compiler._target)  # which the probe may exchange
    return importlib.import_module("probe_rtx")


@pytest.fixture
def spec(probe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineSpec:
    """What the probe builds, without building it."""
    monkeypatch.setattr(compiler, "compile_graph", lambda *_, **__: b"")
    return probe.compiled(tmp_path, None, None)[1]


def test_the_probe_draws_what_its_network_gives(
    probe: Any, spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = HostDevice()
    monkeypatch.setattr(cuda, "CudaDevice", lambda: device)
    library = make_library(device, rtx=True)
    network = probe.network("float32")
    write_plan(tmp_path / "probe.engine", network, spec)
    x = np.random.default_rng(0).standard_normal(probe.SHAPE).astype(np.float32)
    expected = onnxruntime.InferenceSession(network.SerializeToString()).run(None, {"x": x})[0]
    for _ in range(2):
        np.testing.assert_allclose(probe.draw(library, tmp_path / "probe.engine", spec, x), expected, atol=1e-4)
    assert len(library.compiled) == 1 and (tmp_path / "probe.kernels").is_file()
    assert device.leftovers() == {}


def test_the_probes_network_is_compiled_and_its_float16_is_near(probe: Any, tmp_path: Path) -> None:
    try:
        library = require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    engine, spec = probe.compiled(tmp_path, library, "8.9")
    assert engine.stat().st_size > 10_000 and spec.profiles == ({"batch": 1},)
    x = np.random.default_rng(1).standard_normal(probe.SHAPE).astype(np.float32)
    half, single = (
        onnxruntime.InferenceSession(probe.network(dtype).SerializeToString()).run(None, {"x": x})[0]
        for dtype in ("float16", "float32")
    )
    assert np.abs(half - single).max() <= probe.LARGEST_ERROR * np.abs(single).max()
