"""Weights in pickles, opened only where that was allowed, and then only as weights: nothing else in them is run.

The command line imports no torch, so what a pickle holds is asked of a process of its own:
`python -m latentrt.export.sources.pickles FILE` prints it as JSON.
"""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.engines.bundle.safetensors_header import StoredTensor, TensorFile, bits
from latentrt.engines.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {  # torch's names of what safetensors calls otherwise
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "bool": "BOOL",
}

GROUPS = {"image_proj", "ip_adapter"}  # an IP-Adapter's parts, which safetensors write as the beginnings of names


def read_pickle_header(path: Path) -> TensorFile:
    """Return the names, types and shapes in a pickle, found out in another process. Raises CheckpointError."""
    command = [sys.executable, "-m", "latentrt.export.sources.pickles", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 2:
        raise CheckpointError(result.stderr.strip().splitlines()[-1])
    if result.returncode:
        raise RuntimeError(f"reading {path} failed:\n{result.stderr[-4000:]}")
    rows = json.loads(result.stdout)
    return TensorFile(path=path, tensors={key: _stored(*row) for key, row in rows.items()}, metadata={})


def _stored(dtype: str, shape: list[int]) -> StoredTensor:
    """Describe a tensor whose place in the file is not known: only its size is."""
    name = DTYPES.get(dtype, dtype)
    return StoredTensor(dtype=name, shape=tuple(shape), start=0, end=math.prod(shape) * bits(name) // 8)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, mapped from the file where its format allows. Raises CheckpointError."""
    import torch

    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6, and what is not a pickle at all
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{path} cannot be opened as weights alone ({reason}); convert it to safetensors with a tool that you trust"
        ) from error
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    tensors = found if isinstance(found, dict) else {}
    for group in GROUPS & tensors.keys():
        tensors = tensors | {f"{group}.{key}": value for key, value in tensors[group].items()}
    return {str(key): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def main(path: str) -> None:
    """Print what a pickle holds as JSON, or one sentence on stderr and exit with 2."""
    try:
        tensors = load_pickle(Path(path))
    except CheckpointError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    rows = {key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for key, tensor in tensors.items()}
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
