"""Prove on any machine, without torch, that a bundle's files are whole and its engines compute the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from latentrt.engines.backends import BACKENDS, Backend, Opening, backend_on
from latentrt.engines.bundle.files import Bundle, check_file
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.compare import relative_error, to_pixels
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.find import find_engines, serving_engines
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import Array, BackendName, Engine
from latentrt.engines.tensor_names import FRAMES, PIXELS, SQUARES, level_axes
from latentrt.engines.verify.canonical_view import as_canonical
from latentrt.engines.verify.references import Pair, read_golden, read_references
from latentrt.engines.verify.tolerances import PIXEL_LEVEL, tolerance


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that left the reference. error: the largest difference over the tensor's largest magnitude"""

    tensor: str
    node: str
    op_type: str
    shape: tuple[int, ...]
    error: float

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.node or self.tensor} ({self.op_type}, {shape}): {self.error:.1e}"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the verification's table.

    error, limit: parts of the expected range, None for files
    profile: the sizes at which an engine with fixed shapes was compared, empty for others
    layers: the first that left the reference, in order; see `layers.verify_layers`
    """

    what: str
    backend: str
    ok: bool
    message: str
    error: float | None = None
    limit: float | None = None
    profile: str = ""
    layers: tuple[Layer, ...] = ()


def verify(
    bundle: Bundle, *, backend: BackendName | None = None, device: int = 0, report: Report = silent
) -> Iterator[Row]:
    """Check the files' hashes, then what each component computes on every backend that can run here.

    Engines that take any shape are compared with the golden pairs; of those with fixed shapes every profile is.

    backend: only this one; then it is an error, not a remark, if it cannot run here
    device: which of the visible GPUs to run on, from 0
    """
    yield _verify_files(bundle, report)
    ran = 0
    for name in (backend,) if backend else tuple(BACKENDS):
        try:
            find_engines(bundle, name, device=device)
        except (EngineError, BundleError) as error:
            if backend or isinstance(error, BundleError) or backend_on(name, device).unavailable() is None:
                yield Row(what="engines", backend=name, ok=False, message=str(error))
            continue
        ran += 1
        for directory, record in serving_engines(bundle, name, device=device):
            yield from _verify_engines(bundle, name, backend_on(name, device), directory, record, report)
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
    bundle: Bundle, backend: BackendName, there: Backend, directory: Path, record: EngineRecord, report: Report
) -> Iterator[Row]:
    try:
        for name, file in record.files.items():
            check_file(directory, name, file, check="hash")
    except BundleError as error:
        yield Row(what="engines", backend=backend, ok=False, message=str(error))
        return
    for component in record.entries:
        report(f"verify {component} ({backend})", 0, 1)
        opening = Opening(bundle=bundle, directory=directory, record=record, components=(component,))
        try:
            with contextlib.closing(there.open(opening)) as opened:
                yield from compare_engine(bundle, backend, opened.engines[component], directory, record)
        except (EngineError, BundleError) as error:
            yield Row(what=component, backend=backend, ok=False, message=str(error))
        report(f"verify {component} ({backend})", 1, 1)


def compare_engine(
    bundle: Bundle, backend: BackendName, engine: Engine, directory: Path, record: EngineRecord
) -> Iterator[Row]:
    """Compare with the golden pair; an engine with fixed shapes, in each profile, with the reference of its size.

    directory, record: what the engine was opened from. Raises BundleError and EngineError.
    """
    component = engine.spec.component
    told = bundle.manifest.components[component]
    limit = tolerance(told, bundle.manifest.precision, record.key.precision)
    space, profiles = bundle.manifest.latents, engine.spec.profiles
    if not profiles:
        row = _compare(as_canonical(engine, space), read_golden(bundle, component), limit)
        message = row.message if told.quantised is None else f"{row.message}; {told.quantised.note()}"
        yield msgspec.structs.replace(row, what=component, backend=backend, message=message)
        return
    for profile, pair in zip(profiles, read_references(bundle, component, directory, record), strict=True):
        slots, frames = profile.get("pictures", 1), profile.get("frames", 1)
        rows = profile.get("rows", profile.get("batch", slots))
        pictures = frames if rows % slots or slots % frames else slots  # a window is the reference, again and again
        inputs, expected = ({name: _tiled(name, array, rows) for name, array in side.items()} for side in pair)
        row = _compare(as_canonical(engine, space, pictures=pictures, slots=slots), (inputs, expected), limit)
        words = ", ".join(f"{axis} {size}" for axis, size in profile.items() if axis not in level_axes(1, 1))
        yield msgspec.structs.replace(row, what=component, backend=backend, profile=words)


def _tiled(name: str, array: Array, rows: int) -> Array:
    """Return a reference again and again, as often as it takes to have so many rows; what no row has is as it is."""
    return array if name == FRAMES else np.concatenate([array] * (rows // len(array)))


def _compare(engine: Engine, pair: Pair, limit: float) -> Row:
    inputs, expected = pair
    worst = 0.0
    for name, output in engine(inputs).items():
        if name == SQUARES:
            worst = max(worst, 0.0 if np.isfinite(output).all() else float("inf"))
            continue
        target = to_pixels(expected["sample"]) if name == PIXELS else expected[name]
        if name == PIXELS:
            limit = max(limit, PIXEL_LEVEL)
        worst = max(worst, relative_error(output, target))
    ok = worst <= limit  # False for NaN too
    message = "agrees with the recorded fp32 outputs" if ok else "drifts from the recorded fp32 outputs"
    return Row(what="", backend="", ok=ok, message=message, error=worst, limit=limit)
