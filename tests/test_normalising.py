"""VAEs whose configs say mean and deviation of their latents: undone before decoding, applied when encoding."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import CheckpointError
from latentrt.export.additions.refiner import add_refiner
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.normalised_latents import KEYS
from latentrt.export.options import CheckpointOptions
from latentrt.runtime.images.preview import preview
from tests.conftest import Make
from tests.test_families import LEAST, ours, psnr, reference, theirs
from tests.test_pipeline_images import left_half, photo
from tests.test_tiny_decoder import save_tiny_vae

pytestmark = pytest.mark.usefixtures("one_thread")

KNOWN: dict[str, Any] = {"latents_mean": [-0.8, 0.3, 0.5, 1.2], "latents_std": [0.6, 2.5, 1.4, 0.9]}
XL = diffusers.StableDiffusionXLPipeline
WIDE: dict[str, Any] = {"width": 40, "height": 32}


def with_keys(config: Path, **keys: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))


@dataclass(frozen=True)
class Normalised:
    """A plain checkpoint, the VAE and the tiny VAE that are exported with it, and the bundle."""

    checkpoint: Path
    vae: Path
    tiny_vae: Path
    bundle: Path

    def pipe(self, kind: Any) -> Any:
        """Return diffusers' pipeline with this VAE."""
        pipe = reference(kind, self.checkpoint, diffusers.EulerDiscreteScheduler)
        pipe.vae = diffusers.AutoencoderKL.from_pretrained(self.vae)
        return pipe


@pytest.fixture(scope="module")
def normalised(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Normalised:
    root = tmp_path_factory.mktemp("normalised")
    checkpoint = made("sdxl", "")[0]
    vae = Path(shutil.copytree(checkpoint / "vae", root / "vae"))
    with_keys(vae / "config.json", **KNOWN)
    tiny = save_tiny_vae(root / "tiny", scaling_factor=0.5)
    options = CheckpointOptions(vae=str(vae), tiny_vae=str(tiny))
    export_checkpoint(str(checkpoint), root / "bundle", precision="fp32", options=options)
    return Normalised(checkpoint, vae, tiny, root / "bundle")


def test_the_mean_and_the_deviation_are_undone_before_decoding(normalised: Normalised) -> None:
    found = ours(normalised.bundle, guidance=5.0, size=(40, 32))
    assert psnr(found, theirs(normalised.pipe(XL), guidance_scale=5.0, **WIDE)) >= LEAST
    plain = reference(XL, normalised.checkpoint, diffusers.EulerDiscreteScheduler)
    assert psnr(found, theirs(plain, guidance_scale=5.0, **WIDE)) < LEAST / 2


def test_they_are_applied_when_an_image_is_encoded(normalised: Normalised) -> None:
    pipe = normalised.pipe(diffusers.StableDiffusionXLImg2ImgPipeline)
    expected = theirs(pipe, image=photo(), strength=0.6, guidance_scale=5.0)
    assert psnr(ours(normalised.bundle, image=photo(), strength=0.6, guidance=5.0), expected) >= LEAST


def test_what_a_mask_keeps_is_the_image(normalised: Normalised) -> None:
    """diffusers' inpainting decodes as its other pipelines do and forgets to encode so: that it is taught here."""
    pipe = normalised.pipe(diffusers.StableDiffusionXLInpaintPipeline)
    mean, deviation = (torch.tensor(KNOWN[key]).view(1, -1, 1, 1) for key in KEYS)
    encode, scale = pipe._encode_vae_image, pipe.vae.config.scaling_factor
    pipe._encode_vae_image = lambda *args, **image: (encode(*args, **image) / scale - mean) * scale / deviation
    images = {"image": photo(), "mask_image": left_half(), **WIDE}
    expected = theirs(pipe, **images, strength=0.6, guidance_scale=5.0)
    found = ours(normalised.bundle, image=photo(), mask=left_half(), strength=0.6, guidance=5.0)
    assert psnr(found, expected) >= LEAST


def test_a_tiny_decoder_takes_latents_as_they_are(normalised: Normalised) -> None:
    pipe = normalised.pipe(XL)
    pipe.vae = diffusers.AutoencoderTiny.from_pretrained(normalised.tiny_vae)
    expected = theirs(pipe, guidance_scale=5.0, **WIDE)
    assert psnr(ours(normalised.bundle, guidance=5.0, size=(40, 32), decoder="tiny"), expected) >= LEAST


def test_the_preview_knows_what_latents_mean(normalised: Normalised, made: Make) -> None:
    own, plain = (Bundle.open(root).manifest.latents for root in (normalised.bundle, made("sdxl", "")[1]))
    mean, deviation = (np.array(KNOWN[key], dtype=np.float32).reshape(1, -1, 1, 1) for key in KEYS)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32) * plain.scaling_factor
    expected = preview(latents, plain).astype(int)
    found = preview((latents / plain.scaling_factor - mean) * plain.scaling_factor / deviation, own)
    # The fit holds small latents back a little, see RIDGE, and these are of other sizes.
    assert np.abs(found - expected).mean() < expected.std() / 8
    assert np.abs(preview(latents, own) - expected).mean() > expected.std() / 2


def test_other_tools_that_open_the_graphs_do_not_do_it_again(normalised: Normalised) -> None:
    for half in ("vae_decoder", "vae_encoder"):
        config = json.loads((normalised.bundle / "onnx" / half / "config.json").read_text())
        assert not set(KEYS) & set(config) and config["scaling_factor"] == 0.13025


def test_graphs_from_elsewhere_are_told_what_their_config_says(
    normalised: Normalised, made: Make, tmp_path: Path
) -> None:
    graphs = Path(shutil.copytree(made("sdxl", "")[1] / "onnx", tmp_path / "onnx"))
    for half in ("vae_decoder", "vae_encoder"):
        with_keys(graphs / half / "config.json", **KNOWN)
    bundle = tmp_path / "bundle"
    export_checkpoint(str(graphs), bundle, precision="fp32")
    onnx.checker.check_model(str(bundle / "onnx" / "vae_encoder" / "model.onnx"), full_check=True)
    request = {"image": photo(), "strength": 0.6, "guidance": 5.0}
    assert psnr(ours(bundle, **request), ours(normalised.bundle, **request)) >= LEAST


def test_the_pipelines_of_the_first_families_do_not_look_at_them(sd1_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sd1_checkpoint, tmp_path / "other"))
    with_keys(other / "vae" / "config.json", **KNOWN, shift_factor=0.7)
    first, second = (
        theirs(reference(diffusers.StableDiffusionPipeline, root, diffusers.EulerDiscreteScheduler), **WIDE)
        for root in (sd1_checkpoint, other)
    )
    np.testing.assert_array_equal(first, second)
    assert open_checkpoint(str(other)).normalising == open_checkpoint(str(sd1_checkpoint)).normalising == {}


@pytest.fixture
def copy(made: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("sdxl", "")[0], tmp_path / "checkpoint"))


def opened(root: Path, **keys: Any) -> Checkpoint:
    with_keys(root / "vae" / "config.json", **keys)
    return open_checkpoint(str(root))


@pytest.mark.parametrize("given", [{"latents_mean": KNOWN["latents_mean"]}, dict.fromkeys(KEYS), {"shift_factor": 0.7}])
def test_one_of_the_two_and_a_shift_change_no_picture_of_diffusers(copy: Path, given: dict[str, Any]) -> None:
    plain = theirs(reference(XL, copy, diffusers.EulerDiscreteScheduler), **WIDE)
    assert opened(copy, **given).normalising == {}
    np.testing.assert_array_equal(theirs(reference(XL, copy, diffusers.EulerDiscreteScheduler), **WIDE), plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latents_mean", [1.0, 2.0]),
        ("latents_mean", 0.5),
        ("latents_mean", [0.1, None, 0.1, 0.1]),
        ("latents_std", [1.0, 1.0, 0.0, 1.0]),
        ("latents_std", [1.0, 1.0, math.inf, 1.0]),
    ],
)
def test_what_is_no_mean_and_no_deviation_is_refused(copy: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf" \$\.{key}: "):
        opened(copy, **KNOWN | {key: value})


def test_a_refiner_of_other_latents_is_refused(copy: Path, made: Make) -> None:
    with pytest.raises(CheckpointError, match=r"^--refiner .*VAE"):
        add_refiner(opened(copy, **KNOWN), CheckpointOptions(refiner=str(made("sdxl", "refiner")[0])))
