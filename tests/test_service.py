"""The README's path for a service, walked: the wheel with `[cpu]` and no torch, in environments of their own.

Each has another ONNX Runtime than the one that exported the bundle. The environments are kept below .cache/, made again
when pyproject.toml changes; the wheel is built and installed every time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.bundle.staging import claimed
from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
OURS = importlib.metadata.version("onnxruntime")
LEAST_DB = 50.0  # other kernels may sum in another order
SLOW = pytest.mark.slow(reason="makes one more environment")
PROMPT = ("a red circle", "--steps", "3", "--seed", "5", "--size", "32x32")


@dataclass(frozen=True)
class Service:
    """An environment that has the wheel, and the user's cache of the machine that it is on."""

    bin: Path
    cache: Path

    def run(self, *arguments: object, code: int = 0) -> str:
        """Run latentrt; return what it prints, or its complaint where it is to end with another code."""
        done = subprocess.run(
            [str(self.bin / "latentrt"), *map(str, arguments)],
            capture_output=True,
            text=True,
            env=outer() | {"LATENTRT_CACHE": str(self.cache)},
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))


def interpreter(version: str) -> str:
    """Return a Python of a version: this one, one on the PATH that answers (pyenv's shims may not), or pyenv's."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for path in (shutil.which(name), *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/{name}")))):
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip(f"there is no {name} on the PATH and none of pyenv's")


def environment(wheel: Path, version: str, runtime: str) -> Path:
    """Return the programs of an environment that has what `[cpu]` brings, and the wheel as it is now."""
    name, what = f"{version}-{runtime.strip('=!')}", (f"{wheel}[cpu]", f"onnxruntime{runtime}")
    return kept_environment(name, version, what, latentrt=(str(wheel),))


def kept_environment(name: str, version: str, what: Sequence[str], *, latentrt: Sequence[str]) -> Path:
    """Return the programs of an environment, made if there is none.

    what: is installed when it is made; latentrt: every time, as pip takes it
    """
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:8]
    root = ROOT / ".cache" / "environments" / f"{name}-{digest}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with claimed(root):
        if not (root / ".whole").is_file():
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run([interpreter(version), "-m", "venv", str(root)], check=True)
            _pip(root / "bin", *what)
            (root / ".whole").touch()
        _pip(root / "bin", "--force-reinstall", "--no-deps", *latentrt)
    return root / "bin"


def _pip(programs: Path, *what: str) -> None:
    subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", *what], check=True)


def outer() -> dict[str, str]:
    """Return the variables of this process that are no Python's own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def psnr(found: Array, expected: Array) -> float:
    error = np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def installed(programs: Path) -> dict[str, str]:
    listed = subprocess.run(
        [str(programs / "python"), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    return {row["name"].lower(): row["version"] for row in json.loads(listed.stdout)}


@pytest.mark.parametrize(
    ("version", "runtime"),
    [
        ("3.11", f"!={OURS}"),
        pytest.param("3.11", "==1.23.2", marks=SLOW),
        pytest.param("3.12", f"!={OURS}", marks=SLOW),
        pytest.param("3.13", f"!={OURS}", marks=SLOW),
    ],
    ids=["3.11", "3.11 with the oldest ONNX Runtime", "3.12", "3.13"],
)
def test_a_service_draws_verifies_and_measures_with_one_install_and_one_command(
    version: str, runtime: str, wheel: Path, sd1_bundle: Path, tmp_path: Path
) -> None:
    with Pipeline.load(sd1_bundle, "cpu") as pipe:
        expected = pipe(PROMPT[0], steps=3, seed=5, size=(32, 32)).pixels[0]
    service = Service(bin=environment(wheel, version, runtime), cache=tmp_path / "cache")
    packages = installed(service.bin)
    assert packages["onnxruntime"] != OURS
    assert not {"torch", "diffusers", "transformers", "onnxscript"} & set(packages)

    bundle = shutil.copytree(sd1_bundle, tmp_path / "bundle")
    assert f"latentrt build {bundle}" in service.run("generate", bundle, *PROMPT, code=2)
    summary = service.json("generate", read_only(bundle), *PROMPT, "--build", "-o", tmp_path / "first.png")
    assert str(service.cache) in summary["reason"]
    summary = service.json("generate", bundle, *PROMPT, "-o", tmp_path / "second.png")
    assert str(service.cache) not in summary["reason"]
    assert all(row["ok"] for row in service.json("verify", bundle))

    writable(bundle)
    shutil.rmtree(service.cache)
    assert str(bundle / "engines" / "cpu-") in service.run("build", bundle)
    service.run("generate", bundle, *PROMPT, "-o", tmp_path / "third.png")
    measured = service.run("bench", bundle, "--rounds", 1, "--cold", 1, "--steps", 2, "--json", "-")
    assert json.loads(measured)["variants"]
    for name in ("first", "second", "third"):
        assert psnr(np.asarray(Image.open(tmp_path / f"{name}.png")), expected) >= LEAST_DB


def read_only(bundle: Path) -> Path:
    """Let nobody put engines into a bundle, not even root, whom permissions do not stop: their folder is a file."""
    shutil.move(bundle / "engines", bundle.with_name("aside"))
    (bundle / "engines").touch()
    return bundle


def writable(bundle: Path) -> None:
    (bundle / "engines").unlink()
    shutil.move(bundle.with_name("aside"), bundle / "engines")
