"""tokenizer.json gives the ids of transformers' CLIPTokenizer, for any text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import DEMO
from latentrt.export.sources.tokenizer import read_tokenizer, write_clip_files, write_tokenizer
from tests.tiny import END, START, WORDS, clip_vocabulary, save_tokenizer

PADS = {"sd1": END, "sd2": "!"}
Pair = tuple[Tokenizer, Any]


def load_pair(folder: Path, written: Path) -> Pair:
    """The file of a bundle, read by the `tokenizers` library alone, and transformers' own on the same files."""
    from transformers import CLIPTokenizer

    spec = write_tokenizer(read_tokenizer(folder), written, "tokenizer.json")
    return Tokenizer.from_file(str(written / spec.file)), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A tiny vocabulary with the two ways of padding, and the demo's."""
    made = {"demo": load_pair(DEMO / "tokenizer", tmp_path_factory.mktemp("demo"))}
    for family, pad in PADS.items():
        folder = tmp_path_factory.mktemp(family)
        save_tokenizer(folder, *clip_vocabulary(WORDS), pad=pad)
        made[family] = load_pair(folder, folder / "written")
    return made


TRICKY = [
    "",
    " ",
    "a red  circle\non\ta BLUE café",
    "cafe\u0301 and caf\u00e9",
    "it's we'll I'D '0'",
    "123 4a5",
    f"a {START} b {END}c{END}",
    "<|StartOfText|> <|endoftext",
    "hello! (red:1.2)!!",
    "赤い円 🔴🟥 ﬁ İ ß Ω",
    "\u200b\u00a0\u3000x\u2028y",
    "_under_score-dash... \\ |",
]


# Pieces of text that normalising, lower-casing, splitting or byte pairs treat in ways of their own.
PIECES = [
    *"aZ éİıßẞſΣςǅﬁﬀ①²½Ⅻ٣๓𝟛Ω\u212a\u212bñ",
    *(chr(point) for point in (0, 1, 7, 8, 9, 10, 11, 12, 13, 0x1B, 0x1C, 0x1F, 0x7F, 0x80, 0x85, 0x9F, 0xA0, 0xAD)),
    *"\u1680\u2000\u2009\u200a\u200b\u200c\u200d\u200e\u202e\u2028\u2029\u202f\u205f\u2060\u3000\ufeff\ufffd\ufffe",
    *"\u0300\u0301\u0308\u0327\u0338\u20dd\u3099\ufe0e\ufe0f\U000e0101",  # combining marks, variation selectors
    *"\u1100\u1161\u11a8한글가各漢𠀀𪛖\uf900か\u304b\u3099ﾊﾞ",  # composing scripts, compatibility forms, plane 2
    *"ἀ\u1f00\u0345ᾳʼnṨ\u0323\u0307दक्षिषิंणต้ำעִבְ\u05b4عَرَ\u0651",
    "👩\u200d❤\ufe0f\u200d💋\u200d👨",
    "👍🏽",
    "🇩🇪🇫",
    "1\ufe0f\u20e3",
    "🏴\U000e0067\U000e0062\U000e007f",
    *"\ue000\U000f0000\U0010fffd\U0001d400\U0001f600\U00016fe0\U00010428\U00010400",
    *(
        START,
        END,
        "<|",
        "|>",
        "'s",
        "'T",
        "'re",
        "'LL",
        "''",
        "’s",
        "_",
        "--",
        "...",
        "(",
        ":1.2)",
        "<tag>",
        "red",
        "circle",
    ),
]
UNICODE = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="aA eé'!<|>startofend1\n\u0301", max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30).map(" ".join),
)
FAMILIES = ["demo", *PADS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TRICKY)
def test_ids_are_those_of_transformers(pairs: dict[str, Pair], family: str, text: str) -> None:
    ours, theirs = pairs[family]
    assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=600)
@given(text=UNICODE)
def test_ids_are_those_of_transformers_for_any_text(pairs: dict[str, Pair], family: str, text: str) -> None:
    ours, theirs = pairs[family]
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_ids_are_those_of_transformers_for_every_assigned_character(pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs["sd1"]
    characters = [chr(point) for point in range(0x110000)]
    characters = [character for character in characters if unicodedata.category(character) not in ("Cn", "Co", "Cs")]
    assert len(characters) > 140_000
    for start in range(0, len(characters), 4096):
        # alone, and between letters, where splitting shows
        text = " ".join(f"{character} x{character}x" for character in characters[start : start + 4096])
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_the_manifest_names_the_special_tokens(tmp_path: Path) -> None:
    vocabulary, merges = clip_vocabulary(WORDS)
    save_tokenizer(tmp_path / "clip", vocabulary, merges, pad="!")
    spec = write_tokenizer(read_tokenizer(tmp_path / "clip"), tmp_path, "tokenizer/tokenizer.json")
    loaded = Tokenizer.from_file(str(tmp_path / spec.file))
    assert (spec.begin_id, spec.end_id, spec.pad_id, spec.max_length) == (vocabulary[START], vocabulary[END], 0, 77)
    assert loaded.encode("a").ids[0] == spec.begin_id
    assert loaded.encode("a").ids[-1] == spec.end_id


def contents(folder: Path) -> str:
    return str(read_tokenizer(folder).backend_tokenizer.to_str())


def test_the_files_for_other_tools_read_back_the_same(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a", *clip_vocabulary(WORDS), pad="!")
    write_clip_files(read_tokenizer(tmp_path / "a"), tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_what_transformers_5_saves_reads_the_same(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    save_tokenizer(tmp_path / "a", *clip_vocabulary(WORDS), pad="!")
    CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def rewrite(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(document | changes), encoding="utf-8")


# What is wrong with a folder, and what the refusal names.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no vocabulary": (lambda folder: (folder / "vocab.json").unlink(), "neither vocab.json with merges.txt nor"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "neither vocab.json with merges.txt nor"),
    "damaged merges": (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nr e\nbroken\n"), "line 2"),
    "damaged vocabulary": (lambda folder: (folder / "vocab.json").write_text("{"), "vocab.json is not JSON"),
    "a damaged config": (
        lambda folder: (folder / "tokenizer_config.json").write_text("["),
        "tokenizer_config.json is not JSON",
    ),
    "no UTF-8": (
        lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe"),
        "tokenizer_config.json is not text",
    ),
    "not CLIP's": (lambda folder: save_tokenizer(folder, {"a": 0, START: 1, END: 2}, [], pad=END), "not a CLIP"),
    "left padding": (lambda folder: rewrite(folder / "tokenizer_config.json", padding_side="left"), "padding_side"),
    "left truncation": (
        lambda folder: rewrite(folder / "tokenizer_config.json", truncation_side="left"),
        "truncation_side",
    ),
    "special tokens as text": (
        lambda folder: rewrite(folder / "tokenizer_config.json", split_special_tokens=True),
        "split_special_tokens",
    ),
    "a padding without a vector": (
        lambda folder: rewrite(folder / "special_tokens_map.json", pad_token="<pad>"),
        "<pad>",
    ),
    "a word without a vector": (lambda folder: rewrite(folder / "added_tokens.json", **{"<cat>": ROWS}), "<cat>"),
    "a gap among the words": (lambda folder: rewrite(folder / "added_tokens.json", **{"<cat>": ROWS + 1}), "<cat>"),
}
ROWS = len(clip_vocabulary(WORDS)[0])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    save_tokenizer(tmp_path, *clip_vocabulary(WORDS), pad=END)
    read_tokenizer(tmp_path, rows=ROWS)
    spoil, named = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(tmp_path, rows=ROWS)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
