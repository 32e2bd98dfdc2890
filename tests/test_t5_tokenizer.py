"""T5's tokenizer: the published file as it is, and prompts in rows that transformers and sentencepiece would give."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer

from latentrt.engines.bundle.manifest import TokenizerSpec
from latentrt.engines.errors import CheckpointError, NotInstalledError
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.export.sources.unigram import PROMPTS, read_unigram
from latentrt.runtime.text.encoder import TextEncoder
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer
from tests.test_tokenizer import UNICODE
from tests.tiny_t5 import VOCABULARY, save_unigram

RECORDED = Path(__file__).parent / "data" / "sentencepiece.json"
LENGTH = 40


def open_runtime(folder: Path) -> PromptTokenizer:
    """Return the runtime's tokenizer of a folder, through the file that a bundle holds."""
    spec = read_unigram(folder).write(folder / "bundle", "tokenizer_3/tokenizer.json")
    return PromptTokenizer(folder / "bundle" / spec.file, spec)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unigram(tmp_path_factory.mktemp("plain"), normalised=False)


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unigram(tmp_path_factory.mktemp("normalised"))


def row(tokenizer: PromptTokenizer, text: str, length: int = LENGTH) -> list[int]:
    (chunk,) = tokenizer.chunks(Prompt(text=text), length=length)
    rows: list[list[int]] = tokenizer.rows([chunk.ids], length=length).tolist()
    return rows[0]


@settings(max_examples=300)
@given(text=UNICODE)
def test_rows_are_those_of_transformers(pair: tuple[PromptTokenizer, Any], text: str) -> None:
    ours, theirs = pair
    expected = theirs(text, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert row(ours, text) == expected


@pytest.fixture(scope="module")
def pair(plain: Path) -> tuple[PromptTokenizer, Any]:
    from transformers import T5TokenizerFast

    return open_runtime(plain), T5TokenizerFast.from_pretrained(plain)


def test_the_published_file_is_in_the_bundle_untouched_and_its_normalizer_counts(normalised: Path) -> None:
    # transformers 5.23 reads no normalizer from tokenizer.json: the `tokenizers` library is the reference here
    ours, published = open_runtime(normalised), Tokenizer.from_file(str(normalised / "tokenizer.json"))
    written = normalised / "bundle" / "tokenizer_3" / "tokenizer.json"
    assert written.read_bytes() == (normalised / "tokenizer.json").read_bytes()
    assert row(ours, "ﬁsh Ａ") == row(ours, "fish A")
    for text in PROMPTS:
        ids = [*published.encode(text).ids[:-1][: LENGTH - 1], 1]
        assert row(ours, text) == ids + [0] * (LENGTH - len(ids))


def test_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(recorded["tokenizer"]), encoding="utf-8")
    ours = open_runtime(tmp_path)
    assert len(recorded["ids"]) > 10
    for text, ids in recorded["ids"]:
        (chunk,) = ours.chunks(Prompt(text=text), length=10_000)
        assert list(chunk.ids) == ids, text


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = open_runtime(plain)
    with caplog.at_level(logging.WARNING):
        ids = row(ours, "a red circle " * 30, 16)
    assert len(ids) == 16 and ids[-1] == 1 and 0 not in ids
    assert len(caplog.records) == 1
    caplog.clear()
    assert row(ours, "a red circle", 256).count(1) == 1
    assert not caplog.records


def test_breaks_and_weights_stay_in_one_row(plain: Path) -> None:
    ours = open_runtime(plain)
    (chunk,) = ours.chunks(Prompt(text="a red (circle:1.5) BREAK on a blue [square]", syntax="weighted"), length=LENGTH)
    (bare,) = ours.chunks(Prompt(text="a red circle on a blue square"), length=LENGTH)
    assert chunk.ids == bare.ids
    assert sorted({token.weight for token in chunk.tokens}) == pytest.approx([1 / 1.1, 1.0, 1.5])


def fake_states(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """Give states that tell the id and the place of a token, and depend on nothing else."""
    ids = inputs["input_ids"]
    return {"last_hidden_state": np.stack([ids + 0.5, np.broadcast_to(np.arange(ids.shape[1]), ids.shape)], axis=-1)}


def fake_encoder(folder: Path, length: int) -> TextEncoder:
    spec = EngineSpec(
        component="text_encoder_3",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", "text_tokens")),),
        outputs=(TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", "text_tokens", 2)),),
    )
    return TextEncoder(open_runtime(folder), fake_states, spec, length=length)


def test_a_words_weight_moves_its_own_tokens_away_from_the_empty_prompt(plain: Path) -> None:
    encoder = fake_encoder(plain, LENGTH)
    weighted, bare, empty = encoder.encode(
        [
            Prompt(text="(a:2) red circle", syntax="weighted"),
            Prompt(text="a red circle"),
            Prompt(text="", overflow="truncate"),
        ]
    )
    assert weighted.shape == (LENGTH, 2)
    # without a begin token, the first token is at place 0
    assert np.allclose(weighted[0], empty[0] + 2 * (bare[0] - empty[0])) and not np.allclose(weighted[0], bare[0])
    assert np.array_equal(weighted[1:], bare[1:])
    assert encoder.tokens([Prompt(text="a red circle " * 100)]) == LENGTH


def test_what_is_said_of_chunks_and_layers_of_clip_is_not_encoded_again(plain: Path) -> None:
    encoder = fake_encoder(plain, LENGTH)
    one, other = encoder.encode([Prompt(text="a red circle"), Prompt(text="a red circle", clip_skip=2)])
    assert one is other


def test_the_manifest_says_that_there_is_no_begin(plain: Path) -> None:
    spec = read_unigram(plain).write(plain / "bundle", "tokenizer.json")
    assert spec == TokenizerSpec(file="tokenizer.json", max_length=512, begin_id=None, end_id=1, pad_id=0)


def test_the_files_for_other_tools_read_back_the_same(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    read_unigram(plain).write_files(tmp_path / "other")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert theirs("a red circle")["input_ids"] == AutoTokenizer.from_pretrained(plain)("a red circle")["input_ids"]
    assert read_unigram(tmp_path / "other").content == read_unigram(plain).content


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edited(folder: Path) -> None:
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        change(document)
        (folder / name).write_text(json.dumps(document), encoding="utf-8")

    return edited


def add_begin(document: dict[str, Any]) -> None:
    document["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "</s>", "type_id": 0}})


# What is wrong with a folder, and what the refusal names.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: (folder / "tokenizer.json").unlink(), "spiece.model"),
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "byte pairs": (
        edit("tokenizer.json", lambda d: d.update(model={"type": "BPE", "vocab": {"</s>": 1}, "merges": []})),
        "unigram",
    ),
    "an unknown end": (edit("tokenizer_config.json", lambda d: d.update(eos_token="<end>")), "<end>"),
    "a begin": (edit("tokenizer.json", add_begin), "'a'"),
    "a word without a vector": (edit("tokenizer_config.json", lambda d: None), "vocab_size"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    save_unigram(tmp_path)
    read_unigram(tmp_path, rows=VOCABULARY)
    spoil, named = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_unigram(tmp_path, rows=10 if damage == "a word without a vector" else VOCABULARY)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_sentencepiece_alone_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"no model at all")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NotInstalledError) as absent:
        read_unigram(tmp_path)
    assert absent.value.install == "pip install sentencepiece"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(CheckpointError, match=r"spiece\.model"):  # transformers cannot read it
        read_unigram(tmp_path)
