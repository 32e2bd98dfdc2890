"""Prove on any machine, without torch, that a bundle's files are whole and its engines compute the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.engines.backends import BACKENDS
from latentrt.engines.building import find_engines
from latentrt.engines.bundle import Bundle, check_file
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.manifest import EngineRecord
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import Array, BackendName, Engine, Precision

# Largest difference allowed, over the range of the expected values. fp32: other kernels, other summation order.
# fp16: weights and activations carry 11 bits, and errors add up over some hundred layers.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "fp16": 3e-2}
# Pixels are rounded, so a difference far below one level can still move a value by one.
PIXEL_LEVEL = 1 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the verification's table. `error` and `limit` are parts of the expected range, None for files."""

    what: str
    backend: str
    ok: bool
    message: str
    error: float | None = None
    limit: float | None = None


def verify(bundle: Bundle, *, backend: BackendName | None = None, report: Report = silent) -> Iterator[Row]:
    """Check the files' hashes, then each component's golden pair on every backend that can run here.

    backend: only this one; then it is an error, not a remark, if it cannot run here
    """
    yield _verify_files(bundle, report)
    ran = 0
    for name in (backend,) if backend else tuple(BACKENDS):
        try:
            directory, record = find_engines(bundle, name)
        except (EngineError, BundleError) as error:
            if backend or isinstance(error, BundleError) or BACKENDS[name].unavailable() is None:
                yield Row(what="engines", backend=name, ok=False, message=str(error))
            continue
        ran += 1
        yield from _verify_engines(bundle, name, directory, record, report)
    if not ran:
        yield Row(what="engines", backend="any", ok=False, message="no backend here has engines in this bundle")


def _verify_files(bundle: Bundle, report: Report) -> Row:
    files = bundle.manifest.files
    for done, name in enumerate(files):
        report("hash files", done, len(files))
        try:
            bundle.path(name, check="hash")
        except BundleError as error:
            return Row(what="files", backend="", ok=False, message=str(error))
    report("hash files", len(files), len(files))
    return Row(what="files", backend="", ok=True, message=f"{len(files)} files have their recorded SHA-256")


def _verify_engines(
    bundle: Bundle, backend: BackendName, directory: Path, record: EngineRecord, report: Report
) -> Iterator[Row]:
    try:
        for name, file in record.files.items():
            check_file(directory, name, file, check="hash")
    except BundleError as error:
        yield Row(what="engines", backend=backend, ok=False, message=str(error))
        return
    for component, entry in record.entries.items():
        report(f"verify {component} ({backend})", 0, 1)
        try:
            with BACKENDS[backend].load(directory / entry, record.specs[component], None) as engine:
                yield _compare(bundle, backend, component, engine, record.key.precision)
        except (EngineError, BundleError) as error:
            yield Row(what=component, backend=backend, ok=False, message=str(error))
        report(f"verify {component} ({backend})", 1, 1)


def _compare(bundle: Bundle, backend: BackendName, component: str, engine: Engine, precision: Precision) -> Row:
    inputs, expected = read_golden(bundle, component)
    outputs = engine(inputs)
    worst, limit = 0.0, TOLERANCES["fp16" if bundle.manifest.precision == "fp16" else precision]
    for name, output in outputs.items():
        target = to_pixels(expected["sample"]) if name == "pixels" else expected[name]
        if name == "pixels":
            limit = max(limit, PIXEL_LEVEL)
        worst = max(worst, relative_error(output, target))
    ok = worst <= limit  # False for NaN too
    message = "agrees with the recorded fp32 outputs" if ok else "drifts from the recorded fp32 outputs"
    return Row(what=component, backend=backend, ok=ok, message=message, error=worst, limit=limit)


def read_golden(bundle: Bundle, component: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read a component's recorded inputs and fp32 outputs, by tensor name. Raises BundleError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = bundle.path(bundle.manifest.components[component].golden, check="hash")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise BundleError(f"{path} is not a safetensors file ({error}); export the checkpoint again") from None
    split = {
        side: {name.removeprefix(side): array for name, array in arrays.items() if name.startswith(side)}
        for side in ("input.", "output.")
    }
    return split["input."], split["output."]


def relative_error(found: Array, expected: Array) -> float:
    """Return the largest difference over the largest expected magnitude; NaN anywhere gives infinity."""
    if found.shape != expected.shape:
        return float("inf")
    wide, target = found.astype(np.float64), expected.astype(np.float64)
    error = float(np.max(np.abs(wide - target))) / max(float(np.max(np.abs(target))), 1e-12)
    return error if np.isfinite(error) else float("inf")


def to_pixels(sample: Array) -> Array:
    """Turn decoded samples (batch, 3, height, width) in -1..1 into (batch, height, width, 3), uint8."""
    levels = np.clip(sample.astype(np.float32) * np.float32(127.5) + np.float32(127.5), 0, 255)
    return np.asarray(np.rint(levels).transpose(0, 2, 3, 1), dtype=np.uint8)
