"""An export holds a part of the largest network's weights at a time, whatever its size and precision.

    pytest -m slow -s tests/test_memory.py

prints what full-size models take: seconds, peak memory, a step on ONNX Runtime.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import _job
from latentrt.export.work.finished import MARKERS
from latentrt.export.work.worker import start_worker

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import full_size_export
import random_checkpoint

# A UNet of few layers with many weights, 400 MB in float16: quick to trace, and large beside the libraries.
WIDE = random_checkpoint.Shape(
    unet=(640, 1280), unet_heads=8, vae=(16, 16), side=16, width=64, layers=1, heads=1, options={"layers_per_block": 1}
)


@pytest.mark.parametrize(
    ("stored", "precision"),
    [("half", "fp16"), pytest.param("whole", "fp16", marks=pytest.mark.slow), ("whole", "fp32")],
)
def test_a_network_is_never_in_memory_as_a_whole(
    stored: str, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(random_checkpoint.SHAPES, "wide", WIDE)
    opened = open_checkpoint(str(random_checkpoint.save_random("wide", tmp_path / "wide", half=stored == "half")))
    root = tmp_path / "bundle"
    (root / MARKERS).mkdir(parents=True)
    with start_worker(opened.source) as worker:
        libraries = worker.run(_job(opened, "vae_encoder", root, precision)).peak_rss_bytes
        unet = worker.run(_job(opened, "unet", root, precision))
    in_float32 = unet.weights_bytes * (2 if precision == "fp16" else 1)
    assert in_float32 > 7e8
    assert unet.peak_rss_bytes - libraries < 0.6 * in_float32


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("model", "steps", "denoiser", "least"),
    [("sd15", 1, "unet", 1.7e9), ("sdxl", 0, "unet", 5.1e9), ("sd35-medium-no-t5", 0, "transformer", 4.4e9)],
)
def test_a_full_size_export_takes_at_most_one_and_a_half_times_its_largest_network(
    model: str, steps: int, denoiser: str, least: float, tmp_path: Path
) -> None:
    result = full_size_export.measure(tmp_path, model, "fp16", steps)
    print(json.dumps(result, indent=1))
    assert result["export"]["peak_rss_over_largest"] <= 1.5
    assert result["export"]["components"][denoiser]["weights_bytes"] > least
