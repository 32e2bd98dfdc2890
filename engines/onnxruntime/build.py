"""ONNX Runtime: optimises each graph once for the device at hand, saves that, and runs it (`cpu` and `cuda`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import Role
from latentrt.engines.bundle.weight_map import BuiltWeights, GraphWeights, built_record, read_weights, write_weights
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.compiled import on_device, on_host
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.cuda_rewrites import use_cuda_kernels
from latentrt.engines.graphs.locate_weights import GraphValues, places
from latentrt.engines.graphs.widen import widen
from latentrt.engines.graphs.winograd import use_winograd
from latentrt.engines.onnxruntime import keys
from latentrt.engines.onnxruntime.assignment import check_assignment, record_assignment
from latentrt.engines.onnxruntime.keys import DEFAULT_RECIPE, DEFAULTS
from latentrt.engines.onnxruntime.library import Provider, require
from latentrt.engines.onnxruntime.session import on_gpu, open_session, session_options, spec_of
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineSpec

# Weights above this lie in a file of their own, which ONNX Runtime maps into memory instead of reading it.
EXTERNAL_BYTES = 16 << 20
# Smaller weights stay in the graph: on CUDA what is no larger than a shape, which ONNX Runtime reads first.
LEAST_EXTERNAL_BYTES: Mapping[Provider, int] = {"cpu": 1024, "cuda": 128}
# Winograd's convolutions hold twice the weights: little in a VAE, gigabytes in a UNet, whose weights LoRAs also change
# where they lie in one place. `VECTORS`: where they were measured.
BY_WINOGRAD: tuple[Role, ...] = ("decoder", "encoder")
VECTORS = frozenset({"x86_64 avx2", "x86_64 avx512f"})


def build(
    bundle: Bundle,
    directory: Path,
    provider: Provider,
    report: Report,
    options: BuildOptions = DEFAULTS,
    *,
    device: int = 0,
) -> Mapping[str, tuple[str, EngineSpec]]:
    """Optimise every component's graph into `directory`. Returns {component: (main file, spec)}."""
    built = {}
    for component in bundle.manifest.components:
        what = f"build {component} ({provider})"
        report(what, 0, 1)
        built[component] = _build_one(bundle, component, directory, provider, options, device)
        report(what, 1, 1)
    return built


def _build_one(
    bundle: Bundle, component: str, directory: Path, provider: Provider, options: BuildOptions, device: int
) -> tuple[str, EngineSpec]:
    files = [bundle.path(name) for name in bundle.manifest.components[component].files]
    model = graphs.load_graph(files[0])
    large = sum(file.stat().st_size for file in files) > EXTERNAL_BYTES
    output = directory / f"{component}.onnx"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        widened = edited.with_name("widened.data") if large else None
        if not (provider == "cpu" and widen(model, files[0].parent, widened)):
            for data in files[1:]:
                graphs.link_data(data, edited.parent)
        role = bundle.manifest.components[component].role
        model = on_device(model, role, bundle.manifest.latents) if provider in keys.FUSED else on_host(model, role)
        if provider == "cpu":
            use_host_kernels(model)
            split_upsampling(model, edited)
            if role in BY_WINOGRAD and keys.instruction_set() in VECTORS:
                use_winograd(model, edited)
        elif (options.recipe or DEFAULT_RECIPE) != "plain":
            use_cuda_kernels(model)
        graphs.save_graph(model, edited)
        # Else ONNX Runtime would name files that are gone by then. On CUDA it changes no weights but external ones.
        external = provider == "cuda" or large or graphs.has_external(model)
        session = _optimise(edited, output, component, provider, device, external=external)
        if record := bundle.manifest.components[component].weights:
            known = read_weights(bundle.path(record), GraphWeights)
            canonical, built = GraphValues(model, edited), GraphValues(graphs.load_graph(output), output)
            found = places(known, canonical, built)
            write_weights(
                directory / built_record(component), _external(found, output) if provider == "cuda" else found
            )
    return output.name, spec_of(component, session)


def _external(found: BuiltWeights, graph: Path) -> BuiltWeights:
    """Leave out the weights that lie in the graph itself, in whose place nothing can be given."""
    weights = {name: weight for name, weight in found.weights.items() if weight.file != graph.name}
    return msgspec.structs.replace(found, weights=weights)


def _optimise(graph: Path, output: Path, component: str, provider: Provider, device: int, *, external: bool) -> Any:
    ort = require()
    options = session_options(threads=None)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    # Nothing is run: packed weights would be a second copy of them, which is not saved.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if external:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{output.name}.data"
        )
        least = str(LEAST_EXTERNAL_BYTES[provider])
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", least)
    if provider == "cuda":
        record_assignment(options)
    session = open_session(graph, options, provider, on_gpu(device) if provider == "cuda" else {})
    if provider == "cuda":
        check_assignment(session, provider, component)
    return session
