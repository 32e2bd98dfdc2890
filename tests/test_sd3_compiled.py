"""SD 3.5 in fp16, and its transformer, T5 and decoder as TensorRT-RTX compiles them on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.tensor_names import SKIP_LAYERS
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.golden import TOLERANCES
from latentrt.export.options import CheckpointOptions
from tests.conftest import Make
from tests.rtx import compile_alone

LAYERS = (0, 1)
SIDE = 64


@pytest.fixture(scope="module")
def half(made: Make, workshop: Path) -> Path:
    """The kind of 3.5 medium with T5 and with blocks that may be skipped, in fp16."""
    checkpoint, _ = made("sd3", "dual t5")
    bundle = workshop / "sd3-dual-t5-fp16"
    export_checkpoint(str(checkpoint), bundle, precision="fp16", options=CheckpointOptions(skip_layers=LAYERS))
    return bundle


def test_all_of_it_fits_float16(half: Path) -> None:
    manifest = Bundle.open(half).manifest
    for name, component in manifest.components.items():
        assert component.error is not None and component.error < TOLERANCES["fp16"], name
        assert component.float32_layers == (), name


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"])
def test_tensorrt_rtx_compiles_it(half: Path, tmp_path: Path, name: str) -> None:
    file, _ = compile_alone(half, name, tmp_path, size=(SIDE, SIDE))
    weights = Bundle.open(half).manifest.components[name].weights_bytes
    assert file.stat().st_size > weights


def test_tensorrt_rtx_compiles_the_stage_with_rows_that_skip_blocks(half: Path, tmp_path: Path) -> None:
    file, spec = compile_alone(half, "transformer", tmp_path, size=(SIDE, SIDE))
    assert SKIP_LAYERS in {tensor.name for tensor in spec.inputs}
    assert [profile["rows"] for profile in spec.profiles] == [1, 2, 3]
    assert {profile["tokens"] for profile in spec.profiles} == {77 + 256}
    assert file.stat().st_size > Bundle.open(half).manifest.components["transformer"].weights_bytes


def test_tensorrt_rtx_compiles_one_that_skips_nothing(made: Make, tmp_path: Path) -> None:
    _, bundle = made("sd3", "dual t5")
    file, spec = compile_alone(bundle, "transformer", tmp_path, size=(SIDE, SIDE))
    assert SKIP_LAYERS not in {tensor.name for tensor in spec.inputs}
    assert file.stat().st_size > Bundle.open(bundle).manifest.components["transformer"].weights_bytes
