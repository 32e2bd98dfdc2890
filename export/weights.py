"""Which files hold a network's weights in a folder: one file or shards, plain or a variant, never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.errors import CheckpointError
from latentrt.engines.tensor_files import TensorFile, read_header

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name for a file of weights
VARIANTS = (None, "fp16")  # in order of preference
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """A network's weights in its folder.

    variant: None for model.safetensors, `fp16` for model.fp16.safetensors
    shards: the headers of the files with tensors
    index: the list of what lies in which shard, None for a single file
    """

    variant: str | None
    shards: tuple[TensorFile, ...]
    index: Path | None

    @property
    def paths(self) -> list[Path]:
        """Return every file, the index first."""
        return [*([self.index] if self.index else []), *(shard.path for shard in self.shards)]


def find_weights(folder: Path) -> WeightFiles:
    """Find a network's safetensors and read their headers.

    Raises CheckpointError where there are none, where they are only pickles, or where one is missing or damaged.
    """
    for variant in VARIANTS:
        for stem in STEMS:
            middle = f".{variant}" if variant else ""
            single, index = folder / f"{stem}{middle}.safetensors", folder / f"{stem}.safetensors.index{middle}.json"
            if single.is_file():
                return WeightFiles(variant=variant, shards=(read_header(single),), index=None)
            if index.is_file():
                return WeightFiles(variant=variant, shards=_read_shards(index), index=index)
    if pickles := find_pickles(folder):
        raise CheckpointError(
            f"{folder} holds its weights only as a pickle ({pickles[0].name}), which can run any code when it is "
            "opened; convert it to safetensors, or pass --allow-pickle"
        )
    raise CheckpointError(f"{folder} holds no weights ({STEMS[0]}.safetensors); download the whole checkpoint")


def find_pickles(folder: Path) -> list[Path]:
    """Return the pickles that hold a network's weights: those of one variant, the plain one if it is there."""
    stems = (*STEMS, "pytorch_model")
    found = sorted(path for path in folder.iterdir() if path.suffix in PICKLES and path.name.startswith(stems))
    plain = [path for path in found if "." not in path.stem]
    return plain or [path for path in found if ".fp16" in path.name]


def has_safetensors(folder: Path) -> bool:
    """Say whether a folder holds weights that are no pickle."""
    return any(folder.glob("*.safetensors"))


def _read_shards(index: Path) -> tuple[TensorFile, ...]:
    """Read the header of each shard; every tensor of the index must be in the shard that it names."""
    try:
        places = {str(key): str(name) for key, name in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of weights; download it again") from None
    if any("/" in name or not name.endswith(".safetensors") for name in places.values()):
        raise CheckpointError(f"{index} names a file that is no safetensors file beside it; download it again")
    shards = {name: _read_shard(index.parent / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in shards[name].tensors:
            raise CheckpointError(f"{index} says that '{key}' is in {name}, which has none; download both again")
    return tuple(shards.values())


def _read_shard(path: Path) -> TensorFile:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the whole checkpoint")
    return read_header(path)
