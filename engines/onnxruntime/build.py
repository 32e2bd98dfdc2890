"""ONNX Runtime: optimises each graph once for the device at hand, saves that, and runs it (`cpu` and `cuda`)."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import LatentSpec, Role
from latentrt.engines.bundle.weight_map import GraphWeights, built_record, read_weights, write_weights
from latentrt.engines.cuda.gpus import find_gpu, no_gpu
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.locate_weights import GraphValues, places
from latentrt.engines.progress import Report
from latentrt.engines.spec import EngineKey, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import STATE_ROWS

if TYPE_CHECKING:
    from onnx import ModelProto
from typing import TYPE_CHECKING

from latentrt.engines.onnxruntime.session import (
    DTYPES,
    PROVIDERS,
    Provider,
    _session,
    _session_options,
    refuse_host_kernels,
    require,
)

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

# Weights above this lie in a file of their own, which ONNX Runtime maps into memory instead of reading it.
EXTERNAL_BYTES = 16 << 20
# Counts up when what is built of a bundle changes though the bundle does not.
RECIPES: Mapping[Provider, int] = {"cpu": 2, "cuda": 4}
INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "asimd")


def key(bundle: Bundle, provider: Provider) -> EngineKey:
    """Return the key of the engines that this machine would build for a bundle."""
    common = {
        "backend": provider,
        "backend_version": require().__version__,
        "graphs": bundle.manifest.graphs_digest(latents=provider in FUSED),
        "options": (f"recipe {RECIPES[provider]}",),
    }
    if provider == "cpu":
        return EngineKey(device=instruction_set(), precision="fp32", **common)
    gpu = find_gpu()
    if gpu is None:
        raise no_gpu("the backend 'cuda' needs an NVIDIA GPU and none answers here; use --backend cpu")
    return EngineKey(
        device=gpu.name,
        compute_capability=gpu.compute_capability,
        sm_count=gpu.sm_count,
        driver_major=gpu.driver_major,
        precision=bundle.manifest.precision,
        **common,
    )


def instruction_set() -> str:
    """Return the machine and its widest vector instructions, e.g. `x86_64 avx512f`: graphs are laid out for them."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    widest = next((name for name in INSTRUCTION_SETS if name in flags), "baseline")
    return f"{platform.machine()} {widest}"


def build(bundle: Bundle, directory: Path, provider: Provider, report: Report) -> Mapping[str, tuple[str, EngineSpec]]:
    """Optimise every component's graph into `directory`. Returns {component: (main file, spec)}."""
    built = {}
    for component in bundle.manifest.components:
        what = f"build {component} ({provider})"
        report(what, 0, 1)
        built[component] = _build_one(bundle, component, directory, provider)
        report(what, 1, 1)
    return built


def _build_one(bundle: Bundle, component: str, directory: Path, provider: Provider) -> tuple[str, EngineSpec]:
    files = [bundle.path(name) for name in bundle.manifest.components[component].files]
    model = graphs.load_graph(files[0])
    large = sum(file.stat().st_size for file in files) > EXTERNAL_BYTES
    output = directory / f"{component}.onnx"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        widened = edited.with_name("widened.data") if large else None
        if not (provider == "cpu" and graphs.widen(model, files[0].parent, widened)):
            for data in files[1:]:
                graphs.link_data(data, edited.parent)
        role = bundle.manifest.components[component].role
        model = _edit(model, role, bundle.manifest.latents, fused=provider in FUSED)
        if provider == "cpu":
            use_host_kernels(model)
            split_upsampling(model, edited)
        save_graph(model, edited)
        external = large or graphs.has_external(model)  # ONNX Runtime would name files that are gone by then
        session = _optimise(edited, output, provider, external=external)
        if record := bundle.manifest.components[component].weights:
            known = read_weights(bundle.path(record), GraphWeights)
            canonical, built = GraphValues(model, edited), GraphValues(graphs.load_graph(output), output)
            write_weights(directory / built_record(component), places(known, canonical, built))
    return output.name, _spec(component, session)


def _edit(model: ModelProto, role: Role, latents: LatentSpec, *, fused: bool) -> ModelProto:
    if fused and role in FUSIONS:
        return FUSIONS[role](model)
    if role in ("decoder", "tiny_decoder"):
        graphs.append_pixel_tail(model)
        if fused:
            graphs.prepend_state_head(model, STATE_ROWS, latents)
    graphs.append_embedding_input(model)
    return model


FUSIONS: Mapping[Role, Callable[[ModelProto], ModelProto]] = {"denoiser": fuse_stage, "controlnet": fuse_control}


def save_graph(model: ModelProto, path: Path) -> None:
    """Write a graph, without the weights that lie in files beside it."""
    import onnx

    onnx.save(model, str(path))


def _optimise(graph: Path, output: Path, provider: Provider, *, external: bool) -> Any:
    ort = require()
    options = _session_options(threads=None)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(output)
    # Nothing is run: packed weights would be a second copy of them, which is not saved.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if external:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{output.name}.data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if provider != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = _session(graph, options, provider)
    if provider != "cpu":
        refuse_host_kernels(session, PROVIDERS[provider])
    return session


def _spec(component: str, session: Any) -> EngineSpec:
    def tensors(nodes: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n.name, dtype=DTYPES[n.type], shape=_shape(n.shape)) for n in nodes)

    return EngineSpec(component=component, inputs=tensors(session.get_inputs()), outputs=tensors(session.get_outputs()))


def _shape(axes: Any) -> tuple[int | str, ...]:
    return tuple(axis if isinstance(axis, int | str) else f"axis{i}" for i, axis in enumerate(axes))


# On a GPU the sampler's state stays there: the UNet is built as the fused denoise stage, and the VAE reads the state.
FUSED: frozenset[Provider] = frozenset({"cuda"})
