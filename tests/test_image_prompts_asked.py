"""Image prompts as they are asked for: from the command line, in JSON and in forms of the Images API, in Triton."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from click.testing import CliRunner
from PIL import Image

from latentrt import ImagePrompt, Pipeline, Request
from latentrt.__main__ import cli
from latentrt.engines.spec import Array
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from tests.conftest import Controlled
from tests.test_openai_pictures import close, file_of, grey, pixels_of
from tests.test_triton import asked, drawn

ASKED = {"seed": 3, "steps": 4}
SCALE = {"up": 0.8, "mid_block": 0.3}


@pytest.fixture(scope="module")
def models(shown: Callable[[str], Controlled]) -> Iterator[Models]:
    bundle = shown("sd1").bundle
    with Models({"tiny": bundle}, ServeOptions(slots=4), {"backend": "cpu", "threads": 1}) as opened:
        yield opened


def alone(models: Models, *images: ImagePrompt, **options: object) -> Array:
    request = Request(prompt="a star", size=(32, 32), image_prompts=images, **ASKED, **options)  # type: ignore[arg-type]
    pixels: Array = models.all()[0].pipe.draw(request).pixels[0]
    return pixels


def test_an_image_comes_in_json(client: openai.OpenAI, models: Models) -> None:
    sent = {"name": "plus", "image": base64.b64encode(file_of(grey())).decode(), "scale": SCALE}
    answer = client.images.generate(prompt="a star", size="32x32", extra_body={**ASKED, "image_prompts": [sent]})
    assert answer.data is not None and answer.data[0].model_extra is not None
    expected = alone(models, ImagePrompt(name="plus", image=grey(), scale=SCALE))
    assert close(pixels_of(answer.data[0].b64_json), expected) and not close(expected, alone(models))
    assert answer.data[0].model_extra["settings"]["further"]["image_prompts"] == [f"plus:{json.dumps(SCALE)}"]
    for wrong in (
        {**sent, "name": "other"},
        {"name": "plus"},
        {**sent, "image": "?"},
        {**sent, "scale": {"up": "much"}},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a star", extra_body={"image_prompts": [wrong]})
        assert refused.value.param == "image_prompts"


def test_an_image_is_a_file_of_a_form(client: openai.OpenAI, models: Models) -> None:
    fields = {"prompt": "a star", "size": "32x32", "seed": "3", "steps": "4", "strength": "1.0"}
    images = {"image_prompts[][name]": "plain", "image_prompts[][scale]": "0.8"}
    files = {"image": ("a.png", file_of(grey())), "image_prompts[][image]": ("b.png", file_of(grey(16, 24)))}
    answer = client._client.post(f"{client.base_url}images/edits", data={**fields, **images}, files=files)
    assert answer.status_code == 200, answer.text
    prompt = ImagePrompt(name="plain", image=grey(16, 24), scale=0.8)
    expected = alone(models, prompt, image=grey(), strength=1.0)
    assert close(pixels_of(answer.json()["data"][0]["b64_json"]), expected)


def test_the_command_line_takes_one(shown: Callable[[str], Controlled], tmp_path: Path) -> None:
    bundle, photo, picture = shown("sd1").bundle, tmp_path / "a:1.png", tmp_path / "picture.png"
    grey().save(photo)
    words = ["generate", str(bundle), "a star", "--steps", "4", "--seed", "3", "--size", "32x32", "--json"]
    words += ["-o", str(picture), "--image-prompt", f"plain={photo}:0.5", "--image-prompt", f"plus={photo}"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["image_prompts"] == ["plain:0.5", "plus:1"]
    images = [ImagePrompt(name="plain", image=photo, scale=0.5), ImagePrompt(name="plus", image=photo)]
    with Pipeline.load(bundle, "cpu") as pipe:
        expected = pipe("a star", steps=4, seed=3, size=(32, 32), image_prompts=images).pixels[0]
    assert close(np.asarray(Image.open(picture)), expected)
    wrong = CliRunner().invoke(cli, [*words[:3], "--image-prompt", "plain"])
    assert wrong.exit_code == 2


def test_tritons_tensors_hold_one_each() -> None:
    found = asked(
        prompt=[b"a"],
        image_prompt_name=[b"plain", b"plus"],
        image_prompt_image=[drawn(8, 8), drawn(4, 8)],
        image_prompt_scale=[0.5, 0.25],
    ).request.image_prompts
    assert [(one.name, one.image.size, one.scale) for one in found] == [  # type: ignore[union-attr]
        ("plain", (8, 8), 0.5), ("plus", (4, 8), 0.25),
    ]  # fmt: skip
