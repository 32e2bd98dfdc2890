"""LoRAs against diffusers and PEFT themselves, in an environment of their own: PEFT is no dependency of ours.

Not compared, because diffusers 0.42 changes nothing there or stops: alphas that differ between modules in kohya's and
diffusers' own files, and original names of the UNet with SD 1.x. tests/test_lora.py has the formula for those.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.lora_files import Factors, kohya, make_factors, peft, save, save_with_adapter_metadata
from tests.test_lora import CLOSE, fused, with_loras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ENVIRONMENT = Path(__file__).parent.parent / ".cache" / "peft-venv"
PEER = Path(__file__).with_name("lora_peer.py")
REQUIREMENTS = ("peft==0.21.2", "psutil", "pyyaml")  # everything else that it needs is there already

Make = Callable[[Path, list[Factors]], Path]
FILES: dict[str, Make] = {
    "kohya": lambda path, rows: save(path, kohya([dataclasses.replace(row, alpha=2.0) for row in rows])),
    "peft": lambda path, rows: save(path, peft(rows)),
    "metadata": lambda path, rows: save_with_adapter_metadata(path, [row for row in rows if row.part == "unet"]),
}


@pytest.fixture(scope="module")
def peer() -> Path:
    """The Python of an environment that sees this one's packages, and PEFT."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "complete"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
        (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *REQUIREMENTS], check=True)
        done.touch()
    return python


@pytest.mark.parametrize("names", [("kohya",), ("peft",), ("metadata",), ("kohya", "peft")], ids="+".join)
def test_fused_weights_are_those_of_diffusers(
    peer: Path, sd1_checkpoint: Path, names: tuple[str, ...], tmp_path: Path
) -> None:
    loras = []
    for number, name in enumerate(names):
        rows = make_factors(sd1_checkpoint, seed=20 + number)
        loras.append((FILES[name](tmp_path / f"{name}.safetensors", rows), 0.7 - number))
    arguments = [str(value) for lora in loras for value in lora]
    target = tmp_path / "weights.safetensors"
    subprocess.run([str(peer), str(PEER), str(sd1_checkpoint), str(target), *arguments], check=True)
    expected = {key.replace(":text_model.", ":"): array for key, array in load_file(target).items()}
    checkpoint = with_loras(sd1_checkpoint, *loras)
    for part in ("unet",) if names == ("metadata",) else ("unet", "text_encoder"):
        for key, array in fused(checkpoint, part, tmp_path / part).items():
            np.testing.assert_allclose(array, expected[f"{part}:{key.removeprefix('text_model.')}"], atol=CLOSE)
