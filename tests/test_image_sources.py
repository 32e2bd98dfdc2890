"""Pictures and masks that come in are those of diffusers' preprocessing, or refused in one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.images.read import MAX_PIXELS, decode, read_mask, read_pictures, rounded_size
from tests.refused import about

FACTOR = 8


def photo(width: int = 48, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def theirs(image: Image.Image, size: tuple[int, int] | None = None) -> Array:
    width, height = size or (None, None)
    tensor = VaeImageProcessor(vae_scale_factor=FACTOR).preprocess(image, height=height, width=width)
    return np.asarray(tensor.numpy().transpose(0, 2, 3, 1))


sides = st.integers(FACTOR, 70)


@settings(max_examples=40)
@given(sides, sides, st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_pixels_are_those_of_diffusers_to_the_bit(width: int, height: int, cells: tuple[int, int] | None) -> None:
    image = photo(width, height)
    size = None if cells is None else (cells[0] * FACTOR, cells[1] * FACTOR)
    found = read_pictures(image, factor=FACTOR, size=size)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, theirs(image, size))


@settings(max_examples=40)
@given(sides, sides, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["L", "RGB", "1", "P"]))
def test_masks_are_those_of_diffusers_to_the_bit(width: int, height: int, across: int, down: int, mode: str) -> None:
    mask, size = photo(width, height, mode), (across * FACTOR, down * FACTOR)
    processor = VaeImageProcessor(
        vae_scale_factor=FACTOR, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    expected = processor.preprocess(mask, width=size[0], height=size[1]).numpy()[:, 0]
    if not expected.any():
        return
    np.testing.assert_array_equal(read_mask(mask, size=size, picture_size=mask.size), expected)


def test_a_path_its_bytes_the_image_and_its_array_are_one_picture(tmp_path: Path) -> None:
    image = photo()
    image.save(tmp_path / "photo.png")
    expected = theirs(image)
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), encoded(image), image, np.asarray(image)):
        np.testing.assert_array_equal(read_pictures(source, factor=FACTOR), expected)


def test_floats_are_taken_as_they_are() -> None:
    values = np.random.default_rng(1).random((16, 24, 3), dtype=np.float32)
    np.testing.assert_array_equal(read_pictures(values, factor=FACTOR)[0], 2 * values - 1)
    np.testing.assert_array_equal(read_pictures(values.astype(np.float64), factor=FACTOR)[0], 2 * values - 1)


def test_several_pictures_come_at_the_size_of_the_first() -> None:
    first, second = photo(32, 24), photo(64, 64, seed=1)
    found = read_pictures([first, encoded(second)], factor=FACTOR)
    np.testing.assert_array_equal(found, np.concatenate([theirs(first), theirs(second, (32, 24))]))
    stacked = np.stack([np.asarray(first), np.asarray(photo(32, 24, seed=2))])
    assert read_pictures(stacked, factor=FACTOR).shape == (2, 24, 32, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_is_decoded_as_pillow_decodes_it(kind: str) -> None:
    data = encoded(photo(), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(read_pictures(data, factor=FACTOR)[0], expected / np.float32(255) * 2 - 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_as_its_exif_orientation_says(orientation: int) -> None:
    image = photo(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # rows and columns as the EXIF standard names them: where the stored picture's first row and column are shown
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation](np.asarray(image))
    found = read_pictures(encoded(image, exif=exif.tobytes()), factor=FACTOR)[0]
    np.testing.assert_array_equal(found, turned / np.float32(255) * 2 - 1)


def test_transparency_becomes_white() -> None:
    colours = np.full((16, 16, 4), (200, 100, 0, 255), dtype=np.uint8)
    colours[:8, :, 3] = 0
    colours[8:, :8, 3] = 128
    found = (read_pictures(encoded(Image.fromarray(colours)), factor=FACTOR)[0] + 1) * 127.5
    np.testing.assert_allclose(found[0, 0], (255, 255, 255), atol=0.01)
    np.testing.assert_allclose(found[15, 15], (200, 100, 0), atol=0.01)
    np.testing.assert_allclose(found[15, 0], (227.4, 177.2, 127), atol=1)
    palette = Image.fromarray(colours[..., :3]).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    np.testing.assert_allclose(read_pictures(palette, factor=FACTOR), 1)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK", "YCbCr", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = photo().convert(mode)
    found = read_pictures(image, factor=FACTOR)
    np.testing.assert_array_equal(found, theirs(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = (np.arange(256, dtype=np.uint32) * 257).reshape(16, 16)
    expected = read_pictures((values // 257).astype(np.uint8), factor=FACTOR)
    wide = Image.fromarray(values.astype(np.uint16))
    tiff = Image.fromarray(values.astype(np.uint16).astype(">u2"))
    for source in (wide, encoded(wide), encoded(tiff, "TIFF"), Image.fromarray(values.astype(np.int32))):
        np.testing.assert_array_equal(read_pictures(source, factor=FACTOR), expected)
    floats = Image.fromarray((values / 65535).astype(np.float32))
    np.testing.assert_array_equal(read_pictures(floats, factor=FACTOR), expected)


def test_a_mask_may_be_any_source(tmp_path: Path) -> None:
    cut = np.zeros((16, 24), dtype=bool)
    cut[4:9, 3:20] = True
    image = Image.fromarray(cut.astype(np.uint8) * np.uint8(255))
    image.save(tmp_path / "mask.png")
    sources: list[Any] = [cut, image, tmp_path / "mask.png", encoded(image), cut.astype(np.float32), cut[..., None]]
    sources += [np.asarray(image), image.convert("RGBA"), image.convert("1")]
    for source in sources:
        found = read_mask(source, size=(24, 16), picture_size=(24, 16))
        np.testing.assert_array_equal(found, cut[None].astype(np.float32))


def test_half_grey_is_repainted() -> None:
    for value, expected in ((127, 0), (128, 1)):
        grey = np.full((8, 8), value, dtype=np.uint8)
        grey[0, 0] = 255
        assert read_mask(grey, size=(8, 8), picture_size=(8, 8))[0, 4, 4] == expected


# --- refusals ---


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds nothing: what is decoded fails, what only reads its header does not."""
    small = encoded(Image.new("L", (1, 1)))
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    import zlib

    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


@pytest.fixture(params=[None, 1000, 10**12])
def pillows_limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int | None]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", request.param)
    yield request.param


def test_a_decompression_bomb_is_refused_from_its_header(pillows_limit: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RequestError, match=r"^image: .*(60000x60000|3600000000)"):
            read_pictures(png_header(60000, 60000), factor=FACTOR)


def test_one_pixel_over_the_limit_is_refused() -> None:
    side = int(MAX_PIXELS**0.5)
    with pytest.raises(RequestError, match=f"{side}x{side + 1}.*{MAX_PIXELS}"):
        decode(png_header(side, side + 1), name="image")
    with pytest.raises(RequestError) as caught:  # the limit itself is decoded: there is nothing
        decode(png_header(side, side), name="image")
    assert str(MAX_PIXELS) not in str(caught.value) and "PNG" not in str(caught.value)


def test_a_program_is_no_picture() -> None:
    with pytest.raises(RequestError, match=r"^image: .*\bPNG\b"):
        read_pictures(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", factor=FACTOR)


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.data())
def test_a_damaged_file_is_a_picture_or_one_sentence(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(photo(16, 16), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_pictures(broken, factor=1, size=(16, 16))
        except RequestError as error:
            assert str(error).startswith("image: ")
            assert "\n" not in str(error)
        else:
            assert found.shape == (1, 16, 16, 3)


def truncated() -> bytes:
    whole = encoded(photo(64, 64))
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    "source",
    [
        "/nowhere/at/all.png",
        "/tmp",
        "a\0b",
        b"",
        b"nothing that is a picture",
        truncated(),
        Image.new("RGB", (0, 8)),
        np.zeros((0, 8, 3), dtype=np.uint8),
        np.zeros((8, 8, 2), dtype=np.uint8),
        np.zeros(8, dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.int64),
        np.full((8, 8, 3), np.nan),
        np.full((8, 8, 3), 255.0),
        np.full((8, 8, 3), -1.0),
        np.zeros((8, 8, 4)),
        np.zeros((24, 24, 3)),
        Image.new("I", (8, 8), -5),
        Image.new("F", (8, 8), 7.0),
        7,
        [],
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(source: Any) -> None:
    with pytest.raises(RequestError, check=about("image")):
        read_pictures(source, factor=FACTOR, size=(16, 16))


def test_a_picture_smaller_than_one_latent_is_refused() -> None:
    with pytest.raises(RequestError, check=about("image")):
        rounded_size((7, 40), FACTOR)


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((8, 24), dtype=bool),
        np.zeros((16, 16), dtype=bool),
        Image.new("RGBA", (16, 16), (255, 255, 255, 9)),
        np.ones((16, 16, 3)),
        np.full((16, 16), np.nan),
        b"no mask",
    ],
)
def test_what_is_no_mask_is_refused_in_one_sentence(mask: Any) -> None:
    with pytest.raises(RequestError, check=about("mask")):
        read_mask(mask, size=(16, 16), picture_size=(16, 16))
