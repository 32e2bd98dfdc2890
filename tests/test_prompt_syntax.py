"""The weighted syntax: what each sign means, and which prompts are refused."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.errors import RequestError
from latentrt.runtime.text.syntax import Segment, parse_weighted

MEANINGS: dict[str, list[list[tuple[str, float]]]] = {
    "": [[]],
    "a red cube": [[("a red cube", 1.0)]],
    "a (red) cube": [[("a ", 1.0), ("red", 1.1), (" cube", 1.0)]],
    "((red))": [[("red", 1.21)]],
    "(red:1.3)": [[("red", 1.3)]],
    "(red : .5 )": [[("red ", 0.5)]],
    "[red]": [[("red", 0.909090909)]],
    "[[red]]": [[("red", 0.826446281)]],
    "([red])": [[("red", 1.0)]],
    "(a (red:2) cube:1.5)": [[("a ", 1.5), ("red", 3.0), (" cube", 1.5)]],
    "(red:1.2) (blue:1.2)": [[("red blue", 1.2)]],
    "(red:1.2) (blue:1.3)": [[("red ", 1.2), ("blue", 1.3)]],
    "(time: 12:1.2)": [[("time: 12", 1.2)]],
    "time: 12": [[("time: 12", 1.0)]],
    r"\(red\) \[a\] (x\:y:2) \\ \| \q": [[("(red) [a] ", 1.0), ("x:y ", 2.0), (r"\ | \q", 1.0)]],
    "a | b": [[("a | b", 1.0)]],
    "red BREAK blue": [[("red ", 1.0)], [(" blue", 1.0)]],
    "(red BREAK blue:1.5)": [[("red ", 1.5)], [(" blue", 1.5)]],
    "BREAK red BREAK BREAK": [[(" red ", 1.0)]],
    "breaks BREAKS Break": [[("breaks BREAKS Break", 1.0)]],
    "()": [[]],
    r"<lora\:x:0.8> embedding\:x <lora>": [[("<lora:x:0.8> embedding:x <lora>", 1.0)]],
}

REFUSED = {
    "(red": r"character 1: '\('.* \\\( ",
    "a [red": r"character 3: '\['",
    "red)": r"character 4: '\)'.* \\\) ",
    "(red]": r"character 5: '\]'",
    "(red:)": r"character 5: .*''.* 0 .* 100; .*\\: ",
    "(red:blue)": "character 5: .*'blue'",
    "(red:1.2.3)": "'1.2.3'",
    "(red:-1)": "'-1'",
    "(red:1e1)": "'1e1'",
    "(red:nan)": "'nan'",
    "(red:101)": "'101'",
    "(red:٣)": "'٣'",
    "(red:" + "9" * 400 + ")": "'9999999999999999999…'",
    "((red:20):20)": "character 2: .* 400, .* 100;",
    "[red:blue:0.5]": r"character 10: '\[from:to:when\]'",
    "[red:0.5]": r"\(words:weight\)",
    "a <lora:style:0.8>": r"character 3: '<lora:style:0\.8>'.* loras=\[Lora\(file=.* --lora FILE:SCALE; .*\\: ",
    "(a <LORA:a name that goes on:1>:1.2)": "character 4: '<LORA:a name that g…'",
    "<lyco:x:1>": "--lora FILE:SCALE",
    "<hypernet:x:1>": "hypernetworks",
    "(embedding:bad.pt:1.2)": r"character 2: 'embedding:bad\.pt'",
    "[red|blue]": r"character 5: '\[this\|that\]'",
}


@pytest.mark.parametrize("text", MEANINGS)
def test_a_sign_means_what_the_table_says(text: str) -> None:
    found = [[(segment.text, segment.weight) for segment in part] for part in parse_weighted(text)]
    assert found == MEANINGS[text]


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_parse_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(RequestError, match=REFUSED[text]) as caught:
        parse_weighted(text)
    assert "\n" not in str(caught.value)


TEXTS = st.text(max_size=40) | st.text(alphabet=r"ab ()[]:\|.1BREAK", max_size=30)


@given(text=TEXTS)
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parts = parse_weighted(text)
    except RequestError:
        return
    for part in parts:
        assert all(segment.text and 0 <= segment.weight <= 100 for segment in part)
        assert all(one.weight != other.weight for one, other in itertools.pairwise(part))


def escape(text: str) -> str:
    return re.sub(r"([\\()\[\]:|])", r"\\\1", text)


@given(text=TEXTS.filter(lambda text: "BREAK" not in text))
def test_escaped_text_is_the_text_itself(text: str) -> None:
    (part,) = parse_weighted(escape(text))
    assert part == ((Segment(text=text),) if text.strip() else ())


@given(
    pieces=st.lists(st.tuples(TEXTS.filter(lambda text: "BREAK" not in text), st.integers(0, 999)), max_size=8),
)
def test_written_weights_are_read_back(pieces: list[tuple[str, int]]) -> None:
    """The text is whole, and each character that is no white space has the weight that was written around it."""
    written = "".join(f"({escape(text)}:{weight / 100})" for text, weight in pieces)
    (part,) = parse_weighted(written)
    found = [(letter, segment.weight) for segment in part for letter in segment.text if not letter.isspace()]
    assert found == [(letter, weight / 100) for text, weight in pieces for letter in text if not letter.isspace()]


@pytest.mark.parametrize("text", ["[" * 50_000 + "a" + "]" * 50_000, ":" * 100_000, " " * 100_000, "(a" * 50_000])
@pytest.mark.timeout(20)
def test_no_text_takes_more_than_linear_time(text: str) -> None:
    try:
        assert len(parse_weighted(text)) == 1
    except RequestError as error:
        assert len(str(error)) < 200
