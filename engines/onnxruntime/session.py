"""One graph opened in ONNX Runtime, as an engine."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from cachetools import LRUCache

from latentrt.engines.errors import ClosedError, EngineError, NotInstalledError, backend_error
from latentrt.engines.onnxruntime.assignment import check_assignment, elsewhere, record_assignment
from latentrt.engines.onnxruntime.ending import computing
from latentrt.engines.onnxruntime.library import PROVIDERS, Provider, load_cuda_libraries, require
from latentrt.engines.spec import Array, Closing, DType, EngineSpec, Inputs, TensorSpec
from latentrt.engines.tensor_names import COND, HINT

DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_log = logging.getLogger(__name__)

# Output buffers are kept for this many different input shapes, then the oldest are dropped.
KEPT_SHAPES = 8
NOT_RECORDED = -1  # of CUDA graphs' numbers: a recording would read the buffers that it was made on
MOST_RECORDINGS = 64  # of one session, for nothing lets go of one before the session goes
RECORDED: Mapping[str, str] = {"enable_cuda_graph": "1"}
NO_SETTINGS: Mapping[str, str] = {}
NOT_CHANGED: Mapping[str, Array] = {}
NOT_CAPTURED = "cannot use the graph capture feature"
SHARING = threading.Lock()
CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;]*[^;\s]")  # in the middle of a line of C++
# What every session on a GPU is opened with.
CUDA_SETTINGS: Mapping[str, str] = {
    "cudnn_conv_use_max_workspace": "1",
    "enable_skip_layer_norm_strict_mode": "1",  # sums in float32
}


class OnnxRuntimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How sessions run.

    threads: None means one for each physical core
    cuda_graph: record the denoiser's kernels, and the ControlNets', once, and replay them
    tf32: whether a GPU may round float32 products to 19 bits; None: not those of denoisers that compute in float32.
        Without it ONNX Runtime keeps some float16 convolutions off the tensor cores: SD 1.5's VAE decoded in 96 ms
        and not 8.5 on an H200 (benchmarks/results/gpu-h200.json).
    device: which of the visible GPUs, from 0
    settings: further options of the CUDA provider, over `CUDA_SETTINGS`
    """

    threads: int | None = None
    cuda_graph: bool = False
    tf32: bool | None = None
    device: int = 0
    settings: Mapping[str, str] = msgspec.field(default_factory=dict)


def session_options(*, threads: int | None) -> Any:
    options = require().SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors: that a saved graph suits this machine only is what the key says
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # 8 bits between Q and DQ are run as they stand
    return options


def open_session(path: Path, options: Any, provider: Provider, settings: Mapping[str, str] = NO_SETTINGS) -> Any:
    if provider == "cuda":
        load_cuda_libraries()
    providers = [(PROVIDERS[provider], dict(settings))]
    try:  # without the fallback, which prints, and opens the session on the CPU
        with computing():
            session = require().InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own, all straight from Exception
        if failure := CUDA_FAILURE.search(str(error)):
            raise backend_error(f"ONNX Runtime could not start on the GPU: {failure[0]}", str(error)) from error
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
    chosen = session_options(threads=options.threads)
    chosen.graph_optimization_level = require().GraphOptimizationLevel.ORT_DISABLE_ALL
    weights = _change(chosen, changed, provider)
    names = {tensor.name for tensor in spec.inputs}
    every_stage = bool(names & {"timestep", "control"})
    if provider == "cpu":
        _plan_lightly(chosen)
    if not every_stage or names & {COND, HINT}:  # its threads must not spin while the denoiser's work
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
    if provider == "cpu":
        return OnnxRuntimeEngine(open_session(file, chosen, provider), spec, weights=weights)
    record_assignment(chosen)
    settings = cuda_settings(options, spec, every_stage=every_stage)
    try:
        session = open_session(file, chosen, provider, settings)
    except EngineError as error:
        if NOT_CAPTURED not in str(error):
            raise
        raise _not_recordable(file, settings, spec.component) from error
    check_assignment(session, provider, spec.component)
    return OnnxRuntimeEngine(session, spec, weights=weights, recorded=RECORDED.items() <= settings.items())


def _not_recordable(file: Path, settings: Mapping[str, str], component: str) -> EngineError:
    """Return the error of a graph whose kernels cannot be recorded, with what runs on the CPU."""
    options = session_options(threads=None)
    options.graph_optimization_level = require().GraphOptimizationLevel.ORT_DISABLE_ALL
    record_assignment(options)
    session = open_session(file, options, "cuda", {**settings, "enable_cuda_graph": "0"})
    found = elsewhere(session, "cuda") or elsewhere(session, "cuda", light=frozenset())
    named = ", ".join(f"{operator} '{name}'" for name, operator in list(found.items())[:3])
    return EngineError(
        f"{component}'s kernels cannot be recorded as a CUDA graph: {len(found)} of its nodes run on the CPU "
        f"({named}); open the bundle with cuda_graphs=False"
    )


def _change(options: Any, changed: Mapping[str, Array], provider: Provider) -> object:
    """Have a session take other initializers in the place of some. Returns what must live as long as the session."""
    ort = require()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in changed.items()}
    if provider == "cuda" and values:  # it copies them to the GPU; as `add_initializer` they would be left out
        options.add_external_initializers(list(values), list(values.values()))
    elif values:
        for name, value in values.items():
            options.add_initializer(name, value)
        # A packed copy of every matrix, changed or not, is what a session would keep beside the mapped file.
        options.add_session_config_entry("session.disable_prepacking", "1")
    return values, changed


def cuda_settings(options: OnnxRuntimeOptions, spec: EngineSpec, *, every_stage: bool) -> Mapping[str, str]:
    """Return the CUDA provider's options for a component. every_stage: it runs at every stage"""
    half = any(tensor.dtype == "float16" for tensor in spec.inputs)
    tf32 = options.tf32 if options.tf32 is not None else half or not every_stage
    recorded = RECORDED if options.cuda_graph and every_stage else NO_SETTINGS
    return {**on_gpu(options.device), "use_tf32": str(int(tf32)), **recorded, **options.settings}


def on_gpu(device: int) -> Mapping[str, str]:
    """Return what every session on a GPU is opened with. device: which of the visible ones, from 0"""
    # The first is the default. Of one that is named, ONNX Runtime 1.31 warns each time that no plug-in serves it.
    return {**({"device_id": str(device)} if device else {}), **CUDA_SETTINGS}


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


def _share_memory() -> bool:
    """Have the process hold one store of memory for sessions on the CPU; False where somebody holds one already.

    It is as large as the largest need so far and lasts as long as the process, where sessions' own went with them.
    """
    with SHARING:  # sessions are opened side by side
        return _hold_memory()


@functools.cache
def _hold_memory() -> bool:
    ort = require()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    names = ("arena_extend_strategy", "initial_chunk_size_bytes", "max_dead_bytes_per_chunk")
    defaults = dict.fromkeys((*names, "initial_growth_chunk_size_bytes"), -1)
    try:
        ort.create_and_register_allocator(place, ort.OrtArenaCfg({"max_mem": 0, **defaults}))
    except Exception:  # ONNX Runtime raises classes of its own; then its sessions have a store each, or that one
        return False
    return True


class OnnxRuntimeEngine(Closing):
    """One graph in one session. Output buffers are reused: they hold until the next call with the same shapes."""

    def __init__(self, session: Any, spec: EngineSpec, *, weights: object = None, recorded: bool = False) -> None:
        """Take a session.

        weights: what it refers to and does not own, kept for as long; recorded: it records kernels as CUDA graphs
        """
        self.spec, self._recorded = spec, recorded
        self._session, self._weights = session, weights
        self._recordings = 0
        self._outputs: LRUCache[tuple[tuple[int, ...], ...], list[Any]] = LRUCache(KEPT_SHAPES)

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the graph. Inputs are converted to the spec's dtypes. Raises EngineError on a wrong name or shape."""
        arrays = self.spec.arrays(inputs)
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
        self.run_bound(binding)
        if kept is None:
            self._outputs[shapes] = kept = binding.get_outputs()
        return {output.name: value.numpy() for output, value in zip(self.spec.outputs, kept, strict=True)}

    def new_binding(self) -> Any:
        """Return an empty binding of inputs and outputs to buffers, for `run_bound`."""
        return self._open.io_binding()

    def new_recording(self) -> int:
        """Return a number for the recording of a binding's kernels, `NOT_RECORDED` where there is none or enough.

        The first one past enough is told, for what is not recorded is slower.
        """
        if not self._recorded:
            return NOT_RECORDED
        self._recordings += 1
        if self._recordings <= MOST_RECORDINGS:
            return self._recordings
        if self._recordings == MOST_RECORDINGS + 1:
            _log.warning(
                "%s: %d CUDA graphs are recorded, the most there may be; sizes and numbers of pictures that come from "
                "now on are drawn without, and slower; loading the bundle again begins anew",
                self.spec.component,
                MOST_RECORDINGS,
            )
        return NOT_RECORDED

    def run_bound(self, binding: Any, *, graph: int = NOT_RECORDED) -> None:
        """Run on a binding's buffers; the work is done when this returns.

        graph: where kernels are recorded, the number of this binding's recording: one for each set of buffers
        Raises EngineError.
        """
        options = require().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        try:
            with computing():
                self._open.run_with_iobinding(binding, options)
        except Exception as error:  # with a binding a plain RuntimeError, else one of its own classes
            if type(error) is not RuntimeError and not type(error).__module__.startswith("onnxruntime"):
                raise
            sentence = f"ONNX Runtime could not run {self.spec.component}: {_first_line(error)}"
            raise backend_error(sentence, str(error)) from error

    @property
    def _open(self) -> Any:
        """Return the session. Raises ClosedError."""
        if self._session is None:
            raise ClosedError(f"the engine of {self.spec.component} is closed; open the bundle again")
        return self._session

    def with_every_output(self) -> OnnxRuntimeEngine:
        """Return an engine on the same session that gives the graph's other outputs too, where they are of our dtypes.

        Of their shapes its spec says nothing.
        """
        known = {tensor.name for tensor in self.spec.outputs}
        others = [node for node in self._open.get_outputs() if node.name not in known and node.type in DTYPES]
        further = (TensorSpec(name=node.name, dtype=DTYPES[node.type], shape=()) for node in others)
        spec = msgspec.structs.replace(self.spec, outputs=(*self.spec.outputs, *further))
        return OnnxRuntimeEngine(self._open, spec, weights=self._weights)

    def close(self) -> None:
        """Free the session and its buffers."""
        self._outputs.clear()
        self._session = self._weights = None


def spec_of(component: str, session: Any) -> EngineSpec:
    """Return what a session takes and gives."""

    def tensors(nodes: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n.name, dtype=DTYPES[n.type], shape=_shape(n.shape)) for n in nodes)

    return EngineSpec(component=component, inputs=tensors(session.get_inputs()), outputs=tensors(session.get_outputs()))


def _shape(axes: Any) -> tuple[int | str, ...]:
    return tuple(axis if isinstance(axis, int | str) else f"axis{i}" for i, axis in enumerate(axes))
