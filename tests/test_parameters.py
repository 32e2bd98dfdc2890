"""Settings that are written into a picture are read out of it again."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.runtime.images.read_parameters import parse, read_text
from latentrt.runtime.images.write_png import parameters
from latentrt.runtime.result import Settings
from latentrt.runtime.sampling.catalogue import sampler_names
from latentrt.runtime.serve.pictures import Format, encode_pixels

TEXT = some.text(some.characters(exclude_categories=("Cs",)), max_size=60)
PROMPT = TEXT.filter(lambda text: not any(line.startswith("Negative prompt: ") for line in text.split("\n")))
NAME = some.text(some.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(
    lambda name: name.strip() == name
)
SETTINGS = some.builds(
    Settings,
    prompt=PROMPT,
    negative_prompt=some.none() | TEXT,
    steps=some.integers(1, 150),
    guidance=some.integers(0, 3000).map(lambda hundredths: hundredths / 100),
    sampler=some.sampled_from(sampler_names()),
    size=some.tuples(some.integers(8, 4096), some.integers(8, 4096)),
    model=NAME,
    version=some.just("0.1.0"),
    further=some.fixed_dictionaries(
        {},
        optional={
            "strength": some.integers(0, 100).map(lambda hundredths: hundredths / 100),
            "clip_skip": some.integers(1, 12),
            "loras": some.lists(some.from_regex(r"[a-z ,\"]{0,8}[a-z]\.safetensors:0\.[1-9]", fullmatch=True)),
        },
    ),
)


@given(settings=SETTINGS, seed=some.integers(0, 2**64 - 1))
def test_what_is_written_is_read_again(settings: Settings, seed: int) -> None:
    found = parse(parameters(settings, seed))
    assert (found.prompt, found.negative_prompt) == (settings.prompt, settings.negative_prompt)
    assert (found.steps, found.sampler, found.guidance) == (settings.steps, settings.sampler, settings.guidance)
    assert (found.seed, found.size, found.model) == (seed, settings.size, settings.model)
    assert found.strength == settings.further.get("strength")
    assert len(found.loras) == len(settings.further.get("loras", []))


@given(text=TEXT | some.from_regex(r"\nSteps: [0-9]{1,30}, Seed: [0-9]{1,30}, CFG scale: [0-9.]{1,12}", fullmatch=True))
def test_any_text_is_read_and_can_be_sent_on(text: str) -> None:
    found = parse(text)
    assert found.text == text and msgspec.json.decode(msgspec.json.encode(found))["text"] == text


def test_the_text_of_other_interfaces_is_read() -> None:
    found = parse(
        "a cat, <lora:x:1>\nsitting\nNegative prompt: dog\nSteps: 30, Sampler: DPM++ 2M, Schedule type: Karras, "
        'CFG scale: 7, Seed: 5, Size: 512x768, Model hash: 6ce0161689, Lora hashes: "x: 1, y: 2", Version: v1.10.1'
    )
    assert (found.prompt, found.negative_prompt) == ("a cat, <lora:x:1>\nsitting", "dog")
    assert (found.steps, found.sampler, found.guidance) == (30, "dpmpp_2m_karras", 7)
    assert (found.seed, found.size, found.pairs["Lora hashes"]) == (5, (512, 768), "x: 1, y: 2")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_kind_of_file_carries_the_text(kind: Format) -> None:
    text = "ein schöner Kreis ✓\nSteps: 4, Seed: 1"
    file = encode_pixels(np.zeros((8, 8, 3), np.uint8), kind, text=text)
    assert read_text(file) == text


def test_a_picture_without_text_and_what_is_no_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    assert read_text(file.getvalue()) is None
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    for junk in (huge.getvalue(), b"", b"nothing", file.getvalue()[:20], b"GIF89a"):
        with pytest.raises(RequestError):
            read_text(junk)
