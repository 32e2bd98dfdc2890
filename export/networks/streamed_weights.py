"""A network whose weights stay in their files: a layer reads its own when it computes, and forgets them after.

The libraries load a checkpoint without reading it: they map its files, and a weight is a window of a mapping. A
network that computes touches all of them, and the whole file is resident. So the windows are looked up in the
kernel's list of mappings, and each is read from its file when it is wanted, into memory that is free again at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from latentrt.export.networks.weight_places import Place, Places, StandIns
from latentrt.export.sources.weight_files import WeightFiles

MAPPINGS = Path("/proc/self/maps")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Smaller weights are numbers for the tracer, not memory that nobody has written to: it computes with up to 8192.
LARGE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Where a tensor lies in a file, `offset` bytes from its beginning."""

    path: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        """Return the tensor in memory of its own."""
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, count=size, offset=self.offset)
        return torch.from_numpy(raw).view(self.dtype).reshape(self.shape)


def windows(tensors: dict[str, Tensor]) -> dict[str, Window]:
    """Return where in mapped files tensors lie: of those that do, and whose numbers are one after the other.

    Empty where the system has no list of mappings, which costs memory and nothing else.
    """
    mappings = list(_mappings())
    found = {name: _window(tensor, mappings) for name, tensor in tensors.items() if tensor.is_contiguous()}
    return {name: window for name, window in found.items() if window is not None}


def _mappings() -> Iterator[tuple[int, int, int, str]]:
    """Yield the first and the last address, the offset in the file and the path of each mapped file."""
    lines = MAPPINGS.read_text(encoding="utf-8").splitlines() if MAPPINGS.exists() else []
    for line in lines:
        addresses, _, offset, _, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and not path[0].endswith(" (deleted)"):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            yield start, stop, int(offset, 16), path[0]


def _window(tensor: Tensor, mappings: list[tuple[int, int, int, str]]) -> Window | None:
    first = tensor.data_ptr()
    for start, stop, offset, path in mappings:
        if start <= first and first + tensor.nbytes <= stop and tensor.nbytes:
            return Window(path=path, offset=offset + first - start, dtype=tensor.dtype, shape=tensor.shape)
    return None


def stored_dtype(files: WeightFiles) -> torch.dtype:
    """Return the type that all of a network's weights are stored in, float32 where they are of several."""
    kinds = {stored.dtype for shard in files.shards for stored in shard.tensors.values() if "F" in stored.dtype}
    (kind,) = kinds if len(kinds) == 1 else ("F32",)
    return DTYPES.get(kind, torch.float32)


class StoredWeights:
    """The weights of a network that the libraries have just loaded. They are taken out of it.

    It computes inside `lent`, and is traced inside `withheld`; its weights are float32 then, whatever they are stored
    in. Weights that lie in no mapped file stay in memory, in the type that they have there.
    """

    def __init__(self, module: nn.Module) -> None:
        names = {weight: name for name, weight in module.named_parameters()}
        # A weight that several layers share has several names; each is the first one's.
        self._first = {name: names[weight] for name, weight in module.named_parameters(remove_duplicate=False)}
        self._kept = {name: weight.data for weight, name in names.items()}
        self._windows = windows(self._kept)
        for name in self._windows:
            del self._kept[name]
        self._owners = [
            (owner, {key: names[weight] for key, weight in owner.named_parameters(recurse=False)})
            for owner in module.modules()
        ]
        self._buffers = dict(module.named_buffers())
        for buffer in self._buffers.values():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()
        self._put(self._absent)

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name of a weight, as the network's state has them."""
        return tuple(self._first)

    def read(self, name: str) -> Tensor:
        """Return a weight in float32."""
        name = self._first[name]
        weight = self._kept[name] if name in self._kept else self._windows[name].read()
        return weight.float() if weight.is_floating_point() else weight

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the block runs, each layer has its weights as long as it computes."""
        handles: list[Any] = []
        for owner, names in self._owners:
            if names:
                handles.append(owner.register_forward_pre_hook(partial(self._lend, names)))
                handles.append(owner.register_forward_hook(partial(self._take_back, names), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def withheld(self) -> Iterator[StandIns]:
        """While the block runs, the network can be traced, with stand-ins for all of its float weights.

        A graph that was traced with them is for all weights: `fill` gives it these.
        """
        stand_ins = StandIns()
        self._put(partial(self._stand_in, stand_ins))
        try:
            yield stand_ins
        finally:
            self._put(self._absent)

    def fill(self, model: ir.Model, places: Places) -> None:
        """Put the weights in a graph that was traced with stand-ins; each is read when it is written or looked at."""
        for name, place in places.items():
            read = partial(self._part, place)
            shape = ir.Shape(place.shape)
            tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name)
            model.graph.initializers[name].const_value = tensor

    def first(self, name: str) -> str:
        """Return the first name of a weight that several layers may share."""
        return self._first[name]

    def shape(self, name: str) -> torch.Size:
        """Return a weight's shape."""
        name = self._first[name]
        return self._windows[name].shape if name in self._windows else self._kept[name].shape

    def structure(self) -> object:
        """Return all that a trace with stand-ins still sees of the network's tensors, as plain data."""
        digest = hashlib.sha256()
        others = [self.read(name) for name, weight in self._kept.items() if not weight.is_floating_point()]
        for tensor in (*self._buffers.values(), *others):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return [{name: [first, *self.shape(first)] for name, first in self._first.items()}, digest.hexdigest()]

    def _part(self, place: Place) -> ir.TensorProtocol:
        return ir.Tensor(place.of(self.read(place.weight).numpy()))

    def _put(self, make: Callable[[str], Tensor]) -> None:
        made: dict[str, nn.Parameter] = {}  # what is one weight in two layers stays one
        for owner, names in self._owners:
            for key, name in names.items():
                if name not in made:
                    made[name] = nn.Parameter(make(name), requires_grad=False)
                owner.register_parameter(key, made[name])

    def _absent(self, name: str) -> Tensor:
        """Return a tensor with no numbers: what computes with it outside its layer's own turn fails."""
        return torch.empty(self.shape(name), device="meta")

    def _stand_in(self, stand_ins: StandIns, name: str) -> Tensor:
        weight = self._kept.get(name)
        if weight is not None and not weight.is_floating_point():
            return self.read(name)
        shape = self.shape(name)
        numbers = stand_ins.numbers(name, shape) if math.prod(shape) < LARGE else None
        if numbers is not None:
            return torch.from_numpy(numbers)
        tensor = torch.empty(shape)  # it has addresses and no pages, as long as nobody writes to it
        stand_ins.memory(name, tensor.data_ptr(), tensor.numel())
        return tensor

    def _lend(self, names: dict[str, str], owner: nn.Module, _: Any) -> None:
        for key, name in names.items():
            owner.register_parameter(key, nn.Parameter(self.read(name), requires_grad=False))

    def _take_back(self, names: dict[str, str], owner: nn.Module, *_: Any) -> None:
        for key, name in names.items():
            owner.register_parameter(key, nn.Parameter(self._absent(name), requires_grad=False))
