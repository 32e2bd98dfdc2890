"""What a request means that does not say its guidance or its strength: the bundle's own, which are diffusers'."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.engines.bundle.files import Bundle, manifest_from_json, manifest_to_json
from latentrt.engines.bundle.manifest import Defaults
from latentrt.engines.errors import BundleError
from latentrt.export.configs.families import FAMILIES
from latentrt.runtime.draw.job import resolve
from tests.conftest import Make
from tests.test_pipeline_images import left_half, photo
from tests.test_sd3 import PROMPT, SIZE

SD3 = {"guidance": "", "strength": "Img2Img", "masked_strength": "Inpaint"}  # which pipeline says what


def test_those_of_sd3_are_its_pipelines_own() -> None:
    for field, kind in SD3.items():
        call = inspect.signature(getattr(diffusers, f"StableDiffusion3{kind}Pipeline").__call__)
        named = "guidance_scale" if field == "guidance" else "strength"
        assert getattr(FAMILIES["sd3"].defaults, field) == call.parameters[named].default
    assert {FAMILIES[family].defaults for family in FAMILIES if family != "sd3"} == {Defaults()}


@pytest.fixture(scope="module")
def pipe(made: Make) -> Iterator[Pipeline]:
    with Pipeline.load(made("sd3", "")[1], "cpu", threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        ({}, {"guidance": 7.0}),
        ({"image": photo().resize(SIZE)}, {"guidance": 7.0, "strength": 0.6}),
        ({"image": photo().resize(SIZE), "mask": left_half().resize(SIZE)}, {"guidance": 7.0, "strength": 0.6}),
    ],
    ids=["text", "an image", "a mask"],
)
def test_a_request_without_them_is_one_with_the_bundles_own(
    pipe: Pipeline, starts: dict[str, Any], said: dict[str, float]
) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "steps": 4, **starts}
    found, expected = pipe(**asked), pipe(**asked, **said)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.settings[0].guidance == 7.0


def test_other_families_mean_what_they_meant(sd1_bundle: Path) -> None:
    manifest = Bundle.open(sd1_bundle).manifest
    plain, image = (resolve(Request(prompt="a", **more), manifest) for more in ({}, {"image": photo()}))
    assert (plain.scale, plain.strength, image.strength) == (7.5, 1.0, 0.8)
    masked = resolve(Request(prompt="a", image=photo(), mask=left_half()), manifest)
    assert masked.strength == 1.0


def test_a_bundle_of_before_has_the_defaults_of_before(pipe: Pipeline) -> None:
    document = json.loads(manifest_to_json(pipe.manifest))
    del document["defaults"]
    assert manifest_from_json(json.dumps(document), where="manifest.json").defaults == Defaults()
    document["defaults"] = {"strength": 1.5}
    with pytest.raises(BundleError):
        manifest_from_json(json.dumps(document), where="manifest.json")
