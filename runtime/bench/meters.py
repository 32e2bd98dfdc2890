"""Memory and energy: read from the kernel and, where there is an NVIDIA GPU, from NVML."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import msgspec


def peak_rss() -> int:
    """Return the most memory this process has had resident since its program started, in bytes.

    From VmHWM: `ru_maxrss` of a process that was started by a larger one begins at that one's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class GpuMeter(msgspec.Struct, frozen=True):
    """NVML's counters of one GPU: all processes on it are in them."""

    _nvml: Any
    _handle: Any

    def used_bytes(self) -> int:
        """Return the memory in use."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded, or None if the GPU does not count it (before Volta)."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:
            return None


def open_gpu_meter(device: int = 0) -> GpuMeter | None:
    """Open NVML on a GPU by CUDA's number of it, or return None: no library, no driver or no GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMeter(pynvml, pynvml.nvmlDeviceGetHandleByIndex(_known_as(pynvml, device)))
    except (pynvml.NVMLError, ValueError):
        return None


def _known_as(pynvml: Any, device: int) -> int:
    """Return NVML's index of CUDA's device, found by its PCI bus: NVML does not heed CUDA_VISIBLE_DEVICES."""
    from cuda.bindings import runtime as cuda

    code, bus = cuda.cudaDeviceGetPCIBusId(32, device)
    if code != cuda.cudaError_t.cudaSuccess:
        raise ValueError(f"CUDA has no device {device}")
    wanted = bus.partition(b"\0")[0].decode().lower()
    count = int(pynvml.nvmlDeviceGetCount())
    if count == 1:  # in a virtual machine the two may name its bus differently
        return 0
    for index in range(count):
        found = pynvml.nvmlDeviceGetPciInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).busId
        found = (found.decode() if isinstance(found, bytes) else found).lower()
        if found.endswith(wanted):  # NVML writes eight digits of domain, CUDA four
            return index
    raise ValueError(f"NVML does not know the GPU at {wanted}")
