"""Large pictures in tiles: the cut and the blend as laws, diffusers' tiled VAE and the whole picture as oracles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.compare import to_pixels
from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.export.demo.training.train import CHECKPOINT
from latentrt.runtime.draw.decode import on_workspace
from latentrt.runtime.images.tiling import LEAST_CELLS, Tiling, cut, decode_tiles, encode_tiles, overlap, plan_tiles
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.sampling.noise import TorchCpuNoise
from tests.refused import about
from tests.stand_in import install
from tests.studio import DRAWN
from tests.test_pipeline_images import photo

SUMS = 1e-5  # float32 sums in another order
SEAM = 1.5  # times the change from line to line elsewhere; 1.0 to 1.1 was measured, and 9.6 without overlap
CALL: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "sampler": "euler", "guidance": 2.0, "seed": 5}
SIDES = st.integers(1, 90)
TILES = st.integers(LEAST_CELLS, 40)


# --- the cut and the blend ---


@given(SIDES, TILES)
def test_tiles_cover_a_side_and_overlap_as_promised(length: int, tile: int) -> None:
    side = cut(length, tile)
    assert side.starts[0] == 0 and side.starts[-1] + side.tile == length
    steps = np.diff(side.starts)
    assert side.tile == min(tile, length)
    assert all(0 < step <= side.tile - overlap(side.tile) for step in steps)


@given(SIDES, TILES)
def test_no_fewer_tiles_would_overlap_enough(length: int, tile: int) -> None:
    side = cut(length, tile)
    fewer = len(side.starts) - 1
    assert fewer == 0 or side.tile + (fewer - 1) * (side.tile - overlap(side.tile)) < length


@given(SIDES, TILES, st.integers(1, 8))
def test_the_weights_of_tiles_are_one_together_and_none_is_negative(length: int, tile: int, scale: int) -> None:
    side, total = cut(length, tile), np.zeros(length * scale)
    for start, weights in zip(side.starts, side.weights(scale), strict=True):
        assert weights.min() >= 0
        total[start * scale :][: len(weights)] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(SIDES, SIDES, TILES, st.sampled_from([1, 4, 8]))
def test_tiles_of_a_picture_make_the_picture(height: int, width: int, tile: int, factor: int) -> None:
    tiling = Tiling(rows=cut(height, tile), columns=cut(width, tile))
    cells = np.random.default_rng(height).random((2, 3, height, width), dtype=np.float32)
    enlarged = np.kron(cells, np.ones((1, 1, factor, factor), dtype=np.float32)).transpose(0, 2, 3, 1)
    parts = (np.kron(part, np.ones((1, 1, factor, factor))).transpose(0, 2, 3, 1) for part in tiling.parts(cells))
    np.testing.assert_allclose(tiling.blend(parts, scale=factor), enlarged, atol=SUMS)


def test_a_picture_that_fits_into_a_tile_is_not_cut() -> None:
    assert plan_tiles((512, 512), None, factor=8) is None
    assert plan_tiles((512, 512), 512, factor=8) is None
    assert plan_tiles((512, 256), 1024, factor=8) is None
    tiling = plan_tiles((1024, 512), 512, factor=8)
    assert tiling is not None and (tiling.rows.starts, tiling.columns.starts) == ((0,), (0, 32, 64))


@pytest.mark.parametrize("tile", [0, -8, 24, 500, 512.0, True])
def test_a_tile_that_cannot_be_is_refused(tile: Any) -> None:
    with pytest.raises(RequestError, check=about("tile")):
        plan_tiles((512, 512), tile, factor=8)


# --- diffusers' tiled VAE ---

FACTOR = 4  # of the tiny checkpoint of SD 1.x: three levels
EDGE = 32
CELLS = EDGE // FACTOR
STRIDE = CELLS - overlap(CELLS)


@pytest.fixture(scope="module")
def peer(sd1_checkpoint: Path) -> Any:
    vae = diffusers.AutoencoderKL.from_pretrained(sd1_checkpoint, subfolder="vae")
    vae.enable_tiling()
    # diffusers cuts to the range of pixels after the blend, here each tile is cut: random weights go far beyond it
    vae.decoder.register_forward_hook(lambda module, given, output: output.clamp(-1, 1))
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor) == (EDGE, CELLS, 0.25)
    return vae


def decoded_by(bundle: Path, latents: Array, tiling: Tiling | None) -> Array:
    """Decode on a workspace of the CPU: in tiles, or where there is no grid at once."""
    opened, space = open_engines(Bundle.open(bundle), "cpu", threads=1), Bundle.open(bundle).manifest.latents
    cells = latents.shape[2:] if tiling is None else (tiling.rows.tile, tiling.columns.tile)
    height, width = (side * space.factor for side in cells)
    shape = WorkspaceShape(pictures=len(latents), tokens=77, width=width, height=height)
    workspace = opened.workspace(space, shape, state_rows=1, **DRAWN)
    if tiling is not None:
        pixels = decode_tiles(latents, on_workspace(workspace, "vae_decoder"), tiling, factor=space.factor)
    else:
        workspace.write("state", latents[:, None])
        workspace.run("vae_decoder")
        pixels = workspace.read("pixels")
    opened.close()
    return pixels


@pytest.mark.parametrize("axis", [2, 3])
def test_one_cut_side_is_decoded_as_diffusers_decodes_it(peer: Any, sd1_bundle: Path, axis: int) -> None:
    """Up to where diffusers adds a last tile, on either side, that lies in the tile before it, and blends that in."""
    sides = [CELLS, CELLS]
    sides[axis - 2] = CELLS + 2 * STRIDE
    latents = TorchCpuNoise(0).normal((2, 4, *sides))
    with torch.no_grad():
        expected = to_pixels(peer.tiled_decode(torch.from_numpy(latents)).sample.numpy())
    scaled = latents * np.float32(Bundle.open(sd1_bundle).manifest.latents.scaling_factor)
    tiling = Tiling(rows=cut(sides[0], CELLS), columns=cut(sides[1], CELLS))
    found = decoded_by(sd1_bundle, scaled, tiling)
    down, across = (starts * STRIDE * FACTOR for starts in map(len, (tiling.rows.starts, tiling.columns.starts)))
    assert found.shape == expected.shape and tiling.tiles == 3
    assert np.abs(found.astype(int) - expected)[:, :down, :across].max() <= 1  # each tile is rounded, then the blend


def test_both_cut_sides_are_decoded_as_diffusers_decodes_them_but_for_the_corners(peer: Any, sd1_bundle: Path) -> None:
    """Where four tiles meet diffusers blends the tile above with what it had blended into it; here all four weigh."""
    side = CELLS + STRIDE
    latents = TorchCpuNoise(1).normal((1, 4, side, side))
    with torch.no_grad():
        expected = to_pixels(peer.tiled_decode(torch.from_numpy(latents)).sample.numpy())
    scaled = latents * np.float32(Bundle.open(sd1_bundle).manifest.latents.scaling_factor)
    found = decoded_by(sd1_bundle, scaled, Tiling(rows=cut(side, CELLS), columns=cut(side, CELLS)))
    same, meeting = slice(2 * STRIDE * FACTOR), slice(STRIDE * FACTOR, CELLS * FACTOR)
    difference = np.abs(found.astype(int) - expected)[:, same, same]
    difference[:, meeting, meeting] = 0
    assert difference.max() <= 1


@pytest.mark.parametrize("axis", [2, 3])
def test_an_image_is_encoded_in_tiles_as_diffusers_encodes_it(peer: Any, sd1_bundle: Path, axis: int) -> None:
    sides = [CELLS, CELLS]
    sides[axis - 2] = CELLS + 2 * STRIDE
    tiling = Tiling(rows=cut(sides[0], CELLS), columns=cut(sides[1], CELLS))
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 3, *(side * FACTOR for side in sides))).astype(np.float32)
    with torch.no_grad():
        expected = peer._tiled_encode(torch.from_numpy(pixels)).numpy()
    opened = open_engines(Bundle.open(sd1_bundle), "cpu", components=("vae_encoder",), threads=1)
    encoder = opened.engines["vae_encoder"]
    found = encode_tiles(pixels, lambda part: encoder({"sample": part})["latent_parameters"], tiling, factor=FACTOR)
    opened.close()
    down, across = (starts * STRIDE for starts in map(len, (tiling.rows.starts, tiling.columns.starts)))
    assert found.shape == expected.shape
    same = (..., slice(down), slice(across))
    np.testing.assert_allclose(found[same], expected[same], atol=1e-3 * np.abs(expected).max())


# --- the whole picture ---


@pytest.fixture(scope="module")
def demo_latents(demo_bundle: Path) -> Array:
    """Latents of a picture of 256x256 pixels, twice the size that the demo's VAE was made for."""
    seen: list[Array] = []
    with Pipeline.load(demo_bundle, "cpu", threads=1) as pipe:
        call: dict[str, Any] = {"prompt": "a red circle on a blue background", "size": (256, 256), "seed": 1}
        pipe(**call, steps=6, on_step=lambda step: seen.append(step.latents))
    return seen[-1]


def test_no_seam_shows_where_tiles_of_the_demo_meet(demo_bundle: Path, demo_latents: Array) -> None:
    """The difference to the whole picture changes no faster across a tile's border than elsewhere."""
    factor = Bundle.open(demo_bundle).manifest.latents.factor
    tiling = plan_tiles((256, 256), 128, factor=factor)
    assert tiling is not None and tiling.columns == tiling.rows
    whole, tiled = decoded_by(demo_bundle, demo_latents, None), decoded_by(demo_bundle, demo_latents, tiling)
    borders = [start * factor for start in tiling.columns.starts[1:]]
    borders += [(start + tiling.columns.tile) * factor for start in tiling.columns.starts[:-1]]
    assert seam(tiled, whole, borders) <= SEAM
    assert seam(butted(demo_bundle, demo_latents, factor), whole, [128]) > 4 * SEAM  # the measure sees seams


def test_tiles_are_as_near_to_the_whole_picture_as_diffusers_tiles(demo_bundle: Path, demo_latents: Array) -> None:
    """A tile has its own statistics, so neither is the whole picture: the edges of things differ, nothing else."""
    space = Bundle.open(demo_bundle).manifest.latents
    vae = diffusers.AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae")
    vae.enable_tiling()
    with torch.no_grad():
        theirs = to_pixels(vae.decode(torch.from_numpy(demo_latents) / space.scaling_factor).sample.numpy())
    whole = decoded_by(demo_bundle, demo_latents, None)
    ours = decoded_by(demo_bundle, demo_latents, plan_tiles((256, 256), 128, factor=space.factor))
    own, other = (np.abs(pixels.astype(int) - whole) for pixels in (ours, theirs))
    assert own.mean() <= other.mean() and own.mean() <= 1
    assert own.max() <= max(40, 1.1 * other.max())


def butted(bundle: Path, latents: Array, factor: int) -> Array:
    """Return tiles of 128 pixels laid side by side, without overlap."""
    cells = 128 // factor
    rows = [
        [decoded_by(bundle, latents[:, :, top : top + cells, left : left + cells].copy(), None) for left in (0, cells)]
        for top in (0, cells)
    ]
    return np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1)


def seam(found: Array, whole: Array, borders: list[int]) -> float:
    """Return the steepest change of the difference across a border, over that of most other lines."""
    difference = found.astype(np.float64) - whole
    ratios = []
    for axis in (1, 2):
        changes = np.abs(np.diff(difference, axis=axis)).mean(axis=(0, 3 - axis, 3))
        lines = [border - 1 for border in borders]
        elsewhere = np.delete(changes, lines)
        ratios.append(changes[lines].max() / np.quantile(elsewhere, 0.95))
    return float(max(ratios))


# --- through the public class ---


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def test_a_tile_changes_the_decoding_alone(pipe: Pipeline) -> None:
    latents: list[Array] = []
    whole = pipe(**CALL, size=(64, 48), on_step=lambda step: latents.append(step.latents))
    tiled = pipe(**CALL, size=(64, 48), tile=32, on_step=lambda step: latents.append(step.latents))
    assert np.array_equal(latents[1], latents[3]) and whole.pixels.shape == tiled.pixels.shape
    expected = decoded_by(pipe.bundle.root, latents[1], plan_tiles((64, 48), 32, factor=FACTOR))
    assert np.array_equal(tiled.pixels, expected)
    assert tiled.settings[0].further == {"tile": 32} and tiled.seconds["decode"] > 0
    assert np.array_equal(pipe(**CALL, size=(64, 48), tile=64).pixels, whole.pixels)


def test_a_large_image_is_read_in_tiles_too(pipe: Pipeline) -> None:
    shapes: list[tuple[int, ...]] = []
    pipe(**CALL, image=photo(64, 32), strength=0.5)
    encoder = pipe.loaded.opened.engines["vae_encoder"]

    class Watching:
        spec = encoder.spec

        def __call__(self, inputs: Any) -> Any:
            shapes.append(inputs["sample"].shape)
            return encoder(inputs)

    pipe.loaded.opened.engines["vae_encoder"] = Watching()  # type: ignore[assignment]
    found = pipe(**CALL, image=photo(64, 32), strength=0.5, tile=32)
    pipe.loaded.opened.engines["vae_encoder"] = encoder
    assert found.pixels.shape == (1, 32, 64, 3) and shapes == [(1, 3, 32, 32)] * 3


def test_compiled_engines_draw_in_tiles_of_a_size_that_they_have(sd1_bundle: Path, tmp_path: Path) -> None:
    root = shutil.copytree(sd1_bundle, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        device = install(patch, tensorrt="11.4.0.106")
        options = BuildOptions(sizes=((64, 48), (32, 32)), batches=(1, 2), references=False)
        build_engines(Bundle.open(root), "tensorrt", options=options)
        with Pipeline.load(root, "tensorrt") as compiled, Pipeline.load(root, "cpu", threads=1) as plain:
            asked: dict[str, Any] = {**CALL, "n": 2, "size": (64, 48)}
            found, expected = compiled(**asked, tile=32), plain(**asked, tile=32)
            assert np.abs(found.pixels.astype(int) - expected.pixels.astype(int)).max() <= 2
            with pytest.raises(EngineError, match=r"`latentrt build .* --size 40x40 --batch 2 --tokens 77`"):
                compiled(**asked, tile=40)
        assert device.leftovers() == {}
