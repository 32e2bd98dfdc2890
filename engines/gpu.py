"""What GPU is here, asked of the driver through cuda-bindings, which returns codes and never crashes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The first visible NVIDIA GPU."""

    name: str
    compute_capability: str
    sm_count: int
    memory_bytes: int
    driver_major: int


def find_gpu() -> Gpu | None:
    """Describe the first NVIDIA GPU, or return None: no bindings, no driver or no GPU."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return None
    code, count = cuda.cudaGetDeviceCount()
    if code != cuda.cudaError_t.cudaSuccess or count < 1:
        return None
    code, properties = cuda.cudaGetDeviceProperties(0)
    if code != cuda.cudaError_t.cudaSuccess:
        return None
    _, driver = cuda.cudaDriverGetVersion()
    return Gpu(
        name=properties.name.decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        sm_count=properties.multiProcessorCount,
        memory_bytes=properties.totalGlobalMem,
        driver_major=driver // 1000,
    )
