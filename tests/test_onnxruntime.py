"""ONNX Runtime as a library: what it is told, what it is given in place of weights, and what runs where."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from latentrt.engines.errors import EngineError, OutOfMemoryError
from latentrt.engines.graphs.edits import save_graph
from latentrt.engines.onnxruntime import assignment, library, session
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, cuda_settings
from latentrt.engines.spec import Array, DType, EngineSpec, TensorSpec
from tests.graphs import model_of


def spec(dtype: DType, *names: str) -> EngineSpec:
    inputs = tuple(TensorSpec(name=name, dtype=dtype, shape=(1,)) for name in names)
    return EngineSpec(component="unet", inputs=inputs, outputs=())


def test_weights_in_the_place_of_a_graphs_own_come_and_go_without_a_trace(tmp_path: Path) -> None:
    """As a session on CUDA is given them, and here run on the CPU: ONNX Runtime takes them before it chooses."""
    generator = np.random.default_rng(0)
    x, first, second = generator.standard_normal((3, 32, 32)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"x": [32, 32]}, {"y": [32, 32]}, {"w": first})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)

    def run(changed: dict[str, Array]) -> Array:
        options = session.session_options(threads=1)
        kept = session._change(options, changed, "cuda")
        result = session.open_session(path, options, "cpu").run(None, {"x": x})[0]
        assert kept is not None
        return np.asarray(result)

    a, b, again = run({}), run({"w": second}), run({})
    np.testing.assert_allclose(b, x @ second, rtol=1e-4, atol=1e-4)
    assert np.abs(a - b).max() > 1
    assert a.tobytes() == again.tobytes()
    assert b.tobytes() == run({"w": second}).tobytes()


def test_float32_denoisers_alone_are_kept_from_tf32() -> None:
    def tf32(dtype: DType, *, every_stage: bool, asked: bool | None = None) -> str:
        return cuda_settings(OnnxRuntimeOptions(tf32=asked), spec(dtype, "x"), every_stage=every_stage)["use_tf32"]

    assert tf32("float32", every_stage=True) == "0"
    assert tf32("float16", every_stage=True) == "1"  # without it, float16 convolutions get no tensor cores
    assert tf32("float32", every_stage=False) == "1"
    assert tf32("float16", every_stage=True, asked=False) == "0"
    assert tf32("float32", every_stage=True, asked=True) == "1"


def test_a_gpu_that_does_not_start_is_no_silent_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime 1.31 says it, with an old driver and on a GPU that others filled."""
    said = "CudaCall(ERRTYPE, …) [with bool THRW = true] CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; file=y"
    asked: list[Any] = []

    def refuse(*_: Any, **more: Any) -> None:
        asked.append(more["enable_fallback"])
        raise RuntimeError(said)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(OutOfMemoryError, match="CUDA failure 2: out of memory;"):
        session.open_session(tmp_path / "model.onnx", session.session_options(threads=1), "cpu")
    assert asked == [0]


def test_what_is_run_once_a_picture_is_not_recorded() -> None:
    recorded = OnnxRuntimeOptions(cuda_graph=True)
    assert cuda_settings(recorded, spec("float16", "x"), every_stage=True)["enable_cuda_graph"] == "1"
    assert "enable_cuda_graph" not in cuda_settings(recorded, spec("float16", "x"), every_stage=False)
    assert "enable_cuda_graph" not in cuda_settings(OnnxRuntimeOptions(), spec("float16", "x"), every_stage=True)


def test_only_bound_buffers_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """A recording reads the addresses that it was made on, and a call's arrays lie somewhere else every time."""
    graphs: list[str] = []

    class Session:
        def io_binding(self) -> Any:
            return MagicMock()

        def run_with_iobinding(self, _binding: Any, options: Any) -> None:
            graphs.append(options.get_run_config_entry("gpu_graph_id"))

    assert session.OnnxRuntimeEngine(Session(), spec("float32", "x")).new_recording() == session.NOT_RECORDED
    engine = session.OnnxRuntimeEngine(Session(), spec("float32", "x"), recorded=True)
    engine({"x": [1.0]})
    engine.run_bound(engine.new_binding(), graph=3)
    assert graphs == ["-1", "3"]
    with caplog.at_level("WARNING"):
        numbers = [engine.new_recording() for _ in range(session.MOST_RECORDINGS + 2)]
    assert numbers == [*range(1, session.MOST_RECORDINGS + 1), session.NOT_RECORDED, session.NOT_RECORDED]
    assert len(caplog.records) == 1, "what is slower from now on is told, once"


def test_onnx_runtime_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    quiet = ModuleType("onnxruntime")
    quiet.disable_telemetry_events = lambda: told.append("quiet")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", quiet)
    for _ in range(2):
        assert library.require() is quiet
    assert told == ["quiet"]
    assert callable(onnxruntime.disable_telemetry_events)


class Installed(ModuleType):
    """An onnxruntime that notes what it is asked to load."""

    def __init__(self, site: Path) -> None:
        super().__init__("onnxruntime")
        self.__file__ = str(site / "onnxruntime" / "__init__.py")
        self.loaded: list[dict[str, Any]] = []

    def disable_telemetry_events(self) -> None: ...

    def preload_dlls(self, **asked: Any) -> None:
        self.loaded.append(asked)
        print("Failed to load libx.so")


@pytest.mark.parametrize("beside", [False, True])
def test_cuda_is_loaded_from_wherever_this_python_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], beside: bool
) -> None:
    for file in (
        "cu13/lib/libcudart.so.13",
        "cu13/lib/libcublas.so.13",
        "cudnn/lib/libcudnn.so.9",
        "other/lib/libx.so.1",
    ):
        (tmp_path / "nvidia" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / file).touch()
    module = Installed(tmp_path if beside else tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: found)
    library.load_cuda_libraries.__wrapped__()
    folders = [asked.get("directory") for asked in module.loaded]
    there = [str(tmp_path / "nvidia" / name / "lib") for name in ("cu13", "cudnn")]
    assert folders == ([None] if beside else [*there, None])
    if not beside:
        assert [(asked["cuda"], asked["cudnn"]) for asked in module.loaded[:2]] == [(True, False), (False, True)]
    assert capsys.readouterr().out == ""


def test_an_operator_that_would_run_on_the_host_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Reshape", ["x", "shape"], ["same"])]
    nodes.append(helper.make_node("Sin", ["same"], ["wave"], "the wave"))
    light = model_of(nodes, {"x": ["rows", 4]}, {"wave": ["rows", 4]}, {})
    assignment.check_assignment(assigned(light, tmp_path), "cpu", "a graph")
    assert not caplog.records
    assignment.check_assignment(assigned(light, tmp_path), "cuda", "a graph")
    assert ["Sin" in record.message for record in caplog.records] == [True]
    heavy = model_of([*nodes, helper.make_node("Softmax", ["wave"], ["y"], "s")], {"x": ["rows", 4]}, {"y": [1, 4]}, {})
    assert assignment.elsewhere(assigned(heavy, tmp_path), "cuda") == {"the wave": "Sin", "s": "Softmax"}
    with pytest.raises(EngineError, match="Softmax"):
        assignment.check_assignment(assigned(heavy, tmp_path), "cuda", "a graph")


def assigned(model: onnx.ModelProto, folder: Path) -> Any:
    """Open a graph on the CPU as it is, and have it remember which node runs where."""
    options = session.session_options(threads=1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assignment.record_assignment(options)
    save_graph(model, folder / "model.onnx")
    return session.open_session(folder / "model.onnx", options, "cpu")
