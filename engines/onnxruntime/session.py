"""One graph opened in ONNX Runtime, as an engine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np

from latentrt.engines.cuda.gpus import find_gpu, no_gpu
from latentrt.engines.errors import ClosedError, EngineError, NotInstalledError, backend_error
from latentrt.engines.spec import Array, DType, EngineSpec, Inputs
from latentrt.engines.tensor_names import COND, HINT

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

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
# Output buffers are kept for this many different input shapes, then the oldest are dropped.
KEPT_SHAPES = 8
NO_SETTINGS: Mapping[str, str] = {}
NOT_CHANGED: Mapping[str, Array] = {}
# Too heavy for the host: when ONNX Runtime has no kernel for one of these on the device, it would run it on the CPU.
HEAVY = frozenset(
    {"Attention", "Conv", "ConvTranspose", "Gelu", "Gemm", "GroupNormalization", "LayerNormalization", "MatMul"}
)


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
        raise NotInstalledError("onnxruntime is not installed", install="pip install 'latentrt[cpu]'") from None
    return cast(ModuleType, onnxruntime)


def unavailable(provider: Provider) -> EngineError | None:
    """Return the error that says why this provider cannot run here, or None."""
    try:
        ort = require()
    except EngineError as error:
        return error
    if PROVIDERS[provider] not in ort.get_available_providers():
        return NotInstalledError("this onnxruntime has no CUDA provider", install="pip install 'latentrt[cuda]'")
    if provider == "cuda" and find_gpu() is None:
        return no_gpu("no NVIDIA GPU answers here")
    return None


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
        sentence = f"ONNX Runtime refused {path}: {_first_line(error)}; run `latentrt build --force` on this bundle"
        raise backend_error(sentence, str(error)) from error
    if PROVIDERS[provider] not in session.get_providers():  # it falls back to the CPU without a word
        raise NotInstalledError(
            f"ONNX Runtime did not start its {PROVIDERS[provider]} (are CUDA and cuDNN installed? --backend cpu does "
            "without)",
            install="pip install 'latentrt[cuda]'",
        )
    return session


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
    names = {tensor.name for tensor in spec.inputs}
    every_stage = bool(names & {"timestep", "control"})
    if not every_stage or names & {COND, HINT}:  # its threads must not spin while the denoiser's work
        session_options.add_session_config_entry("session.force_spinning_stop", "1")
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
        binding = self._open.io_binding()
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        kept = self._outputs.get(shapes)
        for i, output in enumerate(self.spec.outputs):
            if kept is None:
                binding.bind_output(output.name, "cpu")
            else:
                binding.bind_ortvalue_output(output.name, kept[i])
        self._run(binding)
        if kept is None:
            kept = self._keep(shapes, binding.get_outputs())
        return {output.name: value.numpy() for output, value in zip(self.spec.outputs, kept, strict=True)}

    def new_binding(self) -> Any:
        """Return an empty binding of inputs and outputs to buffers, for `run_bound`."""
        return self._open.io_binding()

    def run_bound(self, binding: Any, *, graph: int = 0) -> None:
        """Run on a binding's buffers; the work is done when this returns.

        graph: where kernels are recorded, the number of this binding's recording: one for each set of buffers
        """
        options = require().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        self._run(binding, options)

    @property
    def _open(self) -> Any:
        """Return the session. Raises ClosedError."""
        if self._session is None:
            raise ClosedError(f"the engine of {self.spec.component} is closed; open the bundle again")
        return self._session

    def _run(self, binding: Any, *options: Any) -> None:
        try:
            self._open.run_with_iobinding(binding, *options)
        except Exception as error:  # with a binding a plain RuntimeError, else one of its own classes
            if type(error) is not RuntimeError and not type(error).__module__.startswith("onnxruntime"):
                raise
            sentence = f"ONNX Runtime could not run {self.spec.component}: {_first_line(error)}"
            raise backend_error(sentence, str(error)) from error

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
