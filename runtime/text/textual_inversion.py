"""Textual inversion: learned words, each a few rows of the text encoder's token table, from safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from pathlib import Path

import msgspec
import numpy as np

from latentrt.engines.bundle.safetensors_header import content_format
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array

# What files call the vectors where they do not write the word: then the file's own name is the word.
UNNAMED = ("emb_params", "string_to_param.*", "*")
ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # what files call SDXL's two
ANY = ""  # in place of a text encoder: the file names none
LARGEST_BYTES = 16 << 20  # 75 rows of the widest encoder in float32 are 0.4 MB
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Embedding(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A learned word. vectors: (tokens, width), float32: what the prompt's one word `name` stands for."""

    name: str
    vectors: Array


class LearnedWord(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A word as a file teaches it to text encoders: its vectors by component, each (tokens, width), float32.

    A file that names no encoder has vectors for `ANY`, which is whichever is the only one.
    """

    name: str
    vectors: Mapping[str, Array]

    def fits(self, components: Set[str]) -> bool:
        """Tell whether it was learned for these encoders: not for fewer, and of SDXL's for the second alone too.

        SDXL's refiner has the second alone, and the same as SDXL's.
        """
        if ANY in self.vectors:
            return len(components) == 1
        return self.vectors.keys() - {ENCODERS["clip_l"]} <= components <= self.vectors.keys()

    def taught(self, component: str) -> Embedding:
        """Return what one encoder learns of it."""
        return Embedding(name=self.name, vectors=self.vectors[ANY if ANY in self.vectors else component])

    @property
    def origin(self) -> str:
        """Return in words what it was learned for."""
        named = " and ".join(key for key, component in ENCODERS.items() if component in self.vectors)
        return named or "a single text encoder"


def load_embedding(file: str | os.PathLike[str], *, name: str | None = None) -> LearnedWord:
    """Read a textual-inversion embedding.

    file: safetensors, in diffusers' layout (one tensor, named for the word), the community's (`emb_params`), or that
        of SDXL (`clip_l` and `clip_g`, or one of them)
    name: the word in prompts; None for the file's own: the tensor's name where that is a word, or the file's without
        its ending
    Raises RequestError, which says how to fix it.
    """
    path = Path(file)
    tensors = _read(path)
    if tensors and tensors.keys() <= ENCODERS.keys():
        vectors = {ENCODERS[key]: _check(path, array) for key, array in tensors.items()}
        if len({len(array) for array in vectors.values()}) > 1:
            lengths = ", ".join(f"{len(tensors[key])} in {key}" for key in sorted(tensors))
            raise RequestError(f"{path}: found {lengths}, expected as many tokens for both text encoders")
        return LearnedWord(name=name or path.stem, vectors=vectors)
    if len(tensors) != 1:
        raise RequestError(
            f"{path}: found {len(tensors)} tensors ({_some(tensors)}), expected one embedding, or clip_l and clip_g"
        )
    ((key, array),) = tensors.items()
    word = name or (path.stem if key in UNNAMED else key)
    return LearnedWord(name=word, vectors={ANY: _check(path, array)})


def _read(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize

    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}); give a .safetensors file") from None
    if len(content) > LARGEST_BYTES:
        raise RequestError(f"{path} is larger than {LARGEST_BYTES >> 20} MiB, too large for an embedding")
    if content_format(content) == "pickle":
        raise RequestError(
            f"{path} is a pickle, which can run any code when it is opened; convert it to safetensors first"
        )
    try:
        entries: list[tuple[str, dict[str, object]]] = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise RequestError(f"{path} is not a safetensors file ({error}); download it again") from None
    return {key: _array(path, key, entry) for key, entry in entries}


def _array(path: Path, key: str, entry: dict[str, object]) -> Array:
    kind, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if kind not in DTYPES:
        raise RequestError(f"{path}: {key} is {kind}, expected one of {', '.join(DTYPES)}")
    assert isinstance(shape, list) and isinstance(data, bytes | bytearray)
    values = np.frombuffer(data, dtype=DTYPES[str(kind)])
    if kind == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32).reshape(shape)


def _check(path: Path, vectors: Array) -> Array:
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise RequestError(f"{path}: found the shape {vectors.shape}, expected (tokens, width)")
    if not np.isfinite(vectors).all():
        raise RequestError(f"{path} holds values that are not finite; its training failed, use another one")
    return vectors


def _some(tensors: dict[str, Array]) -> str:
    return ", ".join(sorted(tensors)[:3]) + ", …" * (len(tensors) > 3)
