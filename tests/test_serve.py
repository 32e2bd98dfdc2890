"""The service with the real OpenAI client on a real socket."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from latentrt import Request
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions


@pytest.fixture(scope="module")
def models(sd1_bundle: Path) -> Iterator[Models]:
    options = ServeOptions(slots=4, aliases={"gpt-image-1": "tiny"})
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


def test_a_picture_is_the_one_that_the_library_draws(client: openai.OpenAI, models: Models) -> None:
    answer = client.images.generate(prompt="a circle", model="tiny", n=2, extra_body={"seed": 3, "steps": 4})
    alone = models.all()[0].pipe.draw(Request(prompt="a circle", seed=3, steps=4, n=2))
    assert answer.data is not None and len(answer.data) == 2
    for number, (one, pixels) in enumerate(zip(answer.data, alone.pixels, strict=True)):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))))
        assert np.abs(drawn.astype(int) - pixels).max() <= 1
        assert one.model_extra is not None and one.model_extra["seed"] == 3 + number


@pytest.mark.parametrize(
    ("asked", "status", "param", "code"),
    [
        ({"model": "nope"}, 404, "model", "model_not_found"),
        ({"size": "17x17"}, 400, "size", "invalid_value"),
        ({"size": "9999x9999"}, 400, "size", "invalid_value"),
        ({"size": "huge"}, 400, "size", "invalid_value"),
        ({"n": 11}, 400, "n", "invalid_value"),
        ({"extra_body": {"steps": "many"}}, 400, "steps", "invalid_type"),
        ({"extra_body": {"steps": 10_000}}, 400, "steps", "invalid_value"),
        ({"extra_body": {"colour": "red"}}, 400, "colour", "unknown_parameter"),
        ({"extra_body": {"sampler": "nope"}}, 400, "sampler", "invalid_value"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_its_field(
    client: openai.OpenAI, asked: dict[str, Any], status: int, param: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.images.generate(prompt="a circle", **asked)
    error = refused.value
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.request_id is not None


def test_models_are_listed_with_their_aliases(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-image-1"]
