"""TensorRT and TensorRT-RTX, whose Python APIs have one shape: what is here, what it builds for, and building it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from latentrt.engines.build_options import FIXED_TOKENS, BuildOptions, Profile
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.weight_map import GraphWeights, built_record, read_weights, write_weights
from latentrt.engines.cuda import gpus
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.compiled import FUSIONS, on_device, scale_queries, separate_skips
from latentrt.engines.graphs.locate_weights import GraphValues, own_places
from latentrt.engines.progress import Report
from latentrt.engines.spec import DType, EngineSpec, TensorSpec
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.tensorrt.library import Flavor, require

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

TOKENS = "input_ids"  # what text encoders take
# Rows of the input that learned words are looked up in: a handful of embeddings of the longest kind.
LEARNED_TOKENS = 64


def build(
    bundle: Bundle, directory: Path, flavor: Flavor, options: BuildOptions, report: Report, *, device: int = 0
) -> Mapping[str, tuple[str, EngineSpec]]:
    """Compile every component into `directory`, the UNet as the fused denoise stage, the VAE's decoder from the state.

    device: which of the visible GPUs to build on; where there is none TensorRT-RTX needs none
    Returns {component: (main file, spec)}.
    Raises EngineError with the library's own words, and KeyboardInterrupt after the compiler has stopped.
    """
    library = require(flavor)
    compiling = partial(compile_graph, library, device=device if gpus.find_gpu(device) else None)
    built = {}
    for component in bundle.manifest.components:
        what = f"build {component} ({flavor})"
        report(what, 0, 1)
        built[component] = _build_one(compiling, bundle, component, directory, flavor, options, report)
        report(what, 1, 1)
    return built


def _build_one(
    compiling: Callable[..., memoryview],
    bundle: Bundle,
    component: str,
    directory: Path,
    flavor: Flavor,
    options: BuildOptions,
    report: Report,
) -> tuple[str, EngineSpec]:
    files = [bundle.path(name) for name in bundle.manifest.components[component].files]
    if options.refit:
        _note_weights(bundle, component, directory)
    role, latents = bundle.manifest.components[component].role, bundle.manifest.latents
    graph = graphs.load_graph(files[0])
    scale_queries(graph)
    if options.separate_skips and role in FUSIONS:
        separate_skips(graph)
    model = on_device(graph, role, latents, state_rows=options.state_rows, learned=LEARNED_TOKENS)
    # TF32 rounds as fp16 does: what an fp16 bundle keeps in float32 for its range may take it, the sampler's sums not.
    tf32 = bundle.manifest.precision != "fp32" and role not in FUSIONS
    spec = spec_of(component, model, options.profiles(bundle.manifest), factor=latents.factor)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".edit-") as beside:
        edited = Path(beside) / "model.onnx"
        edited.write_bytes(model.SerializeToString())
        for data in files[1:]:
            graphs.link_data(data, edited.parent)
        what = f"build {component} ({flavor})"
        plan = compiling(edited, spec, options, tf32=tf32, what=what, report=report)
    output = directory / f"{component}.engine"
    output.write_bytes(plan)
    return output.name, spec


def _note_weights(bundle: Bundle, component: str, directory: Path) -> None:
    """Write down where the weights of a component lie in the bundle, for when they are changed."""
    spec = bundle.manifest.components[component]
    if spec.weights is not None:
        known = read_weights(bundle.path(spec.weights), GraphWeights)
        graph = bundle.path(spec.graph)
        values = GraphValues(graphs.load_graph(graph), graph)
        folder = PurePosixPath(spec.graph).parent.as_posix()
        write_weights(directory / built_record(component), own_places(known, values, folder))


def spec_of(component: str, model: ModelProto, profiles: Iterable[Profile], *, factor: int) -> EngineSpec:
    """Return what the engine of a graph takes and gives, with the sizes of its axes in each profile.

    factor: how many pixels an element of the latents is wide
    Raises EngineError where the graph names an axis that no profile has a size for.
    """
    inputs = tuple(_tensor(info) for info in model.graph.input)
    named = {axis for tensor in inputs for axis in tensor.shape if isinstance(axis, str)}
    found: list[Mapping[str, int]] = []
    for profile in profiles:
        axes = profile.axes(factor)
        if TOKENS in {tensor.name for tensor in inputs}:  # a long prompt is several rows of a text encoder
            axes["batch"] = profile.rows * (1 if FIXED_TOKENS in named else profile.chunks)
        if unknown := named - set(axes):
            raise EngineError(
                f"the graph of {component} has axes named {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(axes)}; export the checkpoint again"
            )
        sizes = {name: size for name, size in axes.items() if name in named}
        if sizes not in found:  # the VAE does not see guidance, nor the text encoder a size
            found.append(sizes)
    outputs = tuple(_tensor(info) for info in model.graph.output)
    return EngineSpec(component=component, inputs=inputs, outputs=outputs, profiles=tuple(found))


def _tensor(info: ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = info.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=info.name, dtype=cast(DType, dtype), shape=shape)
