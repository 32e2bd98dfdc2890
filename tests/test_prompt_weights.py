"""Weights do to the text encoder's output what compel does, and what the equations promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.export.checkpoint import DEMO
from latentrt.export.sources.tokenizer import read_tokenizer, write_tokenizer
from latentrt.runtime.text.encoder import TextEncoder
from latentrt.runtime.text.syntax import parse_weighted
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer
from tests.compel_golden import CASES

GOLDEN = Path(__file__).parent / "data" / "compel.safetensors"
# float32 in another order of sums, through two layers and, for small weights, a division by up to 1e5
CLOSE = 2e-5
SPEC = EngineSpec(
    component="text_encoder",
    inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", 77)),),
    outputs=(TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", 77, 64)),),
)
Encode = Callable[[str], Array]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    """The demo's text encoder, run by torch."""
    from latentrt.export.networks import loading, modules

    folder = tmp_path_factory.mktemp("demo")
    module = loading.load("text_encoder", DEMO / "text_encoder")
    spec = write_tokenizer(read_tokenizer(DEMO / "tokenizer"), folder, "tokenizer.json")
    names = ["last_hidden_state", "pooler_output", "skipped_hidden_states"]
    tokenizer = PromptTokenizer(folder / spec.file, spec)
    return TextEncoder(tokenizer, lambda inputs: modules.run(module, inputs, names), SPEC, cache_bytes=0)


@pytest.fixture(scope="module")
def encode(encoder: TextEncoder) -> Encode:
    """The encoding of one weighted prompt."""
    return lambda text: encoder.encode([Prompt(text=text, syntax="weighted")])[0]


@pytest.mark.parametrize("text", CASES)
def test_weighted_prompts_are_what_compel_makes_of_them(encode: Encode, text: str) -> None:
    assert [(segment.text, segment.weight) for segment in parse_weighted(text)[0]] == CASES[text]
    with safe_open(GOLDEN, framework="numpy") as file:
        expected = file.get_tensor(str(json.loads(file.metadata()["prompts"]).index(text)))
    assert np.abs(encode(text) - expected).max() < CLOSE


def test_the_cases_are_not_all_alike(encode: Encode) -> None:
    """The weights change the encoding by far more than the tolerance."""
    assert np.abs(encode("a (red:1.4) circle") - encode("a red circle")).max() > 0.1
    assert np.abs(encode("a (red:0.6) circle") - encode("a red circle")).max() > 0.1


WORDS = st.sampled_from(["red", "large circle", "blue", "on a", "striped", "background"])


@settings(max_examples=15)
@given(words=st.lists(WORDS, min_size=1, max_size=5))
def test_a_weight_of_one_changes_nothing(encoder: TextEncoder, words: list[str]) -> None:
    text = " ".join(f"({word}:1.0)" for word in words)
    (weighted,) = encoder.encode([Prompt(text=text, syntax="weighted")])
    (plain,) = encoder.encode([Prompt(text=" ".join(words))])
    assert np.array_equal(weighted, plain)


@settings(max_examples=15)
@given(before=WORDS, word=WORDS, after=WORDS)
def test_a_weight_of_zero_is_as_if_the_word_were_not_written(
    encode: Encode, before: str, word: str, after: str
) -> None:
    assert np.abs(encode(f"{before} ({word}:0) {after}") - encode(f"{before} {after}")).max() < 1e-3


@settings(max_examples=15)
@given(before=WORDS, word=WORDS, after=WORDS)
def test_half_a_weight_is_halfway_to_not_being_written(encode: Encode, before: str, word: str, after: str) -> None:
    """Up to the token's own place, which the weight scales as well, and what its neighbours shift there."""
    half, without = encode(f"{before} ({word}:0.5) {after}"), encode(f"{before} {after}")
    plain, empty = encode(f"{before} {word} {after}"), encode("")
    own = 1 + len(before.split())
    base = plain.copy()
    place = slice(own, own + len(word.split()))
    base[place] = (plain[place] + empty[place]) / 2
    assert np.abs(half - (base + without) / 2).max() < CLOSE


@settings(max_examples=15)
@given(word=WORDS, weight=st.integers(101, 900))
def test_a_larger_weight_moves_the_word_away_from_the_empty_prompt(encode: Encode, word: str, weight: int) -> None:
    weighted, plain, empty = encode(f"({word}:{weight / 100})"), encode(word), encode("")
    places = slice(1, 1 + len(word.split()))
    expected = empty[places] + weight / 100 * (plain[places] - empty[places])
    assert np.abs(weighted[places] - expected).max() < CLOSE * weight
    assert np.array_equal(weighted[places.stop :], plain[places.stop :])


def test_a_weight_changes_nothing_outside_its_chunk(encode: Encode) -> None:
    both = encode("a (red:0.4) circle BREAK a (blue:1.5) square")
    assert np.array_equal(both[:77], encode("a (red:0.4) circle"))
    assert np.array_equal(both[77:], encode("a (blue:1.5) square"))


def test_half_precision_is_weighted_in_float32(encoder: TextEncoder) -> None:
    """A sum of shares up to 6e4 would overflow float16."""
    run = encoder._rows._run
    halved = TextEncoder(encoder._plain, lambda inputs: {k: v.astype(np.float16) for k, v in run(inputs).items()}, SPEC)
    prompt = Prompt(text="a (large red:0) (circle:1.5)", syntax="weighted")
    found, expected = halved.encode([prompt])[0], encoder.encode([prompt])[0]
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 2e-2
