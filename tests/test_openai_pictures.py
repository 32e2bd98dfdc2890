"""The Images API with the real OpenAI client on a real socket: what is drawn, edited and streamed."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from latentrt import Request
from latentrt.engines.spec import Array
from latentrt.runtime.images.read_parameters import read_text
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai import store
from latentrt.runtime.serve.options import Limits, ServeOptions
from latentrt.runtime.serve.pictures import shown
from tests.lora_files import kohya, make_factors, save

ASKED = {"seed": 3, "steps": 4}
SIDE = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sd1_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("service")
    (folder / "loras").mkdir()
    save(folder / "loras" / "ink.safetensors", kohya(make_factors(sd1_checkpoint, seed=1)))
    return folder


@pytest.fixture(scope="module")
def models(sd1_bundle: Path, folders: Path) -> Iterator[Models]:
    options = ServeOptions(
        slots=4, limits=Limits(pixels=256 * 256), loras=folders / "loras", pictures=folders / "pictures"
    )
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


def pixels_of(text: str | None) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text or ""))).convert("RGB"))


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def grey(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, width, dtype=np.uint8), (height, 1))).convert("RGB")


def close(found: Array, expected: Array) -> bool:
    return found.shape == expected.shape and int(np.abs(found.astype(int) - expected).max()) <= 1


# --- edits ---


def test_an_edit_is_the_image_to_image_of_the_library(client: openai.OpenAI, models: Models) -> None:
    answer = client.images.edit(image=file_of(grey()), prompt="a star", extra_body={**ASKED, "strength": 0.5})
    alone = models.all()[0].pipe.draw(Request(prompt="a star", image=grey(), strength=0.5, **ASKED))
    assert answer.data is not None
    assert close(pixels_of(answer.data[0].b64_json), alone.pixels[0])


@pytest.mark.parametrize("kind", ["alpha", "black and white"])
def test_a_mask_repaints_where_it_is_transparent_or_white(client: openai.OpenAI, models: Models, kind: str) -> None:
    inner = np.zeros((SIDE, SIDE), dtype=np.uint8)
    inner[8:24, 8:24] = 255
    alpha = np.dstack([np.zeros((SIDE, SIDE, 3), dtype=np.uint8), 255 - inner])
    mask = Image.fromarray(alpha if kind == "alpha" else inner)
    answer = client.images.edit(image=file_of(grey()), mask=file_of(mask), prompt="a star", extra_body=ASKED)
    asked = Request(prompt="a star", image=grey(), mask=Image.fromarray(inner), **ASKED)
    assert answer.data is not None
    assert close(pixels_of(answer.data[0].b64_json), models.all()[0].pipe.draw(asked).pixels[0])


def test_a_mask_is_turned_as_it_says(client: openai.OpenAI, models: Models) -> None:
    inner = np.zeros((SIDE, SIDE), dtype=np.uint8)
    inner[:12] = 255
    turned = np.rot90(inner)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.dstack([np.zeros((SIDE, SIDE, 3), dtype=np.uint8), 255 - turned])).save(file, "PNG", exif=exif)
    answer = client.images.edit(image=file_of(grey()), mask=file.getvalue(), prompt="a star", extra_body=ASKED)
    asked = Request(prompt="a star", image=grey(), mask=Image.fromarray(inner), **ASKED)
    assert answer.data is not None
    assert close(pixels_of(answer.data[0].b64_json), models.all()[0].pipe.draw(asked).pixels[0])


def test_several_images_are_one_for_each_picture(client: openai.OpenAI) -> None:
    images = [file_of(grey(), kind) for kind in ("PNG", "WEBP")]
    answer = client.images.edit(image=images, prompt="a star", n=2, extra_body=ASKED)
    assert answer.data is not None and len(answer.data) == 2
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=images, prompt="a star", n=1, extra_body=ASKED)
    assert refused.value.param == "image"


def test_a_form_says_what_json_says(client: openai.OpenAI, models: Models) -> None:
    extra: dict[str, Any] = {
        **ASKED,
        "guidance_interval": [0.1, 0.9],
        "loras": [{"name": "ink", "scale": 0.5}, {"name": "ink", "scale": 0.25}],
        "sampler": "euler",
        "strength": 0.75,
    }
    answer = client.images.edit(
        image=file_of(grey(40, 48)), prompt="a star", size="auto", stream=False, output_format="jpeg", extra_body=extra
    )
    assert answer.data is not None and answer.data[0].model_extra is not None
    settings = answer.data[0].model_extra["settings"]
    assert settings["size"] == [40, 48] and settings["sampler"] == "euler"
    assert settings["further"]["loras"] == ["ink.safetensors:0.5", "ink.safetensors:0.25"]
    assert settings["further"]["guidance_interval"] == [0.1, 0.9]
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))).format == "JPEG"


@pytest.mark.parametrize(
    ("files", "param", "code"),
    [
        ({}, "image", "missing_required_parameter"),
        ({"image": b"no picture"}, "image", "invalid_image"),
        ({"image": file_of(grey(), "GIF")}, "image", "invalid_image"),
        ({"image": file_of(grey())[:60]}, "image", "invalid_image"),
        ({"image": file_of(Image.new("1", (5000, 5000)))}, "image", "image_too_large"),
        ({"image": file_of(grey()), "mask": b"no picture"}, "mask", "invalid_image"),
        ({"image": file_of(grey()), "mask": file_of(grey(16, 16))}, "mask", "invalid_value"),
        ({"image": file_of(grey()), "painting": file_of(grey())}, "painting", "unknown_parameter"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_their_field(
    client: openai.OpenAI, files: dict[str, bytes], param: str, code: str
) -> None:
    sent = {name: ("file", data) for name, data in files.items()}
    answer = client._client.post(f"{client.base_url}images/edits", files={"prompt": (None, "a star"), **sent})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)


def test_an_edit_without_a_form_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/images/edits", cast_to=object, body={"prompt": "a star"})
    assert refused.value.status_code == 415


# --- streams ---


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_partial_images_come_in_order_and_early_and_then_the_picture(client: openai.OpenAI, count: int) -> None:
    events = [
        event.model_dump()
        for event in client.images.generate(
            prompt="a star", stream=True, partial_images=count, n=2, extra_body={"seed": 3, "steps": 10}
        )
    ]
    for picture in (0, 1):
        *partial, last = [event for event in events if event["image_index"] == picture]
        assert [event["partial_image_index"] for event in partial] == list(range(count))
        assert {event["type"] for event in partial} <= {"image_generation.partial_image"}
        assert last["type"] == "image_generation.completed" and last["usage"]["output_tokens"] == 8 * 8
        stages = [event["stage"] for event in partial]
        assert all(earlier < later for earlier, later in pairwise(stages)) and (not stages or stages[0] < 5)
        assert {pixels_of(event["b64_json"]).shape for event in [*partial, last]} == {(SIDE, SIDE, 3)}
        assert all(np.ptp(pixels_of(event["b64_json"])) > 0 for event in partial)
        assert last["seed"] == 3 + picture and set(last["seconds"]) >= {"wait", "encode", "denoise", "decode", "total"}


def test_a_streamed_picture_is_the_one_that_is_not_streamed(client: openai.OpenAI) -> None:
    *_, last = client.images.edit(
        image=file_of(grey()), prompt="a star", stream=True, partial_images=1, extra_body=ASKED
    )
    answer = client.images.edit(image=file_of(grey()), prompt="a star", extra_body=ASKED)
    assert last.type == "image_edit.completed" and answer.data is not None
    assert close(pixels_of(last.b64_json), pixels_of(answer.data[0].b64_json))


def test_stages_that_are_shown_are_spread_and_before_the_last() -> None:
    for stages in range(1, 60):
        for count in (1, 2, 3):
            found = sorted(shown(count, stages))
            assert len(found) == min(count, stages - 1) and all(1 <= stage < stages for stage in found)
            assert not found or stages < 3 or found[0] < stages / 2


def test_what_cannot_be_drawn_is_refused_before_a_stream_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a star", stream=True, size="17x17")
    assert refused.value.param == "size"


# --- what is told of a picture ---


def test_each_picture_of_a_request_can_be_drawn_again_alone(client: openai.OpenAI) -> None:
    extra = {"steps": 5, "sampler": "euler_ancestral", "guidance": 3.0, "negative_prompt": "blue"}
    together = client.images.generate(prompt="a star", n=3, extra_body=extra)
    assert together.data is not None
    for one in together.data:
        assert one.model_extra is not None
        again = client.images.generate(prompt="a star", extra_body={**extra, "seed": one.model_extra["seed"]})
        assert again.data is not None
        assert close(pixels_of(again.data[0].b64_json), pixels_of(one.b64_json))


def test_an_answer_says_what_was_drawn(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a star",
        n=2,
        size="64x32",
        quality="low",
        background="auto",
        output_format="webp",
        output_compression=50,
        user="someone",
        moderation="low",
        extra_body={"seed": None, "steps": None},
    )
    assert (answer.size, answer.quality, answer.background, answer.output_format) == ("64x32", "low", "opaque", "webp")
    assert answer.usage is not None and answer.data is not None and answer.safety_identifier == "someone"
    assert answer.usage.output_tokens == 2 * 16 * 8 and answer.usage.input_tokens_details.image_tokens == 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    for one in answer.data:
        assert one.model_extra is not None and one.revised_prompt is None
        assert one.model_extra["settings"]["steps"] == 10  # of the quality
        assert Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))).format == "WEBP"


def test_a_picture_can_be_had_by_its_url(client: openai.OpenAI, address: str) -> None:
    answer = client.images.generate(prompt="a star", response_format="url", extra_body=ASKED)
    assert answer.data is not None and answer.data[0].b64_json is None
    url = answer.data[0].url or ""
    assert url.startswith(f"{address}/pictures/")
    fetched = client._client.get(url)
    drawn = client.images.generate(prompt="a star", extra_body=ASKED)
    assert drawn.data is not None and fetched.headers["content-type"] == "image/png"
    assert fetched.content == base64.b64decode(drawn.data[0].b64_json or "")
    for name in ("..%2floras%2fink.safetensors", "picture-x.png", url.rpartition("/")[2].replace(".png", ".jpeg")):
        assert client._client.get(f"{address}/pictures/{name}").status_code == 404


def test_a_kept_picture_is_what_its_name_says_and_comes_whole(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", lambda *_, **__: (None, None))  # a system that knows no WebP
    monkeypatch.setattr("starlette.responses.guess_type", lambda *_, **__: (None, None))
    answer = client.images.generate(prompt="a star", response_format="url", output_format="webp", extra_body=ASKED)
    assert answer.data is not None
    for span in ("bytes=x", "bytes=99999999-", "bytes=0-3"):
        fetched = client._client.get(answer.data[0].url or "", headers={"range": span})
        assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/webp")
        assert fetched.headers["x-content-type-options"] == "nosniff"


def test_kept_pictures_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 250)
    (tmp_path / "of-somebody-else.png").write_bytes(bytes(1000))
    names = []
    for number in range(4):
        names.append(store.put(tmp_path, bytes([number]) * 100, "png"))
        os.utime(tmp_path / names[-1], (time.time() - 100 + number,) * 2)
    assert [store.find(tmp_path, name) for name in names] == [None, None, b"\2" * 100, b"\3" * 100]
    os.utime(tmp_path / names[2], (0, 0))
    assert store.find(tmp_path, names[2]) is None
    store.put(tmp_path, b"x", "jpeg")
    assert not (tmp_path / names[2]).exists() and (tmp_path / "of-somebody-else.png").exists()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_longest_prompts_are_drawn_in_every_format(client: openai.OpenAI, kind: Any) -> None:
    extra = {**ASKED, "overflow": "truncate", "negative_prompt": "\u03b2" * 32_000}
    answer = client.images.generate(prompt="\u03b1" * 32_000, output_format=kind, extra_body=extra)
    assert answer.data is not None
    text = read_text(base64.b64decode(answer.data[0].b64_json or ""))
    assert text is None if kind == "jpeg" else text is not None and text.startswith("\u03b1" * 32_000)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"background": "transparent"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"output_format": "svg"}, "output_format"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"quality": "best"}, "quality"),
        ({"extra_body": {"complexity": "high"}}, "complexity"),
        ({"extra_body": {"loras": [{"name": "../ink"}]}}, "loras"),
        ({"extra_body": {"loras": [{"name": "ink", "path": "/"}]}}, "loras"),
        ({"extra_body": {"controls": [{"name": "edges", "image": "&"}]}}, "controls"),
        ({"extra_body": {"guidance": 1e30}}, "guidance"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"decoder": "tiny"}}, "decoder"),
        ({"extra_body": {"deadline": 0}}, "deadline"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"n": 0}, "n"),
        ({"quality": "a" * 100_000}, "quality"),
    ],
)
def test_what_would_be_another_picture_is_refused_by_name(
    client: openai.OpenAI, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a star", **asked})
    assert refused.value.param == param


def test_any_field_may_be_null(client: openai.OpenAI) -> None:
    from latentrt.runtime.serve.openai.schema import Generation

    nothing = {name: None for name in Generation.__struct_fields__ if name not in ("prompt", "steps")}
    answer: Any = client.post("/images/generations", cast_to=object, body={**nothing, "prompt": "a star", "steps": 2})
    assert len(answer["data"]) == 1


def test_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    (card,) = client.models.list()
    assert client.models.retrieve("tiny") == card and card.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
