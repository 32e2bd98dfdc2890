"""`latentrt verify` draws: each stage of a trajectory is compared with the float32 graphs, from the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from latentrt.__main__ import cli
from latentrt.engines.backends import BACKENDS, Opened, Opening
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.spec import Array, EngineView, Inputs
from latentrt.engines.verify.verify import Row, verify
from latentrt.runtime.verify.compared import error_beside
from latentrt.runtime.verify.stages import STEPS, verify_stages
from tests.conftest import Make, MakeControlled
from tests.stand_in import install

Wrong = Callable[[Inputs], bool]


class Broken(EngineView):
    """A network that is wrong where it is told to be."""

    def __init__(self, engine: object, wrong: Wrong, output: str) -> None:
        super().__init__(engine)  # type: ignore[arg-type]
        self._wrong, self._output = wrong, output

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        outputs = dict(self._engine(inputs))
        if self._wrong(inputs):
            outputs[self._output] = outputs[self._output] * np.float32(0.9)
        return outputs


@pytest.fixture
def break_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Wrong], None]:
    """Have one component compute something else on the CPU's backend: (component, output, where)."""

    def put(component: str, output: str, wrong: Wrong) -> None:
        whole = BACKENDS["cpu"].open

        def opened(opening: Opening) -> Opened:
            engines = whole(opening)
            if component in engines.engines:
                engines.engines[component] = Broken(engines.engines[component], wrong, output)
            return engines

        monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], open=opened))

    return put


def stages(rows: list[Row], component: str = "unet") -> list[Row]:
    return [row for row in rows if row.what == component and row.profile.startswith("stage")]


@pytest.mark.parametrize("name", ["sd1_bundle", "sd1_half_bundle", "demo_bundle"])
def test_every_stage_and_the_pixels_of_a_whole_bundle_agree(name: str, request: pytest.FixtureRequest) -> None:
    rows = list(verify_stages(Bundle.open(request.getfixturevalue(name)), backend="cpu"))
    assert all(row.ok for row in rows), rows
    assert len(stages(rows)) >= STEPS and rows[-1].what == "vae_decoder"
    assert len(rows) == len(stages(rows)) + 1


def test_what_golden_pairs_do_not_see_is_found_at_its_stages(sd1_bundle: Path, break_cpu: Callable[..., None]) -> None:
    """A network that is wrong at early timesteps alone: the recorded ones lie in the middle."""
    break_cpu("unet", "out_sample", lambda inputs: float(np.max(inputs["timestep"])) < 250)
    bundle = Bundle.open(sd1_bundle)
    assert all(row.ok for row in verify(bundle, backend="cpu"))
    rows = stages(list(verify_stages(bundle, backend="cpu")))
    wrong = [row.profile.split(",")[0] for row in rows if not row.ok]
    assert wrong and wrong == [f"stage {number}" for number in range(len(rows) - len(wrong) + 1, len(rows) + 1)]
    assert all(row.error is not None and 0.05 < row.error < 0.5 for row in rows if not row.ok)


def test_an_error_of_one_stage_is_not_handed_on(sd1_bundle: Path, break_cpu: Callable[..., None]) -> None:
    calls = iter(range(100))
    break_cpu("unet", "out_sample", lambda _: next(calls) == 1)
    rows = stages(list(verify_stages(Bundle.open(sd1_bundle), backend="cpu")))
    assert [number for number, row in enumerate(rows, 1) if not row.ok] == [2]


def test_an_error_in_one_of_two_guided_rows_is_found(sd1_bundle: Path, break_cpu: Callable[..., None]) -> None:
    break_cpu("unet", "out_sample", lambda inputs: len(np.asarray(inputs["sample"])) == 2)
    rows = stages(list(verify_stages(Bundle.open(sd1_bundle), backend="cpu")))
    assert {row.ok for row in rows} == {True, False}  # some stages are guided and some not


def test_a_decoder_that_is_wrong_on_a_drawings_latents_is_found(
    sd1_bundle: Path, break_cpu: Callable[..., None]
) -> None:
    break_cpu("vae_decoder", "squares", lambda inputs: True)
    break_cpu("vae_decoder", "pixels", lambda inputs: True)
    rows = list(verify_stages(Bundle.open(sd1_bundle), backend="cpu"))
    assert [row.what for row in rows if not row.ok] == ["vae_decoder"]


@pytest.mark.parametrize("kind", ["controlled", "refined", "inpainting"])
def test_what_else_a_bundle_draws_with_is_drawn_with(kind: str, made: Make, controlled: MakeControlled) -> None:
    bundle = Bundle.open(controlled("sd1", "").bundle if kind == "controlled" else made(*KINDS[kind])[1])
    rows = list(verify_stages(bundle, backend="cpu"))
    assert all(row.ok for row in rows), rows
    assert {row.what for row in rows} == {*bundle.manifest.denoisers, "vae_decoder"}


KINDS = {"refined": ("sdxl", "refined"), "inpainting": ("sd1", "inpainting")}


def test_a_controlnet_that_is_wrong_shows_in_the_stages(
    controlled: MakeControlled, break_cpu: Callable[..., None]
) -> None:
    bundle = Bundle.open(controlled("sd1", "").bundle)
    component = bundle.manifest.of_role("controlnet")[0]
    break_cpu(component, "next_mid_residual", lambda _: True)
    rows = list(verify_stages(bundle, backend="cpu"))
    assert any(not row.ok for row in stages(rows))


def test_engines_of_fixed_sizes_draw_at_their_smallest(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in for TensorRT: the fused stage, and the text encoder that writes where pictures are drawn."""
    install(monkeypatch, tensorrt="11.4.0.106")
    bundle = Bundle.open(shutil.copytree(sd1_bundle, tmp_path / "bundle"))
    build_engines(bundle, "tensorrt", options=BuildOptions(sizes=((64, 32), (32, 32)), batches=(2,), references=False))
    rows = list(verify_stages(bundle, backend="tensorrt"))
    assert all(row.ok for row in rows), rows
    assert {row.profile.split(", ")[1] for row in rows} == {"32x32"}
    assert {row.what for row in rows} == {"text_encoder", "unet", "vae_decoder"}


def test_the_command_draws_unless_told_not_to(sd1_bundle: Path, break_cpu: Callable[..., None]) -> None:
    break_cpu("unet", "out_sample", lambda inputs: float(np.max(inputs["timestep"])) < 250)
    drawn = CliRunner().invoke(cli, ["verify", str(sd1_bundle), "--json"])
    assert drawn.exit_code == 2 and any(row["profile"].startswith("stage") for row in json.loads(drawn.stdout))
    assert CliRunner().invoke(cli, ["verify", str(sd1_bundle), "--no-stages"]).exit_code == 0


def test_without_onnx_the_rest_is_verified_and_that_is_said(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (row,) = verify_stages(Bundle.open(sd1_bundle), backend="cpu")
    assert row.ok and row.error is None and row.what == "stages"


def test_an_error_is_a_part_of_what_the_network_added() -> None:
    """Late in a drawing the latents are large and what the network adds is small: there an error would hide."""
    rest = np.full((1, 2, 4, 4, 4), 100.0, dtype=np.float32)
    expected = rest + np.float32(0.5)
    assert error_beside(expected + np.float32(0.05), expected, rest) == pytest.approx(0.1, rel=1e-3)
    assert error_beside(np.full_like(expected, np.nan), expected, rest) == float("inf")
