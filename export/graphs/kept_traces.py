"""Traced graphs without their weights, kept from one export to the next in `traces` in the user's cache folder.

Tracing is most of an export's time, and its result depends on no weight: so another checkpoint of the same config, or
the same one with a ControlNet more, has the graph already. A key holds all that decides a graph; a file that is
damaged counts as none. The folder may be removed at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from latentrt.engines.bundle.files import cache_folder
from latentrt.engines.bundle.staging import staged_file
from latentrt.export.networks.streamed_weights import StoredWeights
from latentrt.export.networks.weight_places import Place, Places

FOLDER = "traces"
LARGEST_BYTES = 256 << 20  # of all files together; a UNet's is 1 to 3 MB
TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "diffusers", "transformers", "numpy")
# Our own code that decides a graph: networks are wrapped and traced in these two folders.
CODE = (Path(__file__).parent, Path(__file__).parent.parent / "networks")
# What a config says of whoever wrote it.
UNRELATED = ("transformers_version", "torch_dtype", "dtype")
PLACES = "latentrt.weights"
DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


def key_of(config: Mapping[str, Any], told: object) -> str:
    """Return the key of a network's graph.

    config: of the checkpoint
    told: whatever else decides the graph, as plain data
    """
    meant = {
        name: value
        for name, value in config.items()
        if name not in UNRELATED and (name == "_class_name" or not name.startswith("_"))
    }
    tools = [importlib.metadata.version(name) for name in TOOLS]
    document = [sys.version, platform.machine(), tools, code_digest(), meant, told]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def code_digest() -> str:
    """Return a digest of our own code that decides a graph."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in CODE for file in folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def graph_of(key: str, weights: StoredWeights, trace: Callable[[], ir.Model]) -> tuple[ir.Model, Places, bool]:
    """Return a network's graph with its weights, which part of them is where, and whether the graph was kept.

    trace: makes the graph; it is called where none is kept, while the weights are withheld
    """
    content = kept_graph(key)
    kept = content is not None
    if content is None:
        with weights.withheld() as stand_ins:
            model = trace()
            content = pack(model, stand_ins.places(model))
        keep_graph(key, content)
    model, places = unpack(content)  # one that was just traced too: so both are the same to the last bit
    weights.fill(model, places)
    return model, places, kept


def pack(model: ir.Model, places: Places) -> bytes:
    """Return a graph with its places as bytes. The weights are taken out of it."""
    for name, place in places.items():
        value = model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            "weights", None, None, ir.DataType.FLOAT, shape=ir.Shape(place.shape), name=name
        )
    noted = {name: dataclasses.asdict(place) for name, place in places.items()}
    model.metadata_props[PLACES] = json.dumps(noted)
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def unpack(content: bytes) -> tuple[ir.Model, dict[str, Place]]:
    """Return the graph and its places from what `pack` gave."""
    model = ir.from_proto(onnx.ModelProto.FromString(content))
    noted = json.loads(model.metadata_props.pop(PLACES))
    for row in noted.values():
        row |= {"shape": tuple(row["shape"]), "strides": tuple(row["strides"])}
    return model, {name: Place(**row) for name, row in noted.items()}


def kept_graph(key: str) -> bytes | None:
    """Return what is kept under a key, None where there is nothing or nothing whole."""
    folder = cache_folder()
    if folder is None:
        return None
    file = folder / FOLDER / key
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):
        file.touch()  # those that nobody asked for longest are removed first
    digest, content = whole[:DIGEST_BYTES], whole[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def keep_graph(key: str, content: bytes) -> None:
    """Keep a packed graph under its key, and remove the oldest where all together are too large.

    Where the folder cannot be written, nothing is kept: it saves time and nothing else.
    """
    folder = cache_folder()
    if folder is None:
        return
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        with staged_file(folder / FOLDER / key) as beside:
            beside.write_bytes(hashlib.sha256(content).digest() + content)
        _remove_oldest(folder / FOLDER)
    except OSError as error:
        _log.warning("the traced graph is not kept for the next export: %s", error)


def _remove_oldest(folder: Path) -> None:
    room = LARGEST_BYTES
    found = [(file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("[!.]*")]
    for _, size, file in sorted(found, reverse=True):
        room -= size
        if room < 0:
            file.unlink(missing_ok=True)
