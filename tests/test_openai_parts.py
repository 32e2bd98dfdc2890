"""The Images API on a bundle with ControlNets and a tiny decoder: images to follow, drafts, and variations."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from latentrt import Request
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.runtime.request import Control
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from tests.conftest import MakeControlled
from tests.test_openai_pictures import close, file_of, grey, pixels_of
from tests.test_tiny_decoder import save_tiny_vae

ASKED = {"seed": 3, "steps": 6}


@pytest.fixture(scope="module")
def models(controlled: MakeControlled, workshop: Path) -> Iterator[Models]:
    made, vae = controlled("sd1", ""), workshop / "sd1-tiny-vae"
    if not vae.is_dir():
        save_tiny_vae(vae)
    networks = (ControlNetOption(name="edges", path=str(made.networks["edges"])),)
    options = CheckpointOptions(tiny_vae=str(vae), controlnets=networks)
    export_checkpoint(str(made.checkpoint), workshop / "sd1-drafting", precision="fp32", options=options)
    loading = {"backend": "cpu", "threads": 1}
    with Models({"tiny": workshop / "sd1-drafting"}, ServeOptions(slots=4), loading) as opened:
        yield opened


def first(answer: Any) -> Any:
    return answer.data[0]


@pytest.fixture(scope="module")
def followed(models: Models) -> Request:
    control = Control(name="edges", image=grey(), scale=0.8, stop=0.5)
    return Request(prompt="a star", size=(32, 32), controls=(control,), **ASKED)  # type: ignore[arg-type]


def test_an_image_is_followed_that_comes_in_json(client: openai.OpenAI, models: Models, followed: Request) -> None:
    control = {"name": "edges", "image": base64.b64encode(file_of(grey())).decode(), "scale": 0.8, "stop": 0.5}
    found = first(client.images.generate(prompt="a star", size="32x32", extra_body={**ASKED, "controls": [control]}))
    alone = models.all()[0].pipe.draw(followed)
    assert close(pixels_of(found.b64_json), alone.pixels[0])
    assert found.model_extra["settings"]["further"]["controls"] == ["edges:0.8:0:0.5"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a star", extra_body={"controls": [{**control, "name": "depth"}]})
    assert refused.value.param == "controls"


def test_an_image_is_followed_that_is_a_file_of_a_form(
    client: openai.OpenAI, models: Models, followed: Request
) -> None:
    import msgspec

    fields = {"prompt": "a star", "size": "32x32", "seed": "3", "steps": "6", "strength": "1.0"}
    controls = {"controls[][name]": "edges", "controls[][scale]": "0.8", "controls[][stop]": "0.5"}
    files = {"image": ("a.png", file_of(grey())), "controls[][image]": ("b.png", file_of(grey()))}
    answer = client._client.post(f"{client.base_url}images/edits", data={**fields, **controls}, files=files)
    alone = models.all()[0].pipe.draw(msgspec.structs.replace(followed, image=grey(), strength=1.0))
    assert answer.status_code == 200, answer.text
    assert close(pixels_of(answer.json()["data"][0]["b64_json"]), alone.pixels[0])


def test_partial_images_are_the_tiny_decoders_drafts(client: openai.OpenAI, models: Models) -> None:
    drafts: dict[int, np.ndarray] = {}
    models.all()[0].pipe.draw(
        Request(prompt="a star", **ASKED),  # type: ignore[arg-type]
        on_step=lambda step: drafts.setdefault(step.stage, step.draft[0].copy()) is None,
    )
    *partial, last = (
        event.model_dump()
        for event in client.images.generate(prompt="a star", stream=True, partial_images=3, extra_body=ASKED)
    )
    assert len(partial) == 3 and last["type"] == "image_generation.completed"
    for event in partial:
        found = pixels_of(event["b64_json"]).astype(int)
        assert np.abs(found - drafts[event["stage"]]).max() <= 3  # kernels differ by how many rows they are given


def test_variations_are_drawn_again_alone_by_what_is_told_of_them(client: openai.OpenAI) -> None:
    extra = {**ASKED, "variation_seed": 7, "variation_strength": 0.5}
    both = client.images.generate(prompt="a star", n=2, extra_body=extra).data
    assert both is not None
    for number, one in enumerate(both):
        assert one.model_extra is not None and one.model_extra["seed"] == 3
        told = one.model_extra["settings"]["further"]
        assert told == {"variation_seed": 7 + number, "variation_strength": 0.5}
        again = first(client.images.generate(prompt="a star", extra_body={**ASKED, **told}))
        assert close(pixels_of(again.b64_json), pixels_of(one.b64_json))
