"""One component's work: load it, record golden pairs, write its graph, check it. Runs in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.bundle import disk_errors, record_file
from latentrt.engines.manifest import FileRecord
from latentrt.engines.parsing import ParseError, parse
from latentrt.engines.spec import Precision, TensorSpec
from latentrt.export import golden
from latentrt.export.checkpoint import Source
from latentrt.export.components import COMPONENTS, Case, input_specs, output_specs

CASES: tuple[Case, ...] = ("traced", "odd")  # the golden pair's sizes, and others the graph must hold at
MARKERS = ".finished"  # in the staging directory: one file for each finished component, not part of the bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process must know. `folder` holds the weights or the graph, `root` is the staged bundle."""

    component: str
    source: Source
    folder: str
    root: str
    precision: Precision
    dimensions: Mapping[str, int]
    scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a finished component left: its files below the bundle, and figures.

    error: the largest difference from torch over the output's range
    peak_rss_bytes: the peak memory of the process that did the work, libraries included
    """

    component: str
    files: Mapping[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_bytes: int
    error: float
    seconds: float
    peak_rss_bytes: int

    @property
    def graph_files(self) -> tuple[str, ...]:
        """Return the graph and its external data, the graph first."""
        return tuple(sorted(name for name in self.files if name.startswith("onnx/")))

    @property
    def golden(self) -> str:
        """Return the golden pair's path."""
        return golden_path(self.component)


def graph_path(component: str) -> str:
    """Return where a component's graph lies in a bundle."""
    return f"onnx/{component}/model.onnx"


def golden_path(component: str) -> str:
    """Return where a component's golden pair lies in a bundle."""
    return f"golden/{component}.safetensors"


def run_job(job: Job) -> Finished:
    """Do one component's work and leave its marker. Raises CheckpointError and BundleError (disk)."""
    start = time.perf_counter()
    root = Path(job.root)
    with disk_errors(root):
        files, takes, gives, error = _from_torch(job) if job.source == "torch" else _from_onnx(job)
        names = [path.relative_to(root).as_posix() for path in files]
        finished = Finished(
            component=job.component,
            files={name: record_file(root, name) for name in (*names, golden_path(job.component))},
            inputs=takes,
            outputs=gives,
            weights_bytes=_weights_bytes(files[0]),
            error=error,
            seconds=round(time.perf_counter() - start, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )
        _write_marker(root, finished)
    return finished


Made = tuple[list[Path], tuple[TensorSpec, ...], tuple[TensorSpec, ...], float]
"""The graph's files, the graph first; its inputs, its outputs; its error."""


def _from_torch(job: Job) -> Made:
    import torch

    from latentrt.export import graphs, modules

    component = COMPONENTS[job.component]
    takes = input_specs(component, job.dimensions, job.precision)
    gives = output_specs(component, job.dimensions, job.precision)
    module = modules.load(job.component, Path(job.folder))
    pairs = []
    for which in CASES:
        inputs = golden.make_inputs(
            component, job.dimensions, which, precision=job.precision, scaling_factor=job.scaling_factor
        )
        pairs.append((inputs, modules.run(module, inputs, [spec.name for spec in gives])))
    if job.precision == "fp16":
        module.half()
    traced = {name: torch.from_numpy(array) for name, array in pairs[0][0].items()}
    path = Path(job.root) / graph_path(job.component)
    smallest = component.smallest(job.dimensions)
    files = graphs.export_graph(module, traced, takes, gives, path, smallest=smallest)
    del module, traced  # before ONNX Runtime maps the same weights
    error = golden.check_graph(job.component, path, pairs, precision=job.precision)
    golden.save_golden(Path(job.root) / golden_path(job.component), *pairs[0])
    return files, takes, gives, error


def _from_onnx(job: Job) -> Made:
    from latentrt.export import optimum

    root = Path(job.root)
    return optimum.adopt_graph(
        COMPONENTS[job.component],
        Path(job.folder),
        root / graph_path(job.component),
        root / golden_path(job.component),
        dimensions=job.dimensions,
        precision=job.precision,
        scaling_factor=job.scaling_factor,
    )


def _weights_bytes(graph: Path) -> int:
    """Sum the weights of a written graph, external ones included."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    sizes = {0: 0, 1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}  # bytes of TensorProto's element types
    total = 0
    for tensor in model.graph.initializer:
        count = 1
        for side in tensor.dims:
            count *= side
        total += count * sizes.get(tensor.data_type, 4)
    return total


def peak_rss_bytes() -> int:
    """Return the largest resident size this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write_marker(root: Path, finished: Finished) -> None:
    marker = root / MARKERS / f"{finished.component}.json"
    marker.parent.mkdir(exist_ok=True)
    beside = marker.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(dataclasses.asdict(finished)), encoding="utf-8")
    beside.replace(marker)


def read_marker(root: Path, component: str) -> Finished | None:
    """Return what an earlier run left of a component, if all of it is still there and whole."""
    marker = root / MARKERS / f"{component}.json"
    try:
        finished = parse(Finished, json.loads(marker.read_text(encoding="utf-8")))
        whole = all(record_file(root, name) == record for name, record in finished.files.items())
    except (OSError, ValueError, ParseError):
        return None
    return finished if whole else None
