"""A machine with a GPU and TensorRT, of which everything is real but the two: graphs are kept for ONNX Runtime to run.

What chooses, builds, stores, opens and verifies engines then runs whole, on a machine with neither.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.cuda import gpus
from latentrt.engines.cuda.gpus import Gpu
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import engines
from latentrt.engines.tensorrt import library as trt_library
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, plan_bytes

L4 = Gpu(name="NVIDIA L4", compute_capability="8.9", sm_count=58, memory_bytes=24 << 30, driver_major=13)
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", sm_count=132, memory_bytes=139 << 30, driver_major=13)
OTHER_CODES = (
    "cudaErrorNoDevice",
    "cudaErrorInsufficientDriver",
    "cudaErrorStubLibrary",
    "cudaErrorInitializationError",
    "cudaErrorSystemDriverMismatch",
    "cudaErrorMemoryAllocation",
)
MODULES = tuple(name for names in trt_library.MODULES.values() for name in names)


def bindings_of(found: Sequence[Gpu], *, answer: str = "cudaSuccess", driver: int = 13000) -> Any:
    """Return cuda-bindings' runtime on a machine with some GPUs, as far as it is asked which there are.

    answer: its code for how many; driver: the CUDA version that the driver serves, 13000 for 13.0
    """
    codes = enum.Enum("cudaError_t", ["cudaSuccess", *gpus.STICKY, *OTHER_CODES])

    def properties(index: int) -> tuple[Any, Any]:
        gpu = found[index]
        major, minor = map(int, gpu.compute_capability.split("."))
        named = {"name": gpu.name.encode(), "major": major, "minor": minor}
        return codes.cudaSuccess, SimpleNamespace(
            **named, multiProcessorCount=gpu.sm_count, totalGlobalMem=gpu.memory_bytes
        )

    return SimpleNamespace(
        cudaError_t=codes,
        cudaGetDeviceCount=lambda: (codes[answer], len(found)),
        cudaGetDeviceProperties=properties,
        cudaDriverGetVersion=lambda: (codes.cudaSuccess, driver),
        cudaRuntimeGetVersion=lambda: (codes.cudaSuccess, 13050),
        cudaGetErrorName=lambda code: (codes.cudaSuccess, code.name.encode()),
        cudaGetErrorString=lambda code: (codes.cudaSuccess, b"words"),
    )


def install(patch: pytest.MonkeyPatch, *, gpu: Gpu | None = L4, **versions: str) -> HostDevice:
    """Let a GPU answer and the named libraries be installed in these versions; no other is. Returns the device."""
    return install_several(patch, (gpu,) if gpu else (), **versions)[0]


def install_several(patch: pytest.MonkeyPatch, found: Sequence[Gpu], **versions: str) -> list[HostDevice]:
    """Let GPUs answer and the named libraries be installed in these versions; no other is. Returns the devices."""
    devices = [HostDevice(index) for index in range(max(len(found), 1))]
    for name in MODULES:
        library = None
        if name in versions:
            library = make_library(devices[0], others=devices[1:], rtx=name.startswith("tensorrt_rtx"))
            library.__name__, library.__version__ = name, versions[name]
            library.__spec__ = ModuleSpec(name, None)  # transformers looks for it when it is imported
            library.ComputeCapability = enum.Enum("ComputeCapability", ["CURRENT", "SM86", "SM89", "SM120"])
        patch.setitem(sys.modules, name, library)
    patch.setattr(gpus, "bindings", lambda: bindings_of(found))
    patch.setattr(engines, "CudaDevice", lambda index: devices[index])
    patch.setattr(tensorrt, "compile_graph", keep_graph)
    return devices


def keep_graph(library: Any, graph: Path, spec: EngineSpec, options: BuildOptions, **_: Any) -> bytes:
    """Return a plan that the stand-in's runtime opens: the graph itself with the profiles."""
    return plan_bytes(onnx.load(str(graph)), spec)
