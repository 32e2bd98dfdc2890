"""What a finished component is, and the note of it in the staging directory, from which a later run goes on."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from latentrt.engines.bundle.files import atomic_write, record_file
from latentrt.engines.bundle.manifest import FileRecord
from latentrt.engines.bundle.parsing import ParseError, parse, read_document
from latentrt.engines.bundle.weight_map import graph_record
from latentrt.engines.spec import TensorSpec

MARKERS = ".finished"  # in the staging directory: one file for each finished component, not part of the bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a finished component left: its files below the bundle, and figures.

    error: the largest difference from torch over the output's range, None if there was no torch to compare with
    peak_rss_bytes: the peak memory of the process that did the work, libraries included
    float32_layers, largest_activation: as in the manifest
    graph: whether it was traced now or kept from an earlier export, None if there was one already
    """

    component: str
    files: Mapping[str, FileRecord]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights_bytes: int
    error: float | None
    seconds: float
    peak_rss_bytes: int
    float32_layers: tuple[str, ...] = ()
    largest_activation: float | None = None
    graph: Literal["traced", "kept"] | None = None

    @property
    def graph_files(self) -> tuple[str, ...]:
        """Return the graph and its external data, the graph first."""
        return tuple(sorted(name for name in self.files if name.startswith("onnx/")))

    @property
    def golden(self) -> str:
        """Return the golden pair's path."""
        return golden_path(self.component)

    @property
    def weights(self) -> str | None:
        """Return the path of the record of weights, None if there is none."""
        record = graph_record(self.component)
        return record if record in self.files else None


def graph_path(component: str) -> str:
    """Return where a component's graph lies in a bundle."""
    return f"onnx/{component}/model.onnx"


def golden_path(component: str) -> str:
    """Return where a component's golden pair lies in a bundle."""
    return f"golden/{component}.safetensors"


def weights_bytes(graph: Path) -> int:
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


def write_marker(root: Path, name: str, finished: Finished) -> None:
    """Note that a component is finished, or a phase of it, under a name."""
    marker = root / MARKERS / f"{name}.json"
    with atomic_write(marker) as beside:
        beside.write_text(json.dumps(msgspec.to_builtins(finished)), encoding="utf-8")


def parse_marker(marker: Path) -> Finished:
    """Return what was noted. Raises OSError and ParseError."""
    return parse(Finished, read_document(marker, strict=False))


def read_marker(root: Path, component: str) -> Finished | None:
    """Return what an earlier run left of a component, if all of it is still there and whole."""
    try:
        finished = parse_marker(root / MARKERS / f"{component}.json")
        whole = all(record_file(root, name) == record for name, record in finished.files.items())
    except (OSError, ValueError, ParseError):
        return None
    return finished if whole else None
