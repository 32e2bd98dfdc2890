"""A machine with a GPU and TensorRT, of which everything is real but the two: graphs are kept for ONNX Runtime to run.

What chooses, builds, stores, opens and verifies engines then runs whole, on a machine with neither.
"""

from __future__ import annotations

import enum
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnx
import pytest

from latentrt.engines import open as choosing
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.cuda.gpus import Gpu
from latentrt.engines.spec import EngineSpec
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import engines
from latentrt.engines.tensorrt import library as trt_library
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library, plan_bytes

L4 = Gpu(name="NVIDIA L4", compute_capability="8.9", sm_count=58, memory_bytes=24 << 30, driver_major=13)
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", sm_count=132, memory_bytes=139 << 30, driver_major=13)
MODULES = tuple(name for names in trt_library.MODULES.values() for name in names)


def install(patch: pytest.MonkeyPatch, *, gpu: Gpu | None = L4, **versions: str) -> HostDevice:
    """Let a GPU answer and the named libraries be installed in these versions; no other is. Returns the device."""
    device = HostDevice()
    for name in MODULES:
        library = None
        if name in versions:
            library = make_library(device, rtx=name.startswith("tensorrt_rtx"))
            library.__name__, library.__version__ = name, versions[name]
            library.__spec__ = ModuleSpec(name, None)  # transformers looks for it when it is imported
            library.ComputeCapability = enum.Enum("ComputeCapability", ["CURRENT", "SM86", "SM89", "SM120"])
        patch.setitem(sys.modules, name, library)
    patch.setattr(trt_library, "find_gpu", lambda: gpu)
    patch.setattr(choosing, "find_gpu", lambda: gpu)
    patch.setattr(engines, "CudaDevice", lambda: device)
    patch.setattr(tensorrt, "compile_graph", keep_graph)
    return device


def keep_graph(library: Any, graph: Path, spec: EngineSpec, options: BuildOptions, **_: Any) -> bytes:
    """Return a plan that the stand-in's runtime opens: the graph itself with the profiles."""
    return plan_bytes(onnx.load(str(graph)), spec)
