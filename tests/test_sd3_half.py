"""SD 3.5 medium in float16: pictures that skip layers and follow images; ControlNets that TensorRT-RTX builds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from latentrt import Pipeline
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.tensor_names import NEXT, SKIP_LAYERS, is_residual
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions, ControlNetOption
from latentrt.runtime.verify.stages import verify_stages
from tests.conftest import Controlled
from tests.rtx import compile_alone
from tests.stand_in import install
from tests.test_families import psnr
from tests.test_sd3 import SIZE
from tests.test_sd3_controlnets import ASKED, SKIPPING, following

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NEAR_DB = 30  # of float16 from float32, through a whole trajectory
WAYS: dict[str, dict[str, Any]] = {
    "layers are skipped": SKIPPING,
    "and images are followed": {**SKIPPING, "controls": following("edges", "large")},
}


@pytest.fixture(scope="module")
def half(followed: Controlled, workshop: Path) -> Path:
    """Return the bundle of `followed` in float16, with two of its ControlNets and without T5."""
    options = CheckpointOptions(
        controlnets=tuple(
            ControlNetOption(name=name, path=str(followed.networks[name])) for name in ("edges", "large")
        ),
        skip_layers=(1,),
        t5=False,
    )
    export_checkpoint(str(followed.checkpoint), workshop / "sd3-followed-fp16", precision="fp16", options=options)
    return workshop / "sd3-followed-fp16"


def test_every_network_holds_in_float16(half: Path) -> None:
    """The switch of a row, its timesteps and its scales stay float32: they are no part of what is narrowed."""
    components = Bundle.open(half).manifest.components
    assert all(one.error is not None and one.error < 1e-2 for one in components.values())
    takes = {tensor.name: tensor.dtype for tensor in components["transformer"].inputs}
    assert takes[SKIP_LAYERS] == takes["timestep"] == "float32" and takes["sample"] == "float16"
    assert {dtype for name, dtype in takes.items() if is_residual(name)} == {"float16"}


def test_pictures_are_nearly_those_of_float32(followed: Controlled, half: Path, tmp_path: Path) -> None:
    """On the CPU, which computes in float32, and on the stand-in of a device, which computes in float16."""
    with Pipeline.load(followed.bundle, "cpu", threads=1) as pipe:
        expected = {name: pipe(**ASKED, t5=False, **way).pixels for name, way in WAYS.items()}
        assert psnr(expected["layers are skipped"], pipe(**ASKED, t5=False).pixels) < NEAR_DB
    with Pipeline.load(half, "cpu", threads=1) as pipe:
        for name, way in WAYS.items():
            assert psnr(pipe(**ASKED, **way).pixels, expected[name]) >= NEAR_DB, name
    root = shutil.copytree(half, tmp_path / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, tensorrt="11.4.0.106")
        build_engines(Bundle.open(root), "tensorrt", options=BuildOptions(sizes=(SIZE,)))
        with Pipeline.load(root, "tensorrt") as compiled:
            for name, way in WAYS.items():
                assert psnr(compiled(**ASKED, **way).pixels, expected[name]) >= NEAR_DB, name
        rows = list(verify_stages(Bundle.open(root), backend="tensorrt"))
    assert rows and all(row.ok for row in rows), [row.message for row in rows]


@pytest.mark.parametrize("name", ["controlnet_edges", "controlnet_large", "transformer"])
def test_tensorrt_rtx_compiles_it_from_the_state(half: Path, tmp_path: Path, name: str) -> None:
    """Fused with what surrounds it in a stage, for every number of model rows."""
    file, spec = compile_alone(half, name, tmp_path, size=SIZE)
    assert any(is_residual(tensor.name.removeprefix(NEXT)) for tensor in (*spec.inputs, *spec.outputs))
    assert [profile["rows"] for profile in spec.profiles] == [1, 2, 3]
    assert file.stat().st_size > Bundle.open(half).manifest.components[name].weights_bytes
