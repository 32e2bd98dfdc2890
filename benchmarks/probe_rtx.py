"""Does TensorRT for RTX accept this GPU? What it says in a minute, one JSON object a line, the verdict last.

    PYTHONPATH=src:FOLDER python benchmarks/probe_rtx.py     # FOLDER: the joined set `rtx` of gpu_pieces.py

Each question in a process of its own, for the library may end it: whether an engine that was built for another GPU is
valid here, and whether one runs that is built for no GPU in particular, or for this one (ComputeCapability.CURRENT).
Running goes through the product's own runtime: deserialize, context, scratch memory, fixed addresses, one run, its CUDA
graph, and the kernels that are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CHANNELS, SIDE = 64, 16
SHAPE = (1, CHANNELS, SIDE, SIDE)
LARGEST_ERROR = 3e-2  # of the largest value: float16
SECONDS = 60  # for each question
CURRENT = "CURRENT"


def main() -> None:
    if len(sys.argv) > 1:
        QUESTIONS[sys.argv[1]]()
        return
    verdict = {}
    for question in QUESTIONS:
        try:
            ended = subprocess.run(
                [sys.executable, "-X", "faulthandler", __file__, question], timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            ended = f"not in {SECONDS} s"
        verdict[question] = "yes" if ended == 0 else f"no (exit code {ended})"
    tell("verdict", **verdict)


def tell(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), flush=True)


def timed(step: str, work: Callable[[], Any]) -> Any:
    """Do a step and tell how long it took, or what went wrong."""
    start = time.perf_counter()
    try:
        result = work()
    except Exception as error:
        tell(step, seconds=round(time.perf_counter() - start, 3), error=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    tell(step, seconds=round(time.perf_counter() - start, 3))
    return result


def library() -> Any:
    """Import the library and tell what meets what."""
    from latentrt.engines.cuda.gpus import find_gpu
    from latentrt.engines.tensorrt.library import require

    found, gpu = timed("import", lambda: require("tensorrt-rtx")), find_gpu()
    served = [name for name in found.ComputeCapability.__members__ if name.startswith("SM")]
    tell("machine", library=found.__version__, gpu=str(gpu), served=served)
    return found


def compiled(folder: Path, found: Any, capability: str | None) -> tuple[Path, Any]:
    """Build the small network as the product builds; return the engine's file and its spec.

    capability: `8.9`, or the GPU here, CURRENT, which the product does not ask for; None for the library's own choice
    """
    from latentrt.engines.build_options import BuildOptions
    from latentrt.engines.cuda.gpus import find_gpu
    from latentrt.engines.progress import silent
    from latentrt.engines.spec import EngineSpec, TensorSpec
    from latentrt.engines.tensorrt import compile as compiler
    from latentrt.engines.tensorrt.compile import compile_graph

    graph, engine = folder / "model.onnx", folder / "probe.engine"
    graph.write_bytes(network("float16").SerializeToString())
    tensors = {name: (TensorSpec(name=name, dtype="float32", shape=("batch", *SHAPE[1:])),) for name in "xy"}
    spec = EngineSpec(component="probe", inputs=tensors["x"], outputs=tensors["y"], profiles=({"batch": 1},))
    options, device = BuildOptions(compute_capability=capability), 0 if find_gpu() else None
    if capability == CURRENT:
        compiler._target = target_here
    plan = timed(
        f"build for {capability or 'any GPU'}",
        lambda: compile_graph(found, graph, spec, options, tf32=False, device=device, what="probe", report=silent),
    )
    engine.write_bytes(plan)
    return engine, spec


def target_here(found: Any, config: Any, _: str) -> None:
    config.num_compute_capabilities = 1
    tell("CURRENT", accepted=config.set_compute_capability(found.ComputeCapability.CURRENT, 0))


def network(dtype: str) -> Any:
    """What a denoiser is made of: convolution, normalisation, SiLU, attention and a sum, between float32 tensors."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    own = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[dtype]
    weights = {
        "kernel": (random.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 24).astype(dtype),
        "ones": np.ones(CHANNELS, dtype),
        "zeros": np.zeros(CHANNELS, dtype),
        **{f"to_{name}": (random.standard_normal((CHANNELS, CHANNELS)) / 8).astype(dtype) for name in "qkv"},
        "heads": np.array([1, 1, CHANNELS, SIDE * SIDE]),
        "picture": np.array([1, CHANNELS, SIDE, SIDE]),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["input"], to=own),
        helper.make_node("Conv", ["input", "kernel"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("GroupNormalization", ["convolved", "ones", "zeros"], ["normal"], num_groups=8),
        helper.make_node("Sigmoid", ["normal"], ["gate"]),
        helper.make_node("Mul", ["normal", "gate"], ["active"]),
        helper.make_node("Reshape", ["active", "heads"], ["columns"]),
        helper.make_node("Transpose", ["columns"], ["tokens"], perm=[0, 1, 3, 2]),
        *(helper.make_node("MatMul", ["tokens", f"to_{name}"], [name]) for name in "qkv"),
        helper.make_node("Attention", ["q", "k", "v"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["rows"], perm=[0, 1, 3, 2]),
        helper.make_node("Reshape", ["rows", "picture"], ["mixed"]),
        helper.make_node("Add", ["mixed", "convolved"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *SHAPE[1:]]) for name in "xy")
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "probe", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def validity() -> None:
    """Ask whether engines that were built for other GPUs are valid here."""
    found = library()
    from latentrt.engines.tensorrt.logger import LogScope

    log, asked = LogScope(found), []
    with tempfile.TemporaryDirectory() as folder:
        for capability in ("8.0", "8.9", "12.0"):
            engine, _ = compiled(Path(folder), found, capability)
            answer, reasons = found.Runtime(log.logger).get_engine_validity(engine.read_bytes())
            names = [
                name for name, one in found.EngineInvalidityDiagnostics.__members__.items() if int(one) & int(reasons)
            ]
            tell("validity", built_for=capability, answer=str(answer), reasons=names, logged=log.lines)
            asked.append(answer == found.EngineValidity.VALID)
    raise SystemExit(0 if any(asked) else 1)


def run(capability: str | None) -> None:
    """Build for a GPU, run it twice over here, and compare it with ONNX Runtime on the CPU."""
    import onnxruntime

    found = library()
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(network("float32").SerializeToString(), providers=providers)
    (expected,) = session.run(None, {"x": x})
    with tempfile.TemporaryDirectory() as folder:
        engine, spec = compiled(Path(folder), found, capability)
        for kernels in ("none", "those that were kept"):
            result = timed(f"open and run; kernels: {kernels}", lambda: draw(found, engine, spec, x))
            error = float(np.abs(result - expected).max() / np.abs(expected).max())
            tell("compare", relative_error=error, right=bool(error <= LARGEST_ERROR))
            if not error <= LARGEST_ERROR:
                raise SystemExit(1)
        kept = {file.name: file.stat().st_size for file in Path(folder).glob("*.kernels")}
        tell("kept", bytes=kept)


def draw(found: Any, engine: Path, spec: Any, x: np.ndarray) -> np.ndarray:
    """Run an engine kernel by kernel, then from its CUDA graph; return what the graph gave."""
    from latentrt.engines.cuda.device import CudaDevice
    from latentrt.engines.cuda.stream import WorkQueue
    from latentrt.engines.tensorrt.engine import TensorRTEngine
    from latentrt.engines.tensorrt.execution import Executor, Kernels, Scratch, open_programs
    from latentrt.engines.tensorrt.profiles import Origin

    device, kernels = CudaDevice(), Kernels(engine.with_suffix(".kernels"))
    queue = WorkQueue(device)
    executor = Executor(queue=queue, scratch=Scratch(queue), graphs=True)
    with queue.lock:
        program = open_programs(found, {"probe": (engine, spec, kernels)}, device)["probe"]
    with TensorRTEngine(executor, program, Origin(bundle=engine, backend="tensorrt-rtx", factor=8)) as one:
        timed("context and first run", lambda: one({"x": x}))
        result = timed("from the graph", lambda: one({"x": x})["y"].copy())
        with queue.lock:
            kernels.keep()
    with queue.lock:
        executor.scratch.close()
        queue.close()
    return result


QUESTIONS: dict[str, Callable[[], None]] = {
    "valid engines of others": validity,
    "runs an engine for any GPU": partial(run, None),
    "runs an engine for this GPU": partial(run, CURRENT),
}

if __name__ == "__main__":
    main()
