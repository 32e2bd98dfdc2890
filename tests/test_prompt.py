"""Prompts become chunks of tokens: nothing is lost, no word is split that fits, and the ids are transformers'."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.errors import BundleError, RequestError
from latentrt.export.sources.tokenizer import read_tokenizer, write_tokenizer
from latentrt.runtime.text.tokenizer import MOST_CHUNKS, Chunk, Prompt, PromptTokenizer
from tests.refused import about
from tests.tiny import END, WORDS, clip_vocabulary, save_tokenizer

ROOM = 75
Pair = tuple[PromptTokenizer, Any]


@pytest.fixture(scope="module", params=[END, "!"], ids=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The runtime's tokenizer and transformers', from the same files, for the two ways of padding."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder / "clip", *clip_vocabulary(WORDS), pad=request.param)
    spec = write_tokenizer(read_tokenizer(folder / "clip"), folder, "tokenizer.json")
    return PromptTokenizer(folder / spec.file, spec), CLIPTokenizer.from_pretrained(folder / "clip")


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> PromptTokenizer:
    return pair[0]


def spell(tokenizer: PromptTokenizer, chunk: Chunk) -> str:
    pieces = str(tokenizer._tokenizer.decode(list(chunk.ids), skip_special_tokens=False))
    return pieces.replace("</w>", " ").strip()


TEXTS = st.text(max_size=200) | st.text(alphabet="a red,.é!\n", max_size=400)


@settings(max_examples=150)
@given(text=TEXTS)
def test_truncated_prompts_are_the_rows_of_transformers(pair: Pair, text: str) -> None:
    ours, theirs = pair
    expected = theirs([text], padding="max_length", truncation=True, max_length=77)["input_ids"]
    (chunk,) = ours.chunks(Prompt(text=text, overflow="truncate"))
    assert ours.rows([chunk.ids]).tolist() == expected


@settings(max_examples=150)
@given(text=TEXTS)
def test_chunks_hold_every_token_in_order(pair: Pair, text: str) -> None:
    ours, theirs = pair
    chunks = ours.chunks(Prompt(text=text))
    assert [id for chunk in chunks for id in chunk.ids] == theirs(text, truncation=False)["input_ids"][1:-1]
    assert all(len(chunk.ids) <= ROOM for chunk in chunks)
    assert all(chunk.ids for chunk in chunks[1:])
    assert all(weight == 1 for chunk in chunks for weight in chunk.weights)


@settings(max_examples=100)
@given(words=st.lists(st.sampled_from(["red", "circle", "red,", "(blue:1.5)", "unknownword", "BREAK"]), max_size=200))
def test_a_chunk_ends_with_a_word(tokenizer: PromptTokenizer, words: list[str]) -> None:
    chunks = tokenizer.chunks(Prompt(text=" ".join(words), syntax="weighted"))
    assert all(token.ends_word for chunk in chunks for token in chunk.tokens[-1:])
    wanted = " ".join(words).replace("BREAK", "").replace("(blue:1.5)", "blue").replace(",", " ,").split()
    assert " ".join(spell(tokenizer, chunk) for chunk in chunks).split() == wanted


def test_a_chunk_ends_with_a_comma_near_its_end(tokenizer: PromptTokenizer) -> None:
    near = " ".join(["a"] * 60) + ", " + " ".join(["red"] * 30)
    far = " ".join(["a"] * 40) + ", " + " ".join(["red"] * 50)
    assert [len(chunk.ids) for chunk in tokenizer.chunks(Prompt(text=near))] == [61, 30]
    assert [len(chunk.ids) for chunk in tokenizer.chunks(Prompt(text=far))] == [75, 16]


def test_a_word_longer_than_a_chunk_is_split(tokenizer: PromptTokenizer) -> None:
    assert [len(chunk.ids) for chunk in tokenizer.chunks(Prompt(text="x" * 100))] == [75, 25]


def test_break_begins_a_chunk(tokenizer: PromptTokenizer) -> None:
    chunks = tokenizer.chunks(Prompt(text="a red BREAK (circle:1.5)", syntax="weighted"))
    assert [spell(tokenizer, chunk).split() for chunk in chunks] == [["a", "red"], ["circle"]]
    assert [chunk.weights for chunk in chunks] == [(1.0, 1.0), (1.5,)]


def test_each_token_has_its_segments_weight(tokenizer: PromptTokenizer) -> None:
    (chunk,) = tokenizer.chunks(Prompt(text="a (red circle:0.5) on [blue]", syntax="weighted"))
    assert chunk.weights == (1.0, 0.5, 0.5, 1.0, 0.909090909)
    assert chunk.weak_segments == {1: 0.5, 3: 0.909090909}
    assert spell(tokenizer, chunk.without(1)).split() == ["a", "on", "blue"]


def test_plain_prompts_keep_their_signs_and_say_so(tokenizer: PromptTokenizer, caplog: Any) -> None:
    (chunk,) = tokenizer.chunks(Prompt(text="a (red:1.2) BREAK"))
    assert spell(tokenizer, chunk).replace(" ", "") == "a(red:1.2)break"
    assert "'(red:1.2)'" in caplog.text and "'weighted'" in caplog.text


@pytest.mark.parametrize(
    ("text", "named"), [("a <lora:style:0.8> cat", "--lora FILE:SCALE"), ("embedding:bad", "--embedding FILE")]
)
def test_what_a_plain_prompt_does_not_load_is_said(
    tokenizer: PromptTokenizer, caplog: Any, text: str, named: str
) -> None:
    (chunk,) = tokenizer.chunks(Prompt(text=text))
    assert spell(tokenizer, chunk).replace(" ", "") == text.replace(" ", "")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and named in caplog.text


def test_truncation_is_said(tokenizer: PromptTokenizer, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer.chunks(Prompt(text="a " * 80, overflow="truncate"))
    assert re.search(" 80 .* 5 ", caplog.text)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_prompt_is_one_empty_chunk(tokenizer: PromptTokenizer, text: str) -> None:
    for syntax in ("plain", "weighted"):
        chunks = tokenizer.chunks(Prompt(text=text, syntax=syntax))
        assert chunks == (Chunk(),)
    assert np.array_equal(tokenizer.rows([()])[0, :2], [tokenizer.spec.begin_id, tokenizer.spec.end_id])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": 3}, "prompt"),
        ({"text": "a", "syntax": "a1111"}, "prompt_syntax"),
        ({"text": "a", "overflow": "drop"}, "overflow"),
        ({"text": "a", "clip_skip": -1}, "clip_skip"),
        ({"text": "a", "clip_skip": 1.0}, "clip_skip"),
    ],
)
def test_fields_without_a_meaning_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError, check=about(field)):
        Prompt(**fields)


def test_a_lone_surrogate_is_no_text(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(RequestError, match=r"'a \\ud800'"):
        tokenizer.chunks(Prompt(text="a \ud800"))


def test_an_essay_is_refused(tokenizer: PromptTokenizer) -> None:
    tokenizer.chunks(Prompt(text="a " * ROOM * MOST_CHUNKS))
    with pytest.raises(RequestError, match=r" 2401 .* 33 .* 32 .* 75 "):
        tokenizer.chunks(Prompt(text="a " * (ROOM * MOST_CHUNKS + 1)))


def test_a_damaged_tokenizer_is_refused(tokenizer: PromptTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"/tokenizer\.json .*\(.+\)"):
        PromptTokenizer(tmp_path / "tokenizer.json", tokenizer.spec)
