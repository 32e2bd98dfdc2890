"""Interchange with optimum, in an environment of its own: it refuses the transformers that this project uses.

The environment is made once, below .cache/, and downloads more than a gigabyte; hence slow. Another one that is there
already can be named in OPTIMUM_ENVIRONMENT.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.compare import relative_error
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs import golden
from latentrt.export.graphs import run as sessions
from latentrt.runtime.pipeline import Pipeline
from tests.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

OWN_ENVIRONMENT = Path(__file__).parent.parent / ".cache" / "optimum-venv"
PEER = Path(__file__).with_name("optimum_peer.py")
# Pinned, or pip walks back through versions for minutes.
REQUIREMENTS = (
    "transformers==4.57.6",
    "diffusers==0.39.0",
    "huggingface_hub==0.36.2",
    "optimum-onnx==0.1.0",
    "onnxruntime==1.31.1",
    "torch==2.13.0",
)
# float32 through four steps and a decoder, in two runtimes and two versions of diffusers; pictures are in 0..1.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def peer() -> Path:
    """The Python of an environment with optimum."""
    environment = Path(os.environ.get("OPTIMUM_ENVIRONMENT", OWN_ENVIRONMENT))
    python = environment / "bin" / "python"
    done = environment / "complete"
    if environment == OWN_ENVIRONMENT and not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        done.touch()
    return python


def run(peer: Path, *arguments: object) -> None:
    call(peer, PEER, *arguments)


def call(*words: object) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def diffusers_picture(sd1_checkpoint: Path) -> np.ndarray:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd1_checkpoint, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    result = pipe(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        height=32,
        width=48,
    )
    return np.asarray(result.images[0])


def test_optimum_opens_a_bundles_graphs_and_draws_diffusers_picture(
    peer: Path, sd1_bundle: Path, diffusers_picture: np.ndarray, tmp_path: Path
) -> None:
    run(peer, "draw", sd1_bundle / "onnx", tmp_path / "picture.npy")
    assert np.abs(np.load(tmp_path / "picture.npy") - diffusers_picture).max() < CLOSE


def test_what_optimum_exported_becomes_a_bundle_that_computes_the_same(
    peer: Path, sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path
) -> None:
    run(peer, "export", sd1_checkpoint, tmp_path / "onnx")
    exported = export_checkpoint(str(tmp_path / "onnx"), tmp_path / "bundle")
    theirs, ours = Bundle.open(tmp_path / "bundle"), Bundle.open(sd1_bundle)
    for name, component in theirs.manifest.components.items():
        assert component.inputs == ours.manifest.components[name].inputs
        names = {spec.name for spec in component.outputs}
        assert {spec.name for spec in ours.manifest.components[name].outputs} - names <= {"skipped_hidden_states"}
        inputs, _ = golden.load_golden(theirs.root / component.golden)
        _, outputs = golden.load_golden(ours.root / ours.manifest.components[name].golden)
        found = sessions.run_session(sessions.open_session(theirs.root / component.graph), inputs)
        for tensor in names:
            assert relative_error(found[tensor], outputs[tensor]) < CLOSE
    assert exported.manifest.family == "sd1"
    run(peer, "draw", tmp_path / "bundle" / "onnx", tmp_path / "again.npy")
    run(peer, "draw", sd1_bundle / "onnx", tmp_path / "picture.npy")
    assert np.abs(np.load(tmp_path / "again.npy") - np.load(tmp_path / "picture.npy")).max() < CLOSE


def drawn_by_diffusers(checkpoint: Path, *, xl: bool, **request: Any) -> np.ndarray:
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipe = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(checkpoint)
    images = pipe("a red circle", generator=torch.Generator("cpu").manual_seed(7), output_type="np", **request).images
    return np.asarray((images * 255).round())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_what_optimums_command_exported_draws_the_pictures_of_diffusers(
    peer: Path, family: str, tmp_path: Path
) -> None:
    checkpoint = save_tiny(tmp_path / "checkpoint", family=family)
    arguments = ("--model", checkpoint, "--task", "text-to-image", tmp_path / "onnx")
    call(peer.with_name("optimum-cli"), "export", "onnx", *arguments)
    exported = export_checkpoint(str(tmp_path / "onnx"), tmp_path / "bundle")
    assert exported.manifest.family == family
    with Pipeline.load(tmp_path / "bundle", "cpu", threads=1) as pipe:
        found = pipe("a red circle", steps=4, guidance=3.0, seed=7, size=(48, 32)).pixels
    expected = drawn_by_diffusers(
        checkpoint, xl=family == "sdxl", num_inference_steps=4, guidance_scale=3.0, width=48, height=32
    )
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float64) - expected).max() <= 1  # a number that is near a half may be rounded away
