"""The machine and the versions of a figure, and how busy other processes kept it during the run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from latentrt.engines.cuda import gpus
from latentrt.engines.spec import Document

PACKAGES = (
    "latentrt",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-lean-cu13-bindings",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
)


class GpuFacts(Document, frozen=True, kw_only=True):
    """The GPU that figures were measured on, as its driver names it."""

    name: str
    compute_capability: str
    memory_gib: float
    driver_major: int


class Machine(Document, frozen=True, kw_only=True):
    """Where figures were measured.

    processor: its name, and its widest vector instructions
    cores: those that this process may use
    versions: of the packages that matter here, as far as they are installed
    """

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    gpu: GpuFacts | None
    versions: Mapping[str, str]


class Conditions(Document, frozen=True, kw_only=True):
    """How quiet the machine was: figures taken beside other work are worth less, and this tells.

    load_before: runnable processes in the minute before the start
    others_share: part of all cores' time that processes other than the measured ones used; null where unknown
    stolen_share: part of all cores' time that the host of this virtual machine gave to others; null where unknown
    """

    load_before: float
    others_share: float | None
    stolen_share: float | None


def describe_machine(device: int = 0) -> Machine:
    """Return the processor, its cores, the memory, the GPU of that number, and the versions of what is installed."""
    gpu = gpus.find_gpu(device)
    return Machine(
        processor=processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        gpu=None
        if gpu is None
        else GpuFacts(
            name=gpu.name,
            compute_capability=gpu.compute_capability,
            memory_gib=round(gpu.memory_bytes / 2**30, 1),
            driver_major=gpu.driver_major,
        ),
        versions={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def describe() -> dict[str, Any]:
    """Return `describe_machine()` as plain data."""
    plain: dict[str, Any] = msgspec.to_builtins(describe_machine())
    return plain


def processor() -> str:
    """Return the processor's name as the kernel gives it, and the widest vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    widest = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "baseline")
    return f"{name} ({widest})"


def differences(before: Machine, after: Machine) -> list[str]:
    """Name what differs between two machines, `field: before, after` each, versions one by one."""
    old, new = _flat(before), _flat(after)
    names = dict.fromkeys([*old, *new])
    return [f"{n}: {old.get(n, 'none')}, {new.get(n, 'none')}" for n in names if old.get(n) != new.get(n)]


def _flat(machine: Machine) -> dict[str, object]:
    plain: dict[str, Any] = msgspec.to_builtins(machine)
    gpu, versions = plain.pop("gpu"), plain.pop("versions")
    named = {f"gpu {name}": value for name, value in (gpu or {}).items()}
    return {**plain, **named, **versions}


class Watch:
    """Watches how busy others keep the machine, from its making to `conditions()`."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._ours = _own_seconds()
        self._all = _machine_ticks()

    def conditions(self) -> Conditions:
        """Return what was seen up to now."""
        now = _machine_ticks()
        if now is None or self._all is None:
            return Conditions(load_before=self._load, others_share=None, stolen_share=None)
        total, busy, stolen = (after - before for after, before in zip(now, self._all, strict=True))
        ours = (_own_seconds() - self._ours) * os.sysconf("SC_CLK_TCK")
        return Conditions(
            load_before=round(self._load, 2),
            others_share=round(max(0.0, busy - ours) / max(total, 1.0), 3),
            stolen_share=round(stolen / max(total, 1.0), 3),
        )


def _own_seconds() -> float:
    mine = os.times()
    return mine.user + mine.system + mine.children_user + mine.children_system


def _machine_ticks() -> tuple[float, float, float] | None:
    """Return all ticks, those that processes here used, and those that were stolen, since boot; all cores together."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, wait, irq, softirq, steal = map(float, line.split()[1:9])
    busy = user + nice + system + irq + softirq
    return busy + idle + wait + steal, busy, steal


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
