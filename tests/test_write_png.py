"""Pictures as PNG files: nothing of them is lost, and they are not much larger than they need to be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from latentrt.engines.spec import Array
from latentrt.runtime.cli import generate
from latentrt.runtime.images.write_png import encode_png

SIDE = 256


def pictures() -> dict[str, Array]:
    """Return a smooth picture with grain, as a photograph has, a flat one, and noise."""
    ramp, generator = np.linspace(0, 255, SIDE), np.random.default_rng(0)
    smooth = np.stack([np.add.outer(ramp, ramp) / 2, np.add.outer(ramp, -ramp) / 2 + 127, np.tile(ramp, (SIDE, 1))], -1)
    flat = np.zeros((SIDE, SIDE, 3))
    flat[64:192, 64:192] = (200, 30, 30)
    noise = generator.uniform(0, 255, (SIDE, SIDE, 3))
    every = {"smooth": smooth + generator.normal(0, 3, smooth.shape), "flat": flat, "noise": noise}
    return {name: np.clip(picture, 0, 255).astype(np.uint8) for name, picture in every.items()}


def test_a_png_holds_the_picture_and_its_settings_and_is_at_most_a_fifth_larger_than_pillows() -> None:
    for name, pixels in pictures().items():
        image, ours, theirs = Image.fromarray(pixels), io.BytesIO(), io.BytesIO()
        encode_png(image, ours, "a red circle, größer")
        image.save(theirs, "PNG")
        found = Image.open(ours)
        assert np.array_equal(np.asarray(found), pixels) and found.text["parameters"] == "a red circle, größer"  # type: ignore[attr-defined]
        assert len(ours.getvalue()) < 1.2 * len(theirs.getvalue()) + 200, name


def test_pictures_of_one_call_and_of_the_next_have_files_of_their_own(sd1_bundle: Path, tmp_path: Path) -> None:
    asked = [str(sd1_bundle), "a circle", "-o", str(tmp_path), "-n", "3", "--seed", "5", "--steps", "1"]
    asked += ["--backend", "cpu", "--threads", "1"]
    for call in range(1, 3):
        result = CliRunner().invoke(generate, asked)
        assert result.exit_code == 0, result.output
        assert len(list(tmp_path.glob("*.png"))) == 3 * call
    first, second = (Image.open(tmp_path / f"a-circle-{name}.png") for name in ("5", "5-2"))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert not np.array_equal(np.asarray(first), np.asarray(Image.open(tmp_path / "a-circle-6.png")))
