"""Which NVIDIA GPUs answer here, and the errors where none does or the one that is asked for does not."""

from __future__ import annotations

import functools
import os
from typing import Any

import msgspec

from latentrt.engines.errors import (
    FORKED,
    RESTART,
    DeviceLostError,
    EngineError,
    NotInstalledError,
    WrongMachineError,
    backend_error,
)

# After one of these every call of this process fails on that GPU, until the process ends.
STICKY = (
    "cudaErrorIllegalAddress",
    "cudaErrorLaunchTimeout",
    "cudaErrorContextIsDestroyed",
    "cudaErrorAssert",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorTensorMemoryLeak",
    "cudaErrorECCUncorrectable",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorContained",
    "cudaErrorExternalDevice",
    "cudaErrorMpsClientTerminated",
)


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """An NVIDIA GPU. index: its number among those that CUDA_VISIBLE_DEVICES shows, from 0"""

    name: str
    compute_capability: str
    sm_count: int
    memory_bytes: int
    driver_major: int
    index: int = 0


def bindings() -> Any:
    """Return cuda-bindings' runtime, None where it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime


def no_bindings() -> NotInstalledError:
    """Return the error of a machine on which CUDA cannot be asked."""
    return NotInstalledError("cuda-bindings is not installed", install="pip install cuda-bindings")


def no_gpu(sentence: str) -> EngineError:
    """Return the error where `find_gpu` finds none: it cannot ask, or there is none. sentence: who needs one"""
    if bindings() is None:
        return no_bindings().within(f"{sentence}: ")
    return WrongMachineError(sentence)


def lacks_gpu(index: int, sentence: str) -> EngineError | None:
    """Return the error that says why a GPU cannot be used, or None where it answers. sentence: who needs one"""
    try:
        return no_gpu(sentence) if find_gpu(index) is None else None
    except EngineError as error:
        return error


def cuda_error(cuda: Any, what: str, code: Any) -> EngineError:
    """Return the error of a code that CUDA answered with: OutOfMemoryError, DeviceLostError or another EngineError.

    cuda: cuda-bindings' runtime; what: was asked, which begins the sentence
    """
    name, text = cuda.cudaGetErrorName(code)[1], cuda.cudaGetErrorString(code)[1]
    words = f"{name.decode()} ({text.decode()})"
    if code.name in STICKY:
        return DeviceLostError(f"{what}: {words}; nothing runs on this GPU until {RESTART}")
    if code == cuda.cudaError_t.cudaErrorInitializationError:
        return DeviceLostError(f"{what}: {words}; {FORKED}")
    return backend_error(f"{what}: {words}", words)


def find_gpu(index: int = 0) -> Gpu | None:
    """Describe an NVIDIA GPU, or return None where there is none at all: no bindings, no driver, or no GPU.

    Raises WrongMachineError where there are GPUs and none of this index, NotInstalledError where the driver is too
    old for the bindings, DeviceLostError in a process that was forked from one that has used CUDA, and EngineError
    with CUDA's words where a driver is there and does not work.
    """
    cuda = bindings()
    if cuda is None or (count := _count(cuda)) == 0:
        return None
    if _first_user() != os.getpid():  # CUDA itself still answers this question there, and the next one not
        raise DeviceLostError(FORKED)
    if not 0 <= index < count:
        found = "1 GPU answers here, number 0" if count == 1 else f"{count} GPUs answer here, numbers 0 to {count - 1}"
        raise WrongMachineError(f"there is no GPU {index}: {found}; see CUDA_VISIBLE_DEVICES")
    code, properties = cuda.cudaGetDeviceProperties(index)
    if code != cuda.cudaError_t.cudaSuccess:
        raise cuda_error(cuda, f"GPU {index} does not answer", code)
    return Gpu(
        name=properties.name.decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        sm_count=properties.multiProcessorCount,
        memory_bytes=properties.totalGlobalMem,
        driver_major=cuda.cudaDriverGetVersion()[1] // 1000,
        index=index,
    )


@functools.cache
def _first_user() -> int:
    """Return the process that was first to use CUDA, of this one and those that it was forked from."""
    return os.getpid()


def _count(cuda: Any) -> int:
    """Return how many GPUs the driver shows, 0 where there is no driver. Raises as `find_gpu`."""
    codes = cuda.cudaError_t
    code, count = cuda.cudaGetDeviceCount()
    if code == codes.cudaSuccess:
        return int(count)
    if code == codes.cudaErrorInsufficientDriver and (served := cuda.cudaDriverGetVersion()[1]):
        raise _too_old(served, cuda.cudaRuntimeGetVersion()[1])
    if code in (codes.cudaErrorInsufficientDriver, codes.cudaErrorNoDevice, codes.cudaErrorStubLibrary):
        return 0
    raise cuda_error(cuda, "NVIDIA's driver is installed and does not work", code)


def _too_old(served: int, needed: int) -> NotInstalledError:
    """Return the error of a driver that is too old. served, needed: CUDA versions as 12040 for 12.4"""
    return NotInstalledError(
        f"NVIDIA's driver serves CUDA {served // 1000}.{served % 1000 // 10} and cuda-bindings here needs "
        f"{needed // 1000}.{needed % 1000 // 10}: update the driver, or take older bindings",
        install=f"pip install 'cuda-bindings<{needed // 1000}'",
    )
