"""CLIP's tokenizer as one tokenizer.json, made with the `tokenizers` library alone.

The rules are those of the CLIP paper's byte-level pairs: normalise to NFC, collapse white space, lower-case, split into
letters, single digits and runs of other signs, then merge bytes; a word's last piece carries `</w>`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from latentrt.engines.errors import CheckpointError
from latentrt.engines.manifest import TokenizerSpec

DEFAULT_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
DEFAULT_LENGTH = 77
UNBOUNDED = 10**6  # a model_max_length above this is transformers' way to say "not given"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFiles:
    """What a checkpoint's tokenizer folder says. `merges` are pairs, best first; `special` maps roles to tokens."""

    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    special: Mapping[str, str]
    max_length: int


def read_clip_files(folder: Path, *, special: Mapping[str, str] | None = None) -> ClipFiles:
    """Read vocab.json and merges.txt, or the tokenizer.json that replaces them.

    special: special tokens by their roles that hold whatever the folder says
    Raises CheckpointError.
    """
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = _read_json(folder / "vocab.json")
        merges = _read_merges(folder / "merges.txt")
    elif (folder / "tokenizer.json").is_file():
        vocabulary, merges = _read_tokenizer_json(folder / "tokenizer.json")
    else:
        raise CheckpointError(f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json; add them")
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    own = _special_tokens(config, _read_json(folder / "special_tokens_map.json", optional=True))
    special = {**own, **(special or {})}
    for role, token in special.items():
        if token not in vocabulary:
            raise CheckpointError(
                f"{folder}: the {role} '{token}' is not in the vocabulary; repair tokenizer_config.json"
            )
    length = config.get("model_max_length", DEFAULT_LENGTH)
    return ClipFiles(
        vocabulary=vocabulary,
        merges=merges,
        special=special,
        max_length=length if isinstance(length, int) and 2 < length < UNBOUNDED else DEFAULT_LENGTH,
    )


def build_tokenizer(files: ClipFiles) -> Tokenizer:
    """Make the tokenizer. `encode(text).ids` begins and ends with the special tokens; nothing is padded or cut."""
    special = files.special
    tokenizer = Tokenizer(
        models.BPE(
            vocab=dict(files.vocabulary),
            merges=list(files.merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=special["unk_token"],
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    begin, end = special["bos_token"], special["eos_token"]
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, files.vocabulary[end]), (begin, files.vocabulary[begin]), trim_offsets=False, add_prefix_space=False
    )
    # A special token that is written in a prompt is that token, also SD 2.x's padding, which is an exclamation mark.
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(special.values())])
    return tokenizer


def write_tokenizer(files: ClipFiles, root: Path, relative: str) -> TokenizerSpec:
    """Write tokenizer.json at root/relative and return what the manifest says about it."""
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build_tokenizer(files).to_str(pretty=False), encoding="utf-8")
    return TokenizerSpec(
        file=relative,
        max_length=files.max_length,
        begin_id=files.vocabulary[files.special["bos_token"]],
        end_id=files.vocabulary[files.special["eos_token"]],
        pad_id=files.vocabulary[files.special["pad_token"]],
    )


def write_clip_files(files: ClipFiles, folder: Path) -> None:
    """Write the four files that every version of transformers reads, for other tools that open the bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = "".join(f"{left} {right}\n" for left, right in files.merges)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": files.max_length, **files.special}
    documents = {
        "vocab.json": json.dumps(dict(files.vocabulary), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + merges,
        "special_tokens_map.json": json.dumps(dict(files.special), indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")


def _read_merges(path: Path) -> tuple[tuple[str, str], ...]:
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise CheckpointError(
                f"{path}: merge {number} is '{' '.join(pair)}', expected two pieces; restore the file"
            )
    return tuple((left, right) for left, right in pairs)


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    model = _read_json(path).get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise CheckpointError(f"{path} is not a CLIP tokenizer (byte pairs with '</w>'); it is not supported")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return model["vocab"], tuple((left, right) for left, right in pairs)


def _special_tokens(*documents: Mapping[str, Any]) -> dict[str, str]:
    """Collect the special tokens; a token is a string or an object with `content`; later documents win."""
    special = dict(DEFAULT_SPECIAL)
    for document in documents:
        for role in special:
            token = document.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                special[role] = text
    return special


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore the file") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds no JSON object; restore the file")
    return document
