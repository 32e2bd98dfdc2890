"""tokenizer.json gives the ids of transformers' CLIPTokenizer, for any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from latentrt.engines.errors import CheckpointError
from latentrt.export.tokenizer import build_tokenizer, read_clip_files, write_clip_files, write_tokenizer
from tests.tiny import END, START, WORDS, clip_vocabulary, save_tokenizer

PADS = {"sd1": END, "sd2": "!"}
Pair = tuple[Tokenizer, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Ours and transformers', from the same four files, for the two ways of padding."""
    from transformers import CLIPTokenizer

    made = {}
    for family, pad in PADS.items():
        folder = tmp_path_factory.mktemp(family)
        save_tokenizer(folder, *clip_vocabulary(WORDS), pad=pad)
        made[family] = (build_tokenizer(read_clip_files(folder)), CLIPTokenizer.from_pretrained(folder))
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


@pytest.mark.parametrize("family", PADS)
@pytest.mark.parametrize("text", TRICKY)
def test_ids_are_those_of_transformers(pairs: dict[str, Pair], family: str, text: str) -> None:
    ours, theirs = pairs[family]
    assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize("family", PADS)
@settings(max_examples=300)
@given(text=st.text(max_size=60) | st.text(alphabet="aA eé'!<|>startofend1\n\u0301", max_size=40))
def test_ids_are_those_of_transformers_for_any_text(pairs: dict[str, Pair], family: str, text: str) -> None:
    ours, theirs = pairs[family]
    assert ours.encode(text).ids == theirs(text)["input_ids"]


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
