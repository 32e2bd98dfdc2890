"""ONNX Runtime: optimises each graph once for the device at hand, saves that, and runs it (`cpu` and `cuda`)."""

from __future__ import annotations

import functools
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.bundle.weight_map import GraphWeights, built_record, read_weights, write_weights
from latentrt.engines.canvas.contract import DECODERS, DENOISERS
from latentrt.engines.cuda.device import find_gpu
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.cpu_rewrites import split_upsampling, use_host_kernels
from latentrt.engines.graphs.denoise_stage import STATE_ROWS, fuse_stage
from latentrt.engines.graphs.locate_weights import GraphValues, places
from latentrt.engines.progress import Report
from latentrt.engines.spec import Array, DType, EngineKey, EngineSpec, Inputs, TensorSpec
from latentrt.engines.tensor_names import PREFIX

if TYPE_CHECKING:
    from onnx import ModelProto

Provider = Literal["cpu", "cuda"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# Weights above this lie in a file of their own, which ONNX Runtime maps into memory instead of reading it.
EXTERNAL_BYTES = 16 << 20
# Output buffers are kept for this many different input shapes, then the oldest are dropped.
KEPT_SHAPES = 8
NO_SETTINGS: Mapping[str, str] = {}
NOT_CHANGED: Mapping[str, Array] = {}
# On a GPU the sampler's state stays there: the UNet is built as the fused denoise stage, and the VAE reads the state.
FUSED: frozenset[Provider] = frozenset({"cuda"})
# Counts up when what is built of a bundle changes though the bundle does not.
RECIPES: Mapping[Provider, int] = {"cpu": 2, "cuda": 3}
# Too heavy for the host: when ONNX Runtime has no kernel for one of these on the device, it would run it on the CPU.
HEAVY = frozenset(
    {"Attention", "Conv", "ConvTranspose", "Gelu", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul"}
)
INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "asimd")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeOptions:
    """How sessions run. `threads` None means one for each physical core; cuda_graph records the UNet's kernels."""

    threads: int | None = None
    cuda_graph: bool = False


def require() -> ModuleType:
    """Import onnxruntime, or say how to install it."""
    try:
        import onnxruntime
    except ImportError:
        raise EngineError("onnxruntime is not installed; install it with: pip install 'latentrt[cpu]'") from None
    return cast(ModuleType, onnxruntime)


def unavailable(provider: Provider) -> str | None:
    """Say in one sentence why this provider cannot run here, or return None."""
    try:
        ort = require()
    except EngineError as error:
        return str(error)
    if PROVIDERS[provider] not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider; install it with: pip install 'latentrt[cuda]'"
    if provider == "cuda" and find_gpu() is None:
        return "no NVIDIA GPU answers here"
    return None


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
        raise EngineError("the backend 'cuda' needs an NVIDIA GPU and none answers here; use --backend cpu")
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
        model = _edit(model, component, bundle.manifest.latents, fused=provider in FUSED)
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


def _edit(model: ModelProto, component: str, latents: LatentSpec, *, fused: bool) -> ModelProto:
    if component in DENOISERS and fused:
        return fuse_stage(model)
    if component.startswith(PREFIX) and fused:
        return fuse_control(model)
    if component in DECODERS:
        graphs.append_pixel_tail(model)
        if fused:
            graphs.prepend_state_head(model, STATE_ROWS, latents)
    graphs.append_embedding_input(model)
    return model


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


def refuse_host_kernels(session: Any, provider: str) -> None:
    """Raise EngineError where heavy operators of a session would run on the CPU, which nobody asked for.

    The session was opened with `session.record_ep_graph_assignment_info`.
    """
    parts = session.get_provider_graph_assignment_info()
    names = {node.op_type for part in parts if part.ep_name != provider for node in part.get_nodes()}
    if heavy := sorted(names & HEAVY):
        raise EngineError(
            f"this ONNX Runtime has no {', '.join(heavy)} for its {provider} and would run it on the CPU; "
            "install a newer one with: pip install --upgrade 'latentrt[cuda]', or use --backend tensorrt"
        )


def _session_options(*, threads: int | None) -> Any:
    options = require().SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors: that a saved graph suits this machine only is what the key says
    return options


def _session(path: Path, options: Any, provider: Provider, settings: Mapping[str, str] = NO_SETTINGS) -> Any:
    try:
        session = require().InferenceSession(str(path), options, providers=[(PROVIDERS[provider], dict(settings))])
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own, all straight from Exception
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(
            f"ONNX Runtime refused {path}: {first}; run `latentrt build --force` on this bundle"
        ) from error
    if PROVIDERS[provider] not in session.get_providers():  # it falls back to the CPU without a word
        raise EngineError(
            f"ONNX Runtime did not start its {PROVIDERS[provider]} (are CUDA and cuDNN installed?); "
            "install them with: pip install 'latentrt[cuda]', or choose --backend cpu"
        )
    return session


def _spec(component: str, session: Any) -> EngineSpec:
    def tensors(nodes: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n.name, dtype=DTYPES[n.type], shape=_shape(n.shape)) for n in nodes)

    return EngineSpec(component=component, inputs=tensors(session.get_inputs()), outputs=tensors(session.get_outputs()))


def _shape(axes: Any) -> tuple[int | str, ...]:
    return tuple(axis if isinstance(axis, int | str) else f"axis{i}" for i, axis in enumerate(axes))


def load(
    file: Path,
    spec: EngineSpec,
    provider: Provider,
    options: OnnxRuntimeOptions,
    *,
    changed: Mapping[str, Array] = NOT_CHANGED,
) -> OnnxRuntimeEngine:
    """Open one saved graph as it is: it was optimised when it was built. Raises EngineError.

    changed: initializers by name that stand in the place of the graph's own; all others are mapped from its file
    """
    session_options = _session_options(threads=options.threads)
    session_options.graph_optimization_level = require().GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider == "cpu":
        _plan_lightly(session_options)
    values = {name: require().OrtValue.ortvalue_from_numpy(array, provider, 0) for name, array in changed.items()}
    for name, value in values.items():
        session_options.add_initializer(name, value)
    if changed:  # a packed copy of every matrix, changed or not, is what a session would keep beside the mapped file
        session_options.add_session_config_entry("session.disable_prepacking", "1")
    if spec.component not in DENOISERS:  # runs once a picture: its threads must not spin while the UNet's work
        session_options.add_session_config_entry("session.force_spinning_stop", "1")
    every_stage = spec.component in DENOISERS or spec.component.startswith(PREFIX)
    recorded = options.cuda_graph and provider == "cuda" and every_stage
    settings = {"enable_cuda_graph": "1"} if recorded else NO_SETTINGS
    return OnnxRuntimeEngine(_session(file, session_options, provider, settings), spec, weights=(values, changed))


def _plan_lightly(options: Any) -> None:
    """Let sessions of this process share the memory that they compute in, and be planned in a tenth of the time.

    Sharing outputs' memory by their shapes' names is planned for each pair of values, which takes most of a session's
    loading; memory that is not needed any more goes back to the common store without a plan too. Measured with the
    `middle` UNet of benchmarks/random_checkpoint.py, ONNX Runtime 1.31: loaded in 0.11 s and not 1.3 s, the same
    peak, the same time a run, the same bits.
    """
    options.enable_mem_reuse = False
    if _share_memory():
        options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _share_memory() -> bool:
    """Have the process hold one store of memory for sessions on the CPU; False where somebody holds one already.

    It is as large as the largest need so far and lasts as long as the process, where sessions' own went with them.
    """
    ort = require()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    names = ("arena_extend_strategy", "initial_chunk_size_bytes", "max_dead_bytes_per_chunk")
    defaults = dict.fromkeys((*names, "initial_growth_chunk_size_bytes"), -1)
    try:
        ort.create_and_register_allocator(place, ort.OrtArenaCfg({"max_mem": 0, **defaults}))
    except Exception:  # ONNX Runtime raises classes of its own; then its sessions have a store each, or that one
        return False
    return True


class OnnxRuntimeEngine:
    """One graph in one session. Output buffers are reused: they hold until the next call with the same shapes."""

    def __init__(self, session: Any, spec: EngineSpec, *, weights: object = None) -> None:
        """Take a session. weights: what it refers to and does not own, kept for as long."""
        self.spec = spec
        self._session, self._weights = session, weights
        self._outputs: dict[tuple[tuple[int, ...], ...], list[Any]] = {}

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the graph. Inputs are converted to the spec's dtypes. Raises EngineError on a wrong name or shape."""
        arrays = self._arrays(inputs)
        shapes = tuple(array.shape for array in arrays.values())
        binding = self._session.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        kept = self._outputs.get(shapes)
        for i, output in enumerate(self.spec.outputs):
            if kept is None:
                binding.bind_output(output.name, "cpu")
            else:
                binding.bind_ortvalue_output(output.name, kept[i])
        self._session.run_with_iobinding(binding)
        if kept is None:
            kept = self._keep(shapes, binding.get_outputs())
        return {output.name: value.numpy() for output, value in zip(self.spec.outputs, kept, strict=True)}

    def new_binding(self) -> Any:
        """Return an empty binding of inputs and outputs to buffers, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: Any, *, graph: int = 0) -> None:
        """Run on a binding's buffers; the work is done when this returns.

        graph: where kernels are recorded, the number of this binding's recording: one for each set of buffers
        """
        options = require().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        self._session.run_with_iobinding(binding, options)

    def _arrays(self, inputs: Inputs) -> dict[str, Array]:
        names = [spec.name for spec in self.spec.inputs]
        if set(inputs) != set(names):
            raise EngineError(f"{self.spec.component} takes {', '.join(names)}, found {', '.join(sorted(inputs))}")
        arrays = {s.name: np.ascontiguousarray(inputs[s.name], dtype=s.dtype) for s in self.spec.inputs}
        for spec in self.spec.inputs:
            if not spec.accepts(arrays[spec.name]):
                raise EngineError(f"{self.spec.component} takes {spec}, found shape {arrays[spec.name].shape}")
        return arrays

    def _keep(self, shapes: tuple[tuple[int, ...], ...], outputs: list[Any]) -> list[Any]:
        if len(self._outputs) >= KEPT_SHAPES:
            del self._outputs[next(iter(self._outputs))]
        self._outputs[shapes] = outputs
        return outputs

    def close(self) -> None:
        """Free the session and its buffers."""
        self._outputs.clear()
        self._session = self._weights = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
