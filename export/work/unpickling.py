"""Open one pickle, in a process that is confined before it does and holds nothing: no network, no file to write to.

`python -m latentrt.export.work.unpickling FILE` writes one line of JSON, what of that the system cannot give
(`confinement.py`), and then the tensors as a safetensors file. If the pickle cannot be opened, it writes one sentence
to stderr and exits with 2.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from latentrt.export.work.confinement import confine

if TYPE_CHECKING:
    from torch import Tensor

# Where Python and the system's libraries are, wherever else its path and the loader's lead.
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/sys/devices/system/cpu"),
    # Not all of /proc: Landlock lets the environment of other processes be read there.
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm"),
)
DTYPES = {  # torch's names of what safetensors calls otherwise
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}
GROUPS = {"image_proj", "ip_adapter"}  # an IP-Adapter's parts, which safetensors write as the beginnings of names


class NotWeightsError(Exception):
    """Why a pickle was not opened, or what in it cannot be written."""


def readable(path: Path) -> Iterator[Path]:
    """Return what the process may read: the pickle, Python and its libraries. No home, but for a Python in it."""
    places = [*sys.path, sys.prefix, sys.base_prefix, *os.environ.get("LD_LIBRARY_PATH", "").split(":"), *SYSTEM]
    yield path
    yield from (Path(place) for place in places if place)


def open_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, mapped from the file where its format allows. Raises NotWeightsError."""
    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6, and what is not a pickle at all
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it is, the file made it so
        raise NotWeightsError(" ".join(str(error).split())[:160]) from error
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = found if isinstance(found, dict) else {}
    for group in GROUPS & tensors.keys():
        tensors = tensors | {f"{group}.{key}": value for key, value in tensors[group].items()}
    return {str(key): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def described(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the head of a safetensors file with these tensors. Raises NotWeightsError for types that it has not."""
    rows, begin = {}, 0
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in DTYPES or str(tensor.layout) != "torch.strided":
            raise NotWeightsError(f"its tensor '{key}' is {kind}, {tensor.layout}")
        end = begin + tensor.numel() * tensor.element_size()
        rows[key] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    head = json.dumps(rows).encode()
    return struct.pack("<Q", len(head)) + head


def write(tensors: Mapping[str, Tensor], stream: IO[bytes]) -> None:
    """Write tensors as a safetensors file, one at a time."""
    import torch

    stream.write(described(tensors))
    stream.flush()
    for tensor in tensors.values():
        stream.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    stream.flush()


def main(path: Path) -> None:
    """Answer for one pickle, on stdout. What libraries print goes to stderr."""
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    stream.write(json.dumps(confine(readable(path))).encode() + b"\n")
    stream.flush()
    try:
        write(open_weights(path), stream)
    except NotWeightsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except BrokenPipeError:  # whoever asked has read enough
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
