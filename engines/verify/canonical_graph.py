"""A component's canonical graph in float32, by ONNX Runtime's plain CPU kernels: what engines are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.widen import widen
from latentrt.engines.onnxruntime import library
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine, spec_of

if TYPE_CHECKING:
    from onnx import ModelProto

Edit = Callable[["ModelProto"], object]
"""changes a graph in place"""


def open_canonical(bundle: Bundle, component: str, directory: Path, *, edit: Edit | None = None) -> OnnxRuntimeEngine:
    """Open a component's graph as an engine that computes in float32, whatever the graph is stored in.

    directory: for files that are removed again; edit: what else to change in the graph
    Raises EngineError and BundleError.
    """
    files = [bundle.path(name) for name in bundle.manifest.components[component].files]
    model = graphs.load_graph(files[0])
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        widened = widen(model, files[0].parent, edited.with_name("widened.data"))
        if not widened and edit is None:
            return _open_plain(component, files[0])
        if not widened:
            for data in files[1:]:
                graphs.link_data(data, edited.parent)
        if edit is not None:
            edit(model)
        graphs.save_graph(model, edited)
        del model
        return _open_plain(component, edited)


def _open_plain(component: str, path: Path) -> OnnxRuntimeEngine:
    ort = library.require()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are a second copy
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # 8 bits between Q and DQ are run as they stand
    opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeEngine(opened, spec_of(component, opened))
