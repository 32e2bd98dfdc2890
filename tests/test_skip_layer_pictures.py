"""Skip-layer guidance of whole bundles: diffusers' pictures, among others, in animations, and on the fused stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Batcher, BatcherOptions, KeyFrame, Pipeline, Request
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.engines.errors import BundleError, CheckpointError, RequestError
from latentrt.engines.tensor_names import SKIP_LAYERS
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.configs.denoisers import KINDS
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions
from latentrt.runtime.batching.observer import Event, StageDone
from latentrt.runtime.verify.stages import verify_stages
from tests.conftest import Make
from tests.refused import about
from tests.sd3 import diffusers_sd3
from tests.test_families import LEAST, psnr
from tests.test_family_stages import LEVELS, engines_of_a_gpu
from tests.test_sd3 import SIZE, drawn

LAYERS = (0, 1)
ASKED: dict[str, Any] = {"prompt": "a red circle on blue", "seed": 3, "steps": 10, "size": SIZE, "guidance": 4.0}
SKIPPING: dict[str, Any] = {"skip_layer_guidance": 2.8, "skip_layer_interval": (0.01, 0.5)}


@pytest.fixture(scope="module")
def bundles(made: Make, workshop: Path) -> dict[bool, Path]:
    """Return a bundle of 3.5 medium's kind without layers to skip, and one with; tiny ones have none by default."""
    checkpoint, plain = made("sd3", "dual")
    skipping = workshop / "sd3-dual-skipping"
    export_checkpoint(str(checkpoint), skipping, precision="fp32", options=CheckpointOptions(skip_layers=LAYERS))
    return {False: plain, True: skipping}


@pytest.fixture(scope="module")
def pipe(bundles: dict[bool, Path]) -> Iterator[Pipeline]:
    with Pipeline.load(bundles[True], "cpu", threads=1) as opened:
        yield opened


@pytest.mark.parametrize("interval", [(0.01, 0.2), (0.01, 0.5), (0.3, 1.0)])
def test_pictures_are_those_of_diffusers(made: Make, pipe: Pipeline, interval: tuple[float, float]) -> None:
    theirs = diffusers_sd3(made("sd3", "dual")[0])
    call = {"width": SIZE[0], "height": SIZE[1], "guidance_scale": 4.0, "num_inference_steps": 10, "output_type": "np"}
    skips = {
        "skip_guidance_layers": list(LAYERS),
        "skip_layer_guidance_scale": 2.8,
        "skip_layer_guidance_start": interval[0],
        "skip_layer_guidance_stop": interval[1],
    }
    expected = np.asarray((drawn(theirs, **call, **skips) * 255).round())
    found = pipe(**ASKED, skip_layer_guidance=2.8, skip_layer_interval=interval).pixels
    assert psnr(found, expected) >= LEAST
    assert psnr(pipe(**ASKED).pixels, expected) < LEAST  # the skipped layers did say something


def test_without_it_a_bundle_draws_as_one_that_cannot_skip(bundles: dict[bool, Path], pipe: Pipeline) -> None:
    with Pipeline.load(bundles[False], "cpu", threads=1) as plain:
        found, expected = pipe(**ASKED).pixels, plain(**ASKED).pixels
        with pytest.raises(RequestError, check=about("skip_layer_guidance")):
            plain(**ASKED, **SKIPPING)
    np.testing.assert_array_equal(found, expected)


def test_pictures_that_skip_share_stages_with_those_that_do_not(pipe: Pipeline) -> None:
    wishes: list[dict[str, Any]] = [
        {"seed": 1, **SKIPPING},
        {"seed": 2, "steps": 7},
        {"seed": 3, "guidance": 1.0},
        {"seed": 4, "skip_layer_guidance": 1.0, "skip_layer_interval": (0.5, 0.9), "guidance_rescale": 0.7},
        {"seed": 5, **SKIPPING, "guidance_interval": (0.2, 0.8)},
    ]
    asked = [Request(**{**ASKED, **wish}) for wish in wishes]
    alone = [pipe.draw(request).pixels for request in asked]
    stages: list[StageDone] = []

    def observe(event: Event) -> None:
        if isinstance(event, StageDone):
            stages.append(event)

    with Batcher(pipe, BatcherOptions(slots=len(asked)), observer=observe) as batcher:
        shared = [future.result(300).pixels for future in [batcher.submit(one)[0] for one in asked]]
    for one, other in zip(shared, alone, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= LEVELS
    assert {stage.capacity for stage in stages} == {3 * len(asked)}
    assert all(stage.padded == 0 for stage in stages) and max(stage.used for stage in stages) > 2 * len(asked)


def test_key_frames_of_an_animation_are_guided_away_too(pipe: Pipeline) -> None:
    keys = [KeyFrame(prompt="a red circle", seed=1), KeyFrame(prompt="blue", seed=2)]
    options: dict[str, Any] = {name: value for name, value in ASKED.items() if name not in ("prompt", "seed")}
    frames = [result.pixels for result in pipe.animate(keys, frames=3, batch=3, **options, **SKIPPING)]
    ends = np.concatenate(frames)[[0, -1]]
    for key, frame in zip(keys, ends, strict=True):
        alone = pipe(key.prompt, seed=key.seed, **options, **SKIPPING).pixels[0]
        assert np.abs(frame.astype(int) - alone.astype(int)).max() <= LEVELS


def test_the_fused_stage_draws_it_alike(bundles: dict[bool, Path], pipe: Pipeline, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundles[True], copy)
    wishes: list[dict[str, Any]] = [SKIPPING, {**SKIPPING, "guidance_rescale": 0.7, "n": 2}, {}]
    expected = [pipe(**ASKED, **wish).pixels for wish in wishes]
    with engines_of_a_gpu():
        build_engines(Bundle.open(copy), "cpu", force=True)
        with Pipeline.load(copy, "cpu", threads=1) as fused:
            found = [fused(**ASKED, **wish).pixels for wish in wishes]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= LEVELS


def test_verify_compares_the_third_row(bundles: dict[bool, Path]) -> None:
    rows = list(verify_stages(Bundle.open(bundles[True]), backend="cpu"))
    assert len(rows) > 5 and all(row.ok for row in rows)


def test_what_can_be_skipped_is_in_the_manifest(bundles: dict[bool, Path], tmp_path: Path) -> None:
    for skips, root in bundles.items():
        manifest = Bundle.open(root).manifest
        spec = manifest.denoisers[manifest.denoiser]
        names = [tensor.name for tensor in manifest.components[manifest.denoiser].inputs]
        assert spec.skip_layers == (LAYERS if skips else ()) and (SKIP_LAYERS in names) == skips
        profiles = BuildOptions(batches=(2,)).profiles(manifest)
        assert {profile.rows for profile in profiles} == ({2, 4, 6} if skips else {2, 4})
    copy = tmp_path / "bundle"
    shutil.copytree(bundles[True], copy)
    document = json.loads((copy / MANIFEST).read_text())
    document["denoisers"]["transformer"]["skip_layers"] = []
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="skip_layers"):
        Bundle.open(copy)


def test_the_published_blocks_of_medium_are_skipped_unless_others_are_named() -> None:
    """Only 3.5 medium has dual attention, in 13 of its 24 blocks; large has 38 blocks without any."""
    skipped = KINDS["transformer"].skipped
    medium = {"num_layers": 24, "dual_attention_layers": list(range(13))}
    assert skipped(medium) == (7, 8, 9)
    assert skipped({**medium, "num_layers": 4}) == ()
    assert skipped({"num_layers": 38, "dual_attention_layers": []}) == ()
    assert KINDS["unet"].skipped({}) == ()


@pytest.mark.parametrize("layers", [(3,), (-1,), (1, 1)])
def test_blocks_that_are_not_there_are_refused(made: Make, layers: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="--skip-layers"):
        open_checkpoint(str(made("sd3", "dual")[0]), options=CheckpointOptions(skip_layers=layers))


def test_a_unet_has_no_blocks_to_skip(sd1_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="--skip-layers"):
        open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(skip_layers=(1,)))
    assert open_checkpoint(str(sd1_checkpoint), options=CheckpointOptions(skip_layers=())).skip_layers == ()
