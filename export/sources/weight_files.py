"""Which files hold a network's weights in a folder: one file or shards, plain or a variant, never a pickle."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.parsing import ParseError, read_document
from latentrt.engines.bundle.safetensors_header import PICKLES, TensorFile, read_header
from latentrt.engines.errors import CheckpointError

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' name for a file of weights
# In order of preference: by how much of a number is kept, and last what diffusers' scripts keep for training on.
# Any other variant is taken if there is none of these, and no second.
VARIANTS = ("", "fp32", "fp16", "bf16", "non_ema")
FILE = re.compile(
    r"(?P<stem>\w+)(\.(?P<variant>[\w-]+?))?(?P<shard>-\d{5}-of-\d{5})?(\.(?P<legacy>[\w-]+))?"
    r"(\.safetensors(\.index(\.(?P<listed>[\w-]+))?\.json)?|\.bin|\.ckpt|\.pt|\.pth)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """A network's weights in its folder.

    variant: `fp16` for model.fp16.safetensors, None for model.safetensors
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

    Raises CheckpointError if there are none, where they are only pickles, or where one is missing or damaged.
    """
    places = {}  # of each variant, its only file or its index; the first stem counts
    for stem in reversed(STEMS):
        for path in sorted(folder.glob(f"{stem}.*")):
            variant = variant_of(path.name)
            if path.name in (_single(stem, variant), _index(stem, variant)):
                places[variant] = path
    if places:
        variant = choose_variant(places, where=str(folder))
        path = places[variant]
        index = path if path.suffix == ".json" else None
        shards = _read_shards(path) if index else (read_header(path),)
        return WeightFiles(variant=variant or None, shards=shards, index=index)
    if pickles := find_pickles(folder):
        raise CheckpointError(
            f"{folder} holds its weights only as a pickle ({pickles[0].name}), which can run any code when it is "
            "opened; convert it to safetensors, or pass --allow-pickle"
        )
    raise CheckpointError(f"{folder} holds no weights ({STEMS[0]}.safetensors); download the whole checkpoint")


def _single(stem: str, variant: str) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def _index(stem: str, variant: str) -> str:
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def variant_of(name: str) -> str:
    """Return `fp16` for model.fp16.safetensors, its shards and its index; nothing for model.safetensors."""
    found = FILE.fullmatch(name)
    return (found["variant"] or found["legacy"] or found["listed"] or "") if found else ""


def choose_variant(variants: Iterable[str], *, where: str) -> str:
    """Return which variant of a network's weights is read. Raises CheckpointError if nothing tells it.

    variants: at least one; where: the folder, for the error
    """
    found = set(variants)
    known = [variant for variant in VARIANTS if variant in found]
    if not known and len(found) > 1:
        raise CheckpointError(
            f"{where} holds its weights in several variants ({', '.join(sorted(found))}) and in none that is known "
            f"here ({', '.join(VARIANTS[1:])}); in a copy of the checkpoint's directory, keep one of them"
        )
    return (known or sorted(found))[0]


def find_pickles(folder: Path) -> list[Path]:
    """Return the pickles that hold a network's weights: those of the variant that is read. Raises CheckpointError."""
    found = sorted(path for path in folder.iterdir() if is_pickle(path.name))
    if not found:
        return []
    chosen = choose_variant((variant_of(path.name) for path in found), where=str(folder))
    return [path for path in found if variant_of(path.name) == chosen]


def is_pickle(name: str) -> bool:
    """Say whether a file of this name in a network's folder is a pickle with its weights."""
    return name.endswith(PICKLES) and name.startswith((*STEMS, "pytorch_model"))


def has_safetensors(folder: Path) -> bool:
    """Say whether a folder holds weights that are not in a pickle."""
    return any(folder.glob("*.safetensors"))


def _read_shards(index: Path) -> tuple[TensorFile, ...]:
    """Read the header of each shard; every tensor of the index must be in the shard that it names."""
    try:
        document: Any = read_document(index, strict=False)
        places = {str(key): str(name) for key, name in document["weight_map"].items()}
    except (ParseError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not an index of weights; download it again") from None
    if any("/" in name or not name.endswith(".safetensors") for name in places.values()):
        raise CheckpointError(f"{index} names a file that is not a safetensors file beside it; download it again")
    shards = {name: _read_shard(index.parent / name) for name in sorted(set(places.values()))}
    for key, name in places.items():
        if key not in shards[name].tensors:
            raise CheckpointError(f"{index} says that '{key}' is in {name}, which has none; download both again")
    return tuple(shards.values())


def _read_shard(path: Path) -> TensorFile:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the whole checkpoint")
    return read_header(path)
