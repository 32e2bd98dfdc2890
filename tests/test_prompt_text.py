"""The text encoder of a bundle gives what diffusers gives: chunks, clip-skip, learned words; and remembers it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import RequestError
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.runtime.text import encoder as text_rows
from latentrt.runtime.text.encoder import Cache, Encoding, TextEncoder
from latentrt.runtime.text.textual_inversion import Embedding
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer
from tests.refused import about

# float32 in another order of sums, through two or three layers
CLOSE = 2e-5
WIDTHS = {"sd1": 32, "sd2": 48}


class Counted:
    """A bundle's text encoder that counts its calls and the rows it was given."""

    def __init__(self, bundle: Path) -> None:
        self.engine = open_engines(Bundle.open(bundle), "cpu", components=("text_encoder",)).engines["text_encoder"]
        self.rows: list[int] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.rows.append(len(inputs["input_ids"]))
        return self.engine(inputs)


def mend_clip_skip() -> None:
    """Give transformers' text encoder the level that transformers 5 dropped and diffusers 0.42 looks for."""
    from transformers import CLIPTextModel

    if not hasattr(CLIPTextModel, "text_model"):
        CLIPTextModel.text_model = property(lambda model: model)


def open_tokenizer(bundle: Path) -> PromptTokenizer:
    spec = Bundle.open(bundle).manifest.tokenizers["tokenizer"]
    return PromptTokenizer(bundle / spec.file, spec)


class Pair:
    """A bundle's encoder, and diffusers' pipeline on the same checkpoint."""

    def __init__(self, family: str, bundle: Path, checkpoint: Path) -> None:
        from diffusers import StableDiffusionPipeline

        self.width = WIDTHS[family]
        self.run = Counted(bundle)
        self.tokenizer = open_tokenizer(bundle)
        self.text = TextEncoder(self.tokenizer, self.run, self.run.engine.spec)
        self.checkpoint = checkpoint
        self.pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
        mend_clip_skip()

    def diffusers(self, text: str, **options: Any) -> Array:
        import torch

        with torch.no_grad():
            embeds, _ = self.pipe.encode_prompt(text, "cpu", 1, False, **options)
        return np.asarray(embeds[0].numpy())

    def learn(self, vectors: Mapping[str, Array]) -> None:
        import torch

        for name, rows in vectors.items():
            self.text.add(Embedding(name=name, vectors=rows))
            self.pipe.load_textual_inversion({name: torch.from_numpy(rows)})


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return open_pair(request)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def learned(request: pytest.FixtureRequest) -> Pair:
    """A pair that knows three words: of one vector, of three, and one that is the beginning of other words."""
    pair = open_pair(request)
    generator = np.random.default_rng(5)
    lengths = {"<cat>": 1, "<long-cat>": 3, "style": 2}
    pair.learn({name: generator.normal(0, 0.02, (n, pair.width)).astype(np.float32) for name, n in lengths.items()})
    return pair


def open_pair(request: pytest.FixtureRequest) -> Pair:
    family = request.param
    return Pair(family, request.getfixturevalue(f"{family}_bundle"), request.getfixturevalue(f"{family}_checkpoint"))


def close(found: Array, expected: Array) -> bool:
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() < CLOSE)


@pytest.mark.parametrize("text", ["", "a red circle", "a (red:1.2) [circle]!! BREAK", "a red " * 30, "赤い 🔴 café"])
def test_a_plain_prompt_is_encoded_as_diffusers_does(pair: Pair, text: str) -> None:
    (found,) = pair.text.encode([Prompt(text=text, overflow="truncate")])
    assert close(found, pair.diffusers(text))


def test_skipped_layers_are_those_of_diffusers(pair: Pair) -> None:
    layers = pair.pipe.text_encoder.config.num_hidden_layers
    assert layers == {32: 2, 48: 3}[pair.width]
    found = [pair.text.encode([Prompt(text="a red circle", clip_skip=skip)])[0] for skip in range(layers)]
    for skip, states in enumerate(found):
        assert close(states, pair.diffusers("a red circle", clip_skip=skip))
    assert all(not close(found[0], other) for other in found[1:])


def test_prompts_with_and_without_skipped_layers_share_a_batch(pair: Pair) -> None:
    prompts = [Prompt(text="a blue square", clip_skip=1), Prompt(text="a blue square"), Prompt(text="red", clip_skip=1)]
    found = pair.text(prompts)
    for row, prompt in zip(found, prompts, strict=True):
        assert close(row, pair.diffusers(prompt.text, clip_skip=prompt.clip_skip))


def test_too_many_skipped_layers_are_refused(pair: Pair) -> None:
    layers = pair.pipe.text_encoder.config.num_hidden_layers
    with pytest.raises(RequestError, check=about("clip_skip")):
        pair.text.encode([Prompt(text="a", clip_skip=layers)])


def test_a_long_prompt_is_its_chunks_one_after_the_other(pair: Pair) -> None:
    words = "a red circle, on a blue square " * 20
    chunks = pair.tokenizer.chunks(Prompt(text=words))
    assert len(chunks) > 2
    texts = [pair.tokenizer._tokenizer.decode(list(chunk.ids)).replace("</w>", " ") for chunk in chunks]
    (found,) = pair.text.encode([Prompt(text=words)])
    assert close(found, np.concatenate([pair.diffusers(text) for text in texts]))


def test_shorter_prompts_of_a_batch_end_in_empty_chunks(pair: Pair) -> None:
    found = pair.text(
        [
            Prompt(text="a BREAK red BREAK circle", syntax="weighted", clip_skip=1),
            Prompt(text="blue", clip_skip=1),
            Prompt(text=""),
        ]
    )
    empty, skipped = pair.diffusers(""), pair.diffusers("", clip_skip=1)
    assert found.shape == (3, 3 * 77, pair.width)
    assert close(found[1], np.concatenate([pair.diffusers("blue", clip_skip=1), skipped, skipped]))
    assert close(found[2], np.concatenate([empty] * 3))


@pytest.mark.parametrize(
    "text",
    [
        "a <cat>",
        "<cat> <long-cat>, <cat><long-cat>",
        "a red circle in style of <long-cat>",
        "<CAT> style lifestyles <cat",
        "<cat>" * 80,
        "a circle",
    ],
)
def test_learned_words_are_those_of_diffusers(learned: Pair, text: str) -> None:
    (found,) = learned.text.encode([Prompt(text=text, overflow="truncate")])
    assert close(found, learned.diffusers(text))


def test_a_learned_word_is_whole_in_capitals_too(learned: Pair) -> None:
    """diffusers gives the word's first vector alone: it looks for the others with the case as written."""
    capitals, small = learned.text.encode([Prompt(text="a <LONG-Cat>"), Prompt(text="a <long-cat>")])
    assert np.array_equal(capitals, small)
    assert not close(learned.diffusers("a <LONG-Cat>"), small)


def test_a_learned_word_can_be_weighted_and_skipped(learned: Pair) -> None:
    weighted, plain = learned.text.encode(
        [
            Prompt(text="a (<long-cat>:1.5) circle", syntax="weighted", clip_skip=1),
            Prompt(text="a <long-cat> circle", clip_skip=1),
        ]
    )
    empty = learned.diffusers("", clip_skip=1)
    assert close(plain, learned.diffusers("a <long-cat> circle", clip_skip=1))
    places = slice(2, 5)
    assert close(weighted[places], empty[places] + np.float32(1.5) * (plain[places] - empty[places]))


def test_a_learned_word_is_not_split_between_chunks(learned: Pair) -> None:
    chunks = learned.text._words.tokenizer.chunks(Prompt(text="a " * 73 + "<long-cat> red"))
    assert [len(chunk.ids) for chunk in chunks] == [73, 4]
    assert chunks[1].ids[:3] == (-2, -3, -4)


def test_a_word_is_plain_text_before_it_is_learned_and_after_it_is_forgotten(pair: Pair) -> None:
    before = pair.text.encode([Prompt(text="a <cat>")])[0]
    pair.text.add(Embedding(name="<cat>", vectors=np.ones((2, pair.width), dtype=np.float32)))
    assert pair.text.embeddings == ("<cat>",)
    during = pair.text.encode([Prompt(text="a <cat>")])[0]
    pair.text.remove("<cat>")
    assert not close(during, before)
    assert np.array_equal(pair.text.encode([Prompt(text="a <cat>")])[0], before)


def test_embeddings_that_do_not_fit_are_refused(learned: Pair) -> None:
    def add(name: str, width: int = learned.width) -> None:
        learned.text.add(Embedding(name=name, vectors=np.zeros((1, width), dtype=np.float32)))

    with pytest.raises(RequestError, check=about("embeddings")):
        add("<cat>")
    with pytest.raises(RequestError, check=about("embeddings")):
        add("<dog>", width=7)
    for name in ("red</w>", "<|endoftext|>", " "):
        with pytest.raises(RequestError, check=about(None)):
            add(name)
    with pytest.raises(RequestError, check=about("embeddings")):
        learned.text.remove("<dog>")
    assert learned.text.embeddings == ("<cat>", "<long-cat>", "style")


@pytest.fixture
def fresh(pair: Pair) -> TextEncoder:
    """An encoder that remembers nothing yet; its engine's rows are counted from here on."""
    pair.run.rows.clear()
    return TextEncoder(pair.tokenizer, pair.run, pair.run.engine.spec)


def test_a_prompt_is_encoded_once(pair: Pair, fresh: TextEncoder) -> None:
    first = fresh.encode([Prompt(text="a red circle"), Prompt(text="a red circle"), Prompt(text="")])
    assert pair.run.rows == [2]
    again = fresh.encode([Prompt(text=""), Prompt(text="a red circle")])
    assert pair.run.rows == [2]
    assert first[0] is first[1] is again[1]
    assert first[2] is again[0]
    assert not first[0].flags.writeable
    fresh.encode([Prompt(text="a red circle", clip_skip=1), Prompt(text="a red circle", syntax="weighted")])
    assert pair.run.rows == [2, 1]


def test_a_batch_can_be_changed_without_changing_what_is_remembered(fresh: TextEncoder) -> None:
    (kept,) = fresh.encode([Prompt(text="red")])
    copy = kept.copy()
    fresh([Prompt(text="red")])[:] = 0
    assert np.array_equal(fresh.encode([Prompt(text="red")])[0], copy)


def room_for(prompts: int, pair: Pair) -> TextEncoder:
    """A text encoder that remembers so many short prompts."""
    (one,) = TextEncoder(pair.tokenizer, pair.run, pair.run.engine.spec).encode([Prompt(text="red")])
    return TextEncoder(pair.tokenizer, pair.run, pair.run.engine.spec, cache_bytes=prompts * one.nbytes)


def test_what_was_not_used_for_longest_is_forgotten(pair: Pair) -> None:
    text = room_for(2, pair)
    red, blue, square = (Prompt(text=word) for word in ("red", "blue", "square"))
    for prompt in (red, blue, red, square):  # blue goes
        text.encode([prompt])
    pair.run.rows.clear()
    text.encode([red, square])
    assert pair.run.rows == []
    text.encode([blue])
    assert pair.run.rows == [1]


def test_learning_a_word_forgets_what_was_encoded(pair: Pair, fresh: TextEncoder) -> None:
    fresh.encode([Prompt(text="red")])
    fresh.add(Embedding(name="<cat>", vectors=np.ones((1, pair.width), dtype=np.float32)))
    fresh.encode([Prompt(text="red")])
    assert pair.run.rows == [1, 1]


def test_the_cache_holds_no_more_than_its_bytes() -> None:
    def encoding(numbers: int) -> Encoding:
        return Encoding(states=np.zeros(numbers, dtype=np.float32))

    cache = Cache(100)
    for key in range(4):
        cache.put(key, encoding(10))
    assert [key for key in range(4) if cache.get(key) is not None] == [2, 3]
    cache.put(2, encoding(15))
    assert [key for key in range(4) if cache.get(key) is not None] == [2, 3]
    cache.put(5, encoding(26))  # has no room even alone
    assert [key for key in range(6) if cache.get(key) is not None] == [2, 3]
    cache.put(6, encoding(25))
    assert [key for key in range(7) if cache.get(key) is not None] == [6]


def test_many_threads_get_their_own_prompts(pair: Pair) -> None:
    """Engines reuse their output buffers, and the cache is too small for all prompts."""
    text = room_for(3, pair)
    prompts = [Prompt(text=f"a {colour} {shape}") for colour in ("red", "blue") for shape in ("circle", "square", "x")]
    expected = [pair.diffusers(prompt.text) for prompt in prompts]
    wrong: list[str] = []

    def work(first: int) -> None:
        for turn in range(40):
            number = (first + turn * (first + 1)) % len(prompts)
            if not close(text([prompts[number]])[0], expected[number]):
                wrong.append(prompts[number].text)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_plain_batches_can_be_encoded_where_the_engine_is(pair: Pair, fresh: TextEncoder) -> None:
    prompts = [Prompt(text="a red circle"), Prompt(text="")]
    inputs = fresh.device_inputs(prompts)
    assert inputs is not None
    assert np.array_equal(pair.run(inputs)["last_hidden_state"], fresh(prompts))
    assert fresh.device_inputs(prompts) is None  # remembered
    assert fresh.device_inputs([*prompts, Prompt(text="new")]) is not None
    assert fresh.device_inputs([Prompt(text="a (b:1.1)", syntax="weighted")]) is None
    assert fresh.device_inputs([Prompt(text="(b:1.0)", syntax="weighted")]) is not None
    assert fresh.device_inputs([Prompt(text="a", clip_skip=1)]) is None
    long = [Prompt(text="a " * 80), Prompt(text="red " * 80)]
    assert fresh.device_inputs([*long, Prompt(text="a")]) is None
    inputs = fresh.device_inputs(long)
    assert inputs is not None
    found = pair.run(inputs)["last_hidden_state"].reshape(2, 154, pair.width)
    assert np.array_equal(found, fresh(long))


def test_an_engine_with_a_fixed_table_is_given_all_of_it(pair: Pair) -> None:
    """As engines with fixed shapes have it: rows that no word uses are zeros."""
    tables: list[Array] = []

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        tables.append(inputs["extra_embeddings"])
        return pair.run(inputs)

    spec = pair.run.engine.spec
    extra = TensorSpec(name="extra_embeddings", dtype="float32", shape=(4, pair.width))
    text = TextEncoder(pair.tokenizer, run, msgspec.structs.replace(spec, inputs=(spec.inputs[0], extra)))
    text.add(Embedding(name="<cat>", vectors=np.ones((3, pair.width), dtype=np.float32)))
    text.encode([Prompt(text="a <cat>")])
    (table,) = tables
    assert table.shape == (4, pair.width)
    assert table[:3].all() and not table[3].any()
    with pytest.raises(RequestError, check=about("embeddings")):
        text.add(Embedding(name="<dog>", vectors=np.ones((2, pair.width), dtype=np.float32)))


def test_a_prompt_of_many_weights_is_encoded_in_batches(
    pair: Pair, fresh: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = " ".join(f"(red:0.{n % 5 + 1}) blue" for n in range(20))
    (many,) = fresh.encode([Prompt(text=words, syntax="weighted")])
    assert pair.run.rows == [8, 8, 6]  # the prompt, the empty one, and the prompt without each of twenty words
    monkeypatch.setattr(text_rows, "MOST_ROWS", 100)
    (together,) = pair.text.encode([Prompt(text=words, syntax="weighted")])
    assert pair.run.rows[3:] == [22]
    assert close(together, many)


def test_what_an_older_bundle_cannot_do_is_refused(pair: Pair) -> None:
    spec = EngineSpec(
        component="text_encoder",
        inputs=pair.run.engine.spec.inputs[:1],
        outputs=pair.run.engine.spec.outputs[:2],
    )

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return pair.run({**inputs, "extra_embeddings": np.zeros((1, pair.width), dtype=np.float32)})

    text = TextEncoder(pair.tokenizer, run, spec)
    assert close(text([Prompt(text="a (red:1.0)")])[0], pair.diffusers("a (red:1.0)"))
    with pytest.raises(RequestError, check=about("clip_skip")):
        text.encode([Prompt(text="a", clip_skip=1)])
    with pytest.raises(RequestError, check=about("embeddings")):
        text.add(Embedding(name="<cat>", vectors=np.zeros((1, pair.width), dtype=np.float32)))


def test_an_fp16_bundle_takes_learned_words_too(sd1_half_bundle: Path) -> None:
    run = Counted(sd1_half_bundle)
    text = TextEncoder(open_tokenizer(sd1_half_bundle), run, run.engine.spec)
    text.add(Embedding(name="<cat>", vectors=np.full((1, 32), 0.02, dtype=np.float32)))
    known, plain = text.encode([Prompt(text="a <cat>"), Prompt(text="a red")])
    assert np.isfinite(known).all()
    assert not close(known, plain)
