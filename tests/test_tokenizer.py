"""tokenizer.json gives the ids of transformers' CLIPTokenizer, for any text."""

from __future__ import annotations

import gzip
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from latentrt.engines.errors import CheckpointError
from latentrt.export.checkpoint import DEMO
from latentrt.export.tokenizer import build_tokenizer, read_clip_files, write_clip_files, write_tokenizer
from tests.tiny import END, START, WORDS, byte_letters, clip_vocabulary, save_tokenizer

PADS = {"sd1": END, "sd2": "!"}
Pair = tuple[Tokenizer, Any]
# OpenCLIP's wheel holds the vocabulary that every published SD 1.x and 2.x checkpoint uses; read, not installed.
WHEEL = "open_clip_torch==3.3.0"
CACHE = Path(__file__).parent.parent / ".cache" / "vocabulary"
MERGES = 49152 - 256 - 2


def load_pair(folder: Path) -> Pair:
    """Ours and transformers', from the same files."""
    from transformers import CLIPTokenizer

    return build_tokenizer(read_clip_files(folder)), CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A tiny vocabulary with the two ways of padding, and the demo's."""
    made = {"demo": load_pair(DEMO / "tokenizer")}
    for family, pad in PADS.items():
        folder = tmp_path_factory.mktemp(family)
        save_tokenizer(folder, *clip_vocabulary(WORDS), pad=pad)
        made[family] = load_pair(folder)
    return made


@pytest.fixture(scope="module")
def full_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The vocabulary of 49408 entries."""
    if not any(CACHE.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), WHEEL]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(CACHE.glob("*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    merges = lines[1 : 1 + MERGES]
    letters = list(byte_letters().values())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in merges), START, END]
    assert len(entries) == 49408
    folder = tmp_path_factory.mktemp("full")
    save_tokenizer(folder, {entry: number for number, entry in enumerate(entries)}, merges, pad=END)
    return load_pair(folder)


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


@pytest.mark.slow
@settings(max_examples=3000)
@given(text=UNICODE)
def test_ids_are_those_of_transformers_with_the_published_vocabulary(full_pair: Pair, text: str) -> None:
    ours, theirs = full_pair
    assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.slow
def test_the_published_vocabulary_gives_the_published_ids(full_pair: Pair) -> None:
    """The example of CLIP's own README, and ids that the documentation of transformers prints."""
    ours, _ = full_pair
    assert ours.encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ours.encode("a photo of a dog").ids == [49406, 320, 1125, 539, 320, 1929, 49407]


def test_written_file_gives_the_same_ids_and_names_the_special_ones(tmp_path: Path) -> None:
    vocabulary, merges = clip_vocabulary(WORDS)
    save_tokenizer(tmp_path / "clip", vocabulary, merges, pad="!")
    files = read_clip_files(tmp_path / "clip")
    spec = write_tokenizer(files, tmp_path, "tokenizer/tokenizer.json")
    loaded = Tokenizer.from_file(str(tmp_path / spec.file))
    assert loaded.encode("a red circle!").ids == build_tokenizer(files).encode("a red circle!").ids
    assert (spec.begin_id, spec.end_id, spec.pad_id, spec.max_length) == (vocabulary[START], vocabulary[END], 0, 77)
    assert loaded.encode("a").ids[0] == spec.begin_id
    assert loaded.encode("a").ids[-1] == spec.end_id


def test_the_files_for_other_tools_read_back_the_same(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "a", *clip_vocabulary(WORDS), pad="!")
    files = read_clip_files(tmp_path / "a")
    write_clip_files(files, tmp_path / "b")
    assert read_clip_files(tmp_path / "b") == files


def test_what_transformers_5_saves_reads_the_same(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    save_tokenizer(tmp_path / "a", *clip_vocabulary(WORDS), pad="!")
    CLIPTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = read_clip_files(tmp_path / "a"), read_clip_files(tmp_path / "b")
    assert (second.vocabulary, second.merges, second.special) == (first.vocabulary, first.merges, first.special)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither vocab.json with merges.txt nor tokenizer.json"):
        read_clip_files(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, *clip_vocabulary(WORDS), pad="<pad>")
    with pytest.raises(CheckpointError, match="pad_token '<pad>' is not in the vocabulary"):
        read_clip_files(tmp_path)


def test_damaged_merges_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, *clip_vocabulary(WORDS), pad=END)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nbroken\n")
    with pytest.raises(CheckpointError, match="merge 1 is 'broken'"):
        read_clip_files(tmp_path)
