"""Bundles of schema 1, whose manifests say by names what components are: they open, and draw what they drew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle, manifest_from_json
from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.engines.errors import BundleError
from latentrt.runtime.pipeline import Pipeline
from tests.conftest import REFINED, Make


def downgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest as the version before wrote it."""
    base, *further = document.pop("denoisers").values()
    own = [{key: value for key, value in text.items() if key != "join"} for text in base["text_encoders"]]
    document |= {"schema_version": 1, "text_encoders": own, "zero_negative": base["zero_negative"], "refiner": None}
    for spec in further:
        texts = [{key: value for key, value in text.items() if key != "join"} for text in spec["text_encoders"]]
        document["refiner"] = {"text_encoders": texts, "zero_negative": spec["zero_negative"]}
    for component in document["components"].values():
        for key in ("role", "of", "control"):
            del component[key]
    return document


def aged(bundle: Path, target: Path) -> Path:
    """Copy a bundle and give it the manifest that the version before wrote."""
    shutil.copytree(bundle, target, symlinks=True)
    document = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps(downgrade(document)))
    return target


def test_a_bundle_of_schema_1_opens_with_the_roles_of_its_names_and_draws_the_same(
    sd1_bundle: Path, tmp_path: Path
) -> None:
    old = aged(sd1_bundle, tmp_path / "old")
    assert Bundle.open(old).manifest == Bundle.open(sd1_bundle).manifest
    request: dict[str, Any] = {"steps": 2, "seed": 3, "negative_prompt": "blue"}
    with Pipeline.load(sd1_bundle, "cpu") as new, Pipeline.load(old, "cpu") as before:
        assert np.array_equal(new("a red circle", **request).pixels, before("a red circle", **request).pixels)


def test_a_refiner_of_schema_1_is_the_second_denoiser(made: Make, tmp_path: Path) -> None:
    new = made("sdxl", REFINED)[1]
    manifest = Bundle.open(aged(new, tmp_path / "old")).manifest
    assert manifest == Bundle.open(new).manifest
    assert (manifest.denoiser, manifest.refiner) == ("unet", "refiner")
    assert [len(told.sizes) for told in manifest.denoisers.values()] == [6, 5]
    assert manifest.denoisers["refiner"].sizes[-1] == "aesthetic_score"


@pytest.mark.parametrize(("name", "role"), [("controlnet_edges", "controlnet"), ("adapter_a_b", "adapter")])
def test_what_steers_in_schema_1_belongs_to_its_unet(sd1_bundle: Path, name: str, role: str) -> None:
    document = downgrade(json.loads((sd1_bundle / MANIFEST).read_text()))
    document["components"][name] = document["components"]["vae_encoder"]
    manifest = manifest_from_json(json.dumps(document), where="here")
    component = manifest.components[name]
    assert (component.role, component.of, component.control) == (role, "unet", name.partition("_")[2])
    assert manifest.find_control(name.partition("_")[2]) == name


def test_a_component_of_schema_1_that_nobody_knows_is_refused(sd1_bundle: Path) -> None:
    document = downgrade(json.loads((sd1_bundle / MANIFEST).read_text()))
    document["components"]["transformer"] = document["components"]["unet"]
    with pytest.raises(BundleError, match=r"\$\.components\.transformer\.role"):
        manifest_from_json(json.dumps(document), where="here")


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "a denoiser that the manifest says nothing of": {"vae_encoder": {"role": "denoiser"}},
    "two decoders": {"vae_encoder": {"role": "decoder"}},
    "no text encoder where a denoiser takes one": {"text_encoder": {"role": "tiny_decoder"}},
    "a ControlNet of nothing": {"text_encoder": {"role": "controlnet", "control": "edges"}},
    "a decoder that requests can follow": {"vae_decoder": {"control": "edges"}},
}


@pytest.mark.parametrize("changes", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_roles_that_contradict_each_other_are_refused(sd1_bundle: Path, changes: dict[str, Any]) -> None:
    document = json.loads((sd1_bundle / MANIFEST).read_text())
    for name, change in changes.items():
        document["components"][name] |= change
    with pytest.raises(BundleError, match=r"here \$\.(denoisers|components)"):
        manifest_from_json(json.dumps(document), where="here")


def test_sizes_that_do_not_fit_what_the_denoiser_takes_are_refused(sd1_bundle: Path) -> None:
    document = json.loads((sd1_bundle / MANIFEST).read_text())
    document["denoisers"]["unet"]["sizes"] = ["crop_top"]
    with pytest.raises(BundleError, match=r"\$\.denoisers\.unet\.sizes"):
        manifest_from_json(json.dumps(document), where="here")
