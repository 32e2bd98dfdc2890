"""The comparison with peers, the scaling curves and the plots: real runs on the tiny model, in this environment."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peer_models  # noqa: E402
import peer_process  # noqa: E402
import peer_report  # noqa: E402
import peers  # noqa: E402
import plots  # noqa: E402
import scaling  # noqa: E402
from paired import paired_ratio  # noqa: E402
from peer_tables import ENVIRONMENTS, PEERS, Environment, PeerError  # noqa: E402

from latentrt.runtime.bench.measure import Asked, run_bench  # noqa: E402
from latentrt.runtime.bench.result import to_json  # noqa: E402

HERE = Environment(installs=(), imports="import latentrt.runtime.pipeline")


def asked(**changes: Any) -> argparse.Namespace:
    given = {"model": "sd1", "batch": 2, "steps": 3, "threads": 1, "rounds": 7, "seconds": 60.0, "imports": 1}
    return argparse.Namespace(**given | changes)


def settle(cache: Path, environment: str) -> None:
    """Make an environment of a peer that is this one."""
    folder = cache / "environments" / environment
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "complete").write_text(json.dumps(ENVIRONMENTS[environment].installs))


@pytest.fixture
def job(sd1_checkpoint: Path, sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {
        "checkpoint": str(sd1_checkpoint),
        "bundle": str(sd1_bundle),
        "cache": str(tmp_path),
        "tiny": None,
        "prompt": "a red circle",
        "steps": 3,
        "guidance": 3.0,
        "sigmas": None,
        "width": 32,
        "height": 32,
        "batch": 2,
        "threads": 1,
    }
    monkeypatch.setattr(peers, "make_job", lambda arguments, cache: found)
    broken = Environment(installs=(("--there-is-no-such-option",),))
    for name, environment in {"latentrt": HERE, "diffusers": HERE, "sdcpp": HERE, "optimum": broken}.items():
        monkeypatch.setitem(ENVIRONMENTS, name, environment)
    for name in ("latentrt", "diffusers", "sdcpp"):
        settle(tmp_path, name)
    return found


def test_peers_take_turns_and_those_that_cannot_are_in_the_table_with_the_reason(
    job: dict[str, Any], tmp_path: Path
) -> None:
    document = peers.compare(asked(cache=tmp_path), ["latentrt", "plain", "diffusers", "sdcpp", "optimum"])
    assert set(document["peers"]) == {"latentrt", "plain", "diffusers"}
    ours = document["peers"]["latentrt"]
    assert ours["batch_ratio"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}
    assert all(len(one["step"]["samples"]) == 7 for one in document["peers"].values())
    assert document["peers"]["plain"]["batch"] is None  # its loop ends with latents
    assert document["peers"]["diffusers"]["batch_ratio"]["estimate"] > 0
    assert document["peers"]["diffusers"]["decibels"] > 50  # another library's picture, of the same noise
    assert [document["peers"][name]["decibels"] for name in ("latentrt", "plain")] == [None, None]
    assert "stable_diffusion_cpp" in document["missing"]["sdcpp"]
    assert "no such option" in document["missing"]["optimum"]
    table = document["table"].splitlines()
    assert len(table) == 2 + 5
    assert len({line.count("|") for line in table}) == 1
    json.dumps(document, allow_nan=False)
    plots.draw(document, tmp_path / "peers.png")
    assert width(tmp_path / "peers.png") > 800


def test_a_worker_that_dies_on_the_way_is_left_out_with_its_last_words(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        "print(json.dumps({'load_s': 0.1}), flush=True)\n"
        "sys.stdin.readline()\n"
        "sys.exit('the model fell over')\n"
    )
    monkeypatch.setattr(peer_process, "WORKER", worker)
    made = peer_process.Worker("latentrt", job, tmp_path)
    with pytest.raises(PeerError, match=r"\b1: the model fell over"):
        made.draw()
    with pytest.raises(PeerError):
        made.draw()
    made.close()


def test_a_worker_that_hangs_is_ended(job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(peer_process, "WORKER", worker)
    monkeypatch.setattr(peer_process, "LOAD_S", 0.5)
    with pytest.raises(PeerError, match=r"\b0 s\b"):
        peer_process.Worker("latentrt", job, tmp_path)


def test_every_peer_has_an_environment_and_a_way_to_draw() -> None:
    import peer_worker

    assert set(PEERS) == set(peer_worker.WAYS)
    assert {peer.environment for peer in PEERS.values()} <= set(ENVIRONMENTS)
    assert {peer.draws for peer in PEERS.values() if peer.draws} <= set(ENVIRONMENTS)
    assert {what for peer in PEERS.values() for what in peer.needs} == set(peer_models.CONVERSIONS)


def test_peers_that_do_not_fit_together_take_turns_with_us_in_groups(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.MODELS, "sd1", peers.Model(together=1))
    document = peers.compare(asked(cache=tmp_path, rounds=3), ["latentrt", "plain", "diffusers"])
    assert document["groups"] == [["latentrt", "plain"], ["latentrt", "diffusers"]]
    assert list(document["peers"]) == ["latentrt", "plain", "diffusers"]
    assert all(one["step_ratio"]["estimate"] > 0 for one in document["peers"].values())


def test_sigmas_are_those_of_diffusers_trailing_steps(sd1_checkpoint: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_pretrained(sd1_checkpoint / "scheduler", timestep_spacing="trailing")
    for steps in (1, 2, 8, 20):
        scheduler.set_timesteps(steps)
        found = peer_models.trailing_sigmas(sd1_checkpoint, steps)
        np.testing.assert_allclose(found, scheduler.sigmas.numpy(), rtol=1e-5)


def test_a_peer_that_is_faster_is_bold_and_one_in_fewer_bits_shows_how_far_its_picture_is() -> None:
    def cell(name: str, low: float | None, high: float | None, decibels: float = 41.26) -> str:
        ratio = {"estimate": 0.9, "low": low, "high": high}
        one = {"batch_ratio": ratio, "step_ratio": None, "decibels": decibels}
        return peer_report.speed_cell({"peers": {name: one}, "missing": {"sdcpp": "it cannot"}}, name)

    assert cell("openvino", 0.8, 0.95) == "**0.90 (0.80 to 0.95)**"
    assert cell("openvino", 0.8, 1.05) == "0.90 (0.80 to 1.05)"
    assert cell("openvino-int8", None, None) == "**0.90; 41.3 dB**"
    assert peer_report.speed_cell({"peers": {}, "missing": {"sdcpp": "it cannot"}}, "sdcpp") == "cannot"


def test_scaling_curves_grow_one_number_each_and_are_plotted(sd1_bundle: Path, tmp_path: Path) -> None:
    given = argparse.Namespace(
        bundle=str(sd1_bundle), sizes=(32, 64), batches=(1, 2), steps=(1, 3), threads=(1, 2), seconds=0.1
    )
    curves = {}
    for name, one in scaling.curves_asked(given).items():
        points = curves[name] = scaling.curve(str(sd1_bundle), one, lambda *_: None)
        changed = {key for key in points[0]["settings"] if len({point["settings"][key] for point in points}) > 1}
        assert changed == ({"width", "height"} if name == "size" else {name})
        assert all(point["end_to_end"]["count"] >= 3 for point in points)
    components = {"unet": {"parameters": 10**6, "seconds": 3.0, "peak_rss_bytes": 10**9}}
    loras = scaling.lora_curve(str(sd1_bundle), (0, 2), tmp_path, seconds=0.1)
    assert [point["count"] for point in loras] == [0, 2]
    assert all(point["step"]["count"] >= 4 for point in loras)
    exports = {"sd1": {"components": components, "bytes": 10**6, "load_s": scaling.load_seconds(sd1_bundle)}}
    result = {
        "kind": "latentrt scaling",
        "curves": curves,
        "loras": loras,
        "exports": exports,
        "created": "",
        "machine": machine(),
    }
    assert len(scaling.format_lines(result).splitlines()) == 8 + 2 + 2
    plots.draw(result, tmp_path / "scaling.png")
    assert width(tmp_path / "scaling.png") > 1000


def width(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


def machine() -> dict[str, object]:
    from latentrt.runtime.bench.machine import describe

    return describe()


def test_a_report_of_bench_is_plotted(sd1_bundle: Path, tmp_path: Path) -> None:
    quick = Asked(steps=(1, 2), rounds=3, seconds=0.1, cold=0, golden=False)
    report = json.loads(to_json(run_bench(str(sd1_bundle), quick)))
    plots.draw(report, tmp_path / "stages.png")
    scores = ({"share": share, "low": share - 0.1, "high": share + 0.1} for share in (0.2, 0.9))
    for variant, score in zip(report["variants"], scores, strict=True):
        variant["prompts"] = score
    plots.draw(report, tmp_path / "accuracy.png")
    assert len({(tmp_path / name).read_bytes() for name in ("stages.png", "accuracy.png")}) == 2


def test_a_drift_that_hits_both_alike_leaves_the_paired_ratio_alone() -> None:
    wander = np.linspace(1, 9, 12)
    ratio = paired_ratio((2 * wander).tolist(), (3 * wander).tolist())
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_rounds_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])
