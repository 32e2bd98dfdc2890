"""Tokenizers of checkpoints, each as one tokenizer.json: CLIP's is transformers' own. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentrt.engines.bundle.manifest import TokenizerSpec
from latentrt.engines.errors import CheckpointError, library_failed
from latentrt.export.sources.diffusers_folder import read_json
from latentrt.export.sources.unigram import read_unigram

if TYPE_CHECKING:
    from transformers import CLIPTokenizerFast

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
DEFAULT_LENGTH = 77
UNBOUNDED = 10**6  # a model_max_length above this is transformers' way to say "not given"
# What would change the ids of every prompt, and no tokenizer of a Stable Diffusion has otherwise.
SETTINGS: Mapping[str, Any] = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}


UNIGRAM = ("tokenizer_3",)  # read as T5's, and all others as CLIP's


class Vocabulary(Protocol):
    """A tokenizer that was read from a checkpoint."""

    def write(self, root: Path, relative: str) -> TokenizerSpec:
        """Write tokenizer.json at root/relative and return what the manifest says about it."""

    def write_files(self, folder: Path) -> None:
        """Write what transformers reads, for other tools that open the bundle."""

    def dimensions(self) -> dict[str, int]:
        """Name the ids that golden inputs of its text encoder are made of."""

    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Return tokens of real prompts, where its text encoder is shown those."""


@dataclass(frozen=True, slots=True)
class ClipVocabulary:
    """CLIP's tokenizer, as transformers reads it."""

    tokenizer: CLIPTokenizerFast

    def write(self, root: Path, relative: str) -> TokenizerSpec:
        return write_tokenizer(self.tokenizer, root, relative)

    def write_files(self, folder: Path) -> None:
        write_clip_files(self.tokenizer, folder)

    def dimensions(self) -> dict[str, int]:
        return token_dimensions(self.tokenizer)

    def texts(self) -> tuple[tuple[int, ...], ...]:
        return ()


def read_vocabulary(
    name: str, folder: Path, *, rows: int | None = None, special: Mapping[str, str] | None = None
) -> Vocabulary:
    """Read a checkpoint's tokenizer of a name. Arguments and errors are those of `read_tokenizer`."""
    if name in UNIGRAM:
        return read_unigram(folder, rows=rows)
    return ClipVocabulary(read_tokenizer(folder, rows=rows, special=special))


def read_tokenizer(
    folder: Path, *, rows: int | None = None, special: Mapping[str, str] | None = None
) -> CLIPTokenizerFast:
    """Read a folder with vocab.json and merges.txt, or with tokenizer.json, and the words that were added to them.

    rows: how many tokens the text encoder has vectors for; None if it is not known
    special: special tokens by their roles that hold whatever the folder says
    Raises CheckpointError.
    """
    from transformers import CLIPTokenizerFast  # in transformers 5 another name of CLIPTokenizer

    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not pair and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json; add them")
    for path in sorted(folder.glob("*.json")):  # the libraries' own words name neither the file nor how to fix it
        read_json(path)
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, **(special or {}))
        tokenizer("a")  # it may be read, and fail then
    except BaseException as error:  # what a damaged file leads to, in two libraries
        if not library_failed(error):
            raise
        raise CheckpointError(
            f"{folder}: transformers cannot read this tokenizer ({' '.join(str(error).split())}); "
            "download its files again"
        ) from None
    _require_clip(folder, tokenizer)
    _require_declared_ids(folder, tokenizer)
    if rows is not None:
        _require_rows(folder, tokenizer, rows)
    return tokenizer


def write_tokenizer(tokenizer: CLIPTokenizerFast, root: Path, relative: str) -> TokenizerSpec:
    """Write tokenizer.json at root/relative and return what the manifest says about it."""
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
    return TokenizerSpec(
        file=relative,
        max_length=_max_length(tokenizer),
        begin_id=tokenizer.bos_token_id,
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def write_clip_files(tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Write the four files that every version of transformers reads, for other tools that open the bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = {role: str(getattr(tokenizer, role)) for role in ROLES}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": _max_length(tokenizer),
        **special,
        "added_tokens_decoder": {id: token.__getstate__() for id, token in tokenizer.added_tokens_decoder.items()},
    }
    documents = {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"]),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")


def token_dimensions(tokenizer: CLIPTokenizerFast) -> dict[str, int]:
    """Name the ids that the golden inputs of a text encoder begin and end with."""
    return {"begin_token": tokenizer.bos_token_id, "end_token": tokenizer.eos_token_id}


def _max_length(tokenizer: CLIPTokenizerFast) -> int:
    length = tokenizer.model_max_length
    return length if isinstance(length, int) and 2 < length < UNBOUNDED else DEFAULT_LENGTH


def _require_clip(folder: Path, tokenizer: CLIPTokenizerFast) -> None:
    if not any(entry.endswith("</w>") for entry in tokenizer.get_vocab()):
        raise CheckpointError(f"{folder} is not a CLIP tokenizer (byte pairs with '</w>'); it is not supported")
    for name, expected in SETTINGS.items():
        if (found := getattr(tokenizer, name)) != expected:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json $.{name}: found {found!r}, expected {expected!r}; "
                "other values are not supported"
            )


def _require_declared_ids(folder: Path, tokenizer: CLIPTokenizerFast) -> None:
    """Refuse added words that transformers numbers differently than the files do: the right vector is unknown."""
    for id, token in tokenizer.init_kwargs.get("added_tokens_decoder", {}).items():
        if (read := tokenizer.convert_tokens_to_ids(str(token))) != id:
            raise CheckpointError(
                f"{folder}: the added word '{token}' has the id {id} in the files and {read} as transformers reads "
                "them, which counts on from the vocabulary; save the tokenizer again without gaps"
            )


def _require_rows(folder: Path, tokenizer: CLIPTokenizerFast, rows: int) -> None:
    word, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise CheckpointError(
            f"{folder}: the word '{word}' has the id {largest} and the text encoder has vectors for {rows} tokens "
            "(vocab_size); give the text encoder that was saved with this tokenizer, or remove the word"
        )
