"""What an export takes of the disk and of memory, by the headers of its weights: known before any of it is done."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.bundle.safetensors_header import StoredTensor, read_header, weights_format
from latentrt.engines.bundle.staging import PARTIAL
from latentrt.engines.errors import BundleError
from latentrt.engines.spec import BackendName, Precision
from latentrt.export.sources.diffusers_folder import graph_files
from latentrt.export.sources.parts import PARTS, Source, WeightSource
from latentrt.export.sources.recognise_file import recognise
from latentrt.export.sources.weight_files import find_weights

GB = 1e9
# Measured (benchmarks/full_size_export.py): the libraries, and how often the largest weight is held in float32 where it
# is read, compared and written.
LIBRARIES_BYTES, COPIES = 600_000_000, 7
# Bytes of a number: in the graph that the half of it is made of, and in what the CPU computes with; in the half.
WIDE, NARROW = 4, 2
# How the name of a table of positions ends. A graph holds next to nothing of it, but diffusers makes it anew, in
# float64 and from parts, before it reads the stored one: 4.0 GB for that of 3.5 medium.
TABLE, TABLE_BYTES = "pos_embed", 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes that a component takes of the disk: at most while it is exported, and afterwards.

    numbers: its weights' number; memory: bytes that its largest tensors take beside the libraries
    """

    most: int
    left: int
    numbers: int
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """About how many bytes an export takes: of the disk when it is fullest; of memory, without building engines."""

    disk_bytes: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"about {self.disk_bytes / GB:.3g} GB of disk and {self.memory_bytes / GB:.3g} GB of memory"


def costs(networks: Mapping[str, Path | WeightSource], source: Source, precision: Precision) -> list[Cost]:
    """Return what each network costs, in the order in which they are exported.

    Pickles, which tell nothing before they are opened, count as nothing.
    """
    parts = [PARTS.get(name, name) for name in networks]
    return [
        _cost(network, source, precision, share=parts.count(part))
        for network, part in zip(networks.values(), parts, strict=True)
    ]


def _cost(network: Path | WeightSource, source: Source, precision: Precision, *, share: int) -> Cost:
    """Return what one network costs. share: how many components have their part of these weights each"""
    width = WIDE if precision == "fp32" else NARROW
    if isinstance(network, Path) and source == "onnx":
        size = sum(path.stat().st_size for path in graph_files(network))
        return Cost(most=size, left=size, numbers=size // width)
    found = _tensors(network)
    tensors = [tensor for key, tensor in found.items() if not key.endswith(TABLE)]
    numbers = sum(tensor.size for tensor in tensors) // share
    written = sum(tensor.end - tensor.start for tensor in tensors) if isinstance(network, WeightSource) else 0
    wide, left = numbers * WIDE, numbers * width
    return Cost(
        most=wide + max(written, left if left < wide else 0),
        left=left,
        numbers=numbers,
        memory=max(
            (tensor.size * (TABLE_BYTES if key.endswith(TABLE) else COPIES * WIDE) for key, tensor in found.items()),
            default=0,
        ),
    )


def _tensors(network: Path | WeightSource) -> dict[str, StoredTensor]:
    if isinstance(network, Path):
        return {key: tensor for shard in find_weights(network).shards for key, tensor in shard.tensors.items()}
    found = _tensors(network.beside) if network.beside else {}
    for path in map(Path, network.files):
        if weights_format(path) == "safetensors":
            file = read_header(path)
            whole = recognise(file) if network.layout == "original" else None
            found |= whole.networks().get(network.part, {}) if whole else file.tensors
    return found


def need(each: Sequence[Cost], backends: Iterable[BackendName], *, drawn: bool = False) -> Need:
    """Return what an export takes with the engines of some backends: one component after the other.

    drawn: whether prompts are drawn for 8 bits, by all networks in float32, and the denoiser is tried in it
    """
    held = most = 0
    for cost in each:
        most, held = max(most, held + cost.most), held + cost.left
    for backend in backends:  # an engine holds the weights once more; for the CPU float16 is widened beside it
        for cost in each:
            engine = cost.numbers * WIDE if backend == "cpu" else cost.left
            beside = engine if backend == "cpu" and cost.left < engine else 0
            most, held = max(most, held + engine + beside), held + engine
    memory = LIBRARIES_BYTES + max((cost.memory for cost in each), default=0)
    if drawn:
        most += 2 * WIDE * max((cost.numbers for cost in each), default=0)
        memory = max(memory, LIBRARIES_BYTES + WIDE * sum(cost.numbers for cost in each))
    return Need(disk_bytes=max(most, held), memory_bytes=memory)


def require_room(target: Path, needed: Need) -> str:
    """Say what an export to a path takes and what is free. Raises BundleError where that is too little."""
    free = free_bytes(target)
    if needed.disk_bytes > free:
        raise BundleError(
            f"exporting to '{target}' takes {needed}, and {free / GB:.3g} GB of that disk are free; free some, "
            "give a bundle's path on a larger disk, or take less: --precision fp16, --no-build, or --no-t5 where there "
            "is a T5"
        )
    return f"{needed}; {free / GB:.3g} GB are free"


def free_bytes(target: Path) -> int:
    """Return what is free on the disk of a path, with what earlier runs for it left there, which are gone on with."""
    folder = target.absolute().parent
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    left = [path for old in folder.glob(f".{glob.escape(target.name)}{PARTIAL}*") for path in old.rglob("*")]
    return shutil.disk_usage(there).free + sum(path.stat().st_size for path in left if path.is_file())
