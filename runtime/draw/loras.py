"""LoRAs of a request: what they add to which networks of a bundle, found out before anything is changed."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle, hash_file, typed
from latentrt.engines.bundle.weight_map import GraphWeights, read_weights
from latentrt.engines.errors import CheckpointError, RequestError
from latentrt.engines.lora.weight_changes import NOTHING, Changes, Delta
from latentrt.engines.spec import QUANTISED
from latentrt.runtime.request import Lora

if TYPE_CHECKING:
    from latentrt.engines.lora.file import LoraFile

State = tuple[str, int, int, int]
KEPT_FILES = 32  # whose names are understood and whose contents are hashed; the matrices stay on the disk


def check_loras(loras: object) -> tuple[Lora, ...]:
    """Return a request's LoRAs. Raises RequestError if they are something else."""
    if isinstance(loras, Lora):
        return (loras,)
    if not isinstance(loras, list | tuple) or not all(isinstance(lora, Lora) for lora in loras):
        raise RequestError(f"loras: found {loras!r}, expected a list of Lora(file=…, scale=…)")
    for lora in loras:
        number = isinstance(lora.scale, int | float | np.number) and not isinstance(lora.scale, bool)
        if not number or not math.isfinite(lora.scale):
            raise RequestError(f"loras: found the scale {lora.scale!r} for '{os.fspath(lora.file)}', expected a number")
    return tuple(loras)


class _Read(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A file whose names are understood. digest: of its contents, and of what lies beside it and belongs to it"""

    lora: LoraFile
    digest: str


class Loras:
    """What LoRA files mean for a bundle. Files are read once, and again when they were written again."""

    def __init__(self, bundle: Bundle) -> None:
        from cachetools import LRUCache  # for what opens a bundle

        self._bundle = bundle
        self._files: LRUCache[tuple[State, ...], _Read] = LRUCache(KEPT_FILES)
        self._shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    def changes(self, loras: Sequence[Lora]) -> Mapping[str, Changes]:
        """Return what LoRAs add to the weights of each component; nothing for a scale of 0.

        The sum is made in the order of the files' hashes, so that it is the same in whichever order they are given.
        Raises RequestError if a file is not a LoRA, or one of another model; BundleError where it is too old.
        """
        given = [lora for lora in loras if lora.scale != 0]
        if not given:
            return NOTHING
        if (precision := self._bundle.manifest.precision) in QUANTISED:
            raise RequestError(
                f"loras: the weights of a bundle in {precision} cannot be changed; export the checkpoint with this "
                "LoRA in it (--lora), or with --precision fp16"
            )
        with self._lock:
            try:
                read = sorted(((self._read(Path(one.file)), float(one.scale)) for one in given), key=_order)
                return self._changes(read)
            except CheckpointError as error:
                raise RequestError(f"loras: {error}") from error

    def _changes(self, read: Sequence[tuple[_Read, float]]) -> dict[str, Changes]:
        deltas: dict[str, dict[str, list[Delta]]] = {}
        keys: dict[str, list[str]] = {}
        for one, scale in read:
            self._require_networks(one.lora)
            for component in one.lora.modules:
                own = deltas.setdefault(component, {})
                for name, delta in self._deltas(one.lora, component, scale).items():
                    own.setdefault(name, []).append(delta)
                keys.setdefault(component, []).append(f"{one.digest} {scale!r}")
        return {name: Changes(key=_digest(keys[name]), deltas=own) for name, own in deltas.items()}

    def _deltas(self, lora: LoraFile, component: str, scale: float) -> dict[str, Delta]:

        from latentrt.engines.lora.file import find_deltas  # for the few requests that have LoRAs

        shapes = self._weight_shapes(component)
        if lora.vectors(component) and all(len(shape) > 1 for shape in shapes.values()):
            raise CheckpointError(
                f"{lora.path} changes biases or normalizations, for which '{self._bundle.root}' has no record, since "
                "an older latentrt exported it; export it again: `latentrt export CHECKPOINT "
                f"{typed(self._bundle.root)} --overwrite`"
            )
        return find_deltas(lora, component, shapes, strength=scale)

    def _require_networks(self, lora: LoraFile) -> None:
        for component in sorted(lora.modules):
            if component not in self._bundle.manifest.components:
                family = self._bundle.manifest.family
                raise CheckpointError(
                    f"{lora.path} changes a {component}, which this bundle ({family}) does not have; "
                    "give a LoRA that was made for its family"
                )

    def _weight_shapes(self, component: str) -> Mapping[str, tuple[int, ...]]:
        if component not in self._shapes:
            record = self._bundle.manifest.components[component].weights
            if record is None:
                raise RequestError(
                    f"loras: '{self._bundle.root}' was exported without a record of which of {component}'s weights is "
                    "which, by an older latentrt or from graphs that another tool made; export the checkpoint itself "
                    f"again: `latentrt export CHECKPOINT {typed(self._bundle.root)} --overwrite`"
                )
            known = read_weights(self._bundle.path(record, check="hash"), GraphWeights).weights
            self._shapes[component] = {name: weight.shape for name, weight in known.items()}
        return self._shapes[component]

    def _read(self, path: Path) -> _Read:

        from latentrt.engines.lora.file import read_lora  # as above
        from latentrt.engines.lora.peft_config import PEFT_CONFIG

        if not path.is_file():
            raise CheckpointError(f"there is no LoRA at '{path}'; give a safetensors file")
        config = path.with_name(PEFT_CONFIG)  # which says how strong PEFT's own files are
        files = [path, *([config] if config.is_file() else [])]
        key = tuple(_state(file) for file in files)
        read = self._files.get(key)
        if read is None:
            read = _Read(lora=read_lora(path), digest=_digest([hash_file(file) for file in files]))
            self._files[key] = read
        return read


def _state(file: Path) -> State:
    """Return what differs when a file was written again."""
    stat = file.stat()
    return str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns


def _order(one: tuple[_Read, float]) -> tuple[str, float]:
    return one[0].digest, one[1]


def _digest(lines: Sequence[str]) -> str:
    import hashlib  # with OpenSSL, for what opens a bundle

    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
