"""ONNX Runtime as it is installed: whether it can run, where its CUDA libraries lie, and that it reports nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
from pathlib import Path
from types import ModuleType
from typing import Literal, cast

from latentrt.engines.cuda.gpus import lacks_gpu
from latentrt.engines.errors import EngineError, NotInstalledError

Provider = Literal["cpu", "cuda"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What its CUDA provider is linked with, or opens itself.
LIBRARIES = frozenset({"libcublas", "libcublasLt", "libcudart", "libcudnn", "libcufft", "libcurand", "libnvrtc"})

_log = logging.getLogger(__name__)


def require() -> ModuleType:
    """Import onnxruntime, or say how to install it."""
    try:
        import onnxruntime
    except ImportError:
        raise NotInstalledError("onnxruntime is not installed", install="pip install 'latentrt[cpu]'") from None
    module = cast(ModuleType, onnxruntime)
    _keep_to_itself(module)
    return module


@functools.cache
def _keep_to_itself(onnxruntime: ModuleType) -> None:
    """Have it report nothing to anybody: what a service draws is its own affair."""
    onnxruntime.disable_telemetry_events()


def unavailable(provider: Provider, *, device: int = 0) -> EngineError | None:
    """Return the error that says why this provider cannot run here, or None.

    device: which of the visible GPUs, from 0; the CPU has 0 alone
    """
    try:
        ort = require()
    except EngineError as error:
        return error
    if PROVIDERS[provider] not in ort.get_available_providers():
        install = "pip uninstall -y onnxruntime && pip install 'latentrt[cuda]'"  # both would be one Python module
        return NotInstalledError("this onnxruntime has no CUDA provider", install=install)
    if provider == "cuda":
        return lacks_gpu(device, "no NVIDIA GPU answers here")
    return None if device == 0 else EngineError(f"it runs on no GPU, and GPU {device} was asked for: omit the device")


@functools.cache
def load_cuda_libraries() -> None:
    """Load CUDA's libraries and cuDNN before the first session that needs them.

    ONNX Runtime looks for them beside itself and where the system does. Here they may come from any of this Python's
    folders: those that another package, such as PyTorch, brought too.
    """
    ort = require()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints what it does not find
        for folder in _library_folders(Path(str(ort.__file__)).parents[1]):
            holds_cudnn = any(folder.glob("libcudnn.so.*"))
            ort.preload_dlls(cuda=not holds_cudnn, cudnn=holds_cudnn, directory=str(folder))
        ort.preload_dlls()
    for line in said.getvalue().splitlines():
        _log.info("onnxruntime.preload_dlls: %s", line)


def _library_folders(beside: Path) -> list[Path]:
    """Return the folders of NVIDIA's packages that lie elsewhere than beside ONNX Runtime, which looks there itself."""
    found = importlib.util.find_spec("nvidia")
    places = (found.submodule_search_locations if found is not None else None) or ()
    elsewhere = [Path(place) for place in places if Path(place).parent != beside]
    files = [file for place in elsewhere for file in sorted(place.glob("*/lib/lib*.so.*"))]
    return list(dict.fromkeys(file.parent for file in files if file.name.partition(".")[0] in LIBRARIES))
