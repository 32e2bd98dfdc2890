"""What an export takes of the disk is known before it starts, and one for which there is no room does not start."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError
from latentrt.engines.spec import Precision
from latentrt.export import export as exporting
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions
from latentrt.export.work import need as needs
from latentrt.export.work.need import Cost, costs, free_bytes, need
from tests.conftest import Make
from tests.single_sd3 import save_sd3_file

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import random_sd3

PAGE = Path(__file__).parent.parent / "docs" / "sd3.md"
PUBLISHED = {
    "SD 3.5 medium without T5": "sd35-medium-no-t5",
    "SD 3.5 medium": "sd35-medium",
    "SD 3.5 large without T5": "sd35-large-no-t5",
    "SD 3.5 large": "sd35-large",
}


class Disk(NamedTuple):
    free: int


def room(patch: pytest.MonkeyPatch, free: int) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Disk(free))


def costs_of(checkpoint: Checkpoint, precision: Precision = "fp16") -> dict[str, Cost]:
    networks = {name: checkpoint.networks[name] for name in exporting._ordered(checkpoint)}
    return dict(zip(networks, costs(networks, checkpoint.source, precision), strict=True))


def test_what_stays_is_what_a_bundle_holds(made: Make) -> None:
    checkpoint, root = made("sd3", "dual t5")
    found, bundle = costs_of(open_checkpoint(str(checkpoint)), "fp32"), Bundle.open(root)
    for name, component in bundle.manifest.components.items():
        if not name.startswith("vae_"):  # of which half is counted for each of its halves
            assert found[name].left == pytest.approx(component.weights_bytes, rel=0.1), name
    held = sum(component.weights_bytes for component in bundle.manifest.components.values())
    assert sum(cost.left for cost in found.values()) == pytest.approx(held, rel=0.1)
    assert need([*found.values()], ("cpu",)).disk_bytes == pytest.approx(2 * held, rel=0.1)


def test_half_of_a_graph_stands_beside_the_whole(made: Make) -> None:
    """The largest comes second: the first one's half is there too."""
    each = [Cost(most=600, left=200, numbers=100), Cost(most=6000, left=2000, numbers=1000, memory=10)]
    assert need(each, ()).disk_bytes == 200 + 6000
    assert need(each, ("tensorrt",)).disk_bytes == 200 + 6000
    # 2200 of graphs, 400 of the first engine, 4000 of the second and as many beside it
    assert need(each, ("cpu",)).disk_bytes == 2200 + 400 + 4000 + 4000
    wide = costs_of(open_checkpoint(str(made("sd3", "dual t5")[0])), "fp32")
    half = costs_of(open_checkpoint(str(made("sd3", "dual t5")[0])), "fp16")
    assert all(half[name].left * 2 == wide[name].left for name in wide)
    assert all(half[name].most == wide[name].left + half[name].left for name in wide)


def test_a_network_out_of_a_single_file_is_written_first(made: Make, tmp_path: Path) -> None:
    checkpoint, _ = made("sd3", "dual t5")
    file = save_sd3_file(checkpoint, tmp_path / "whole.safetensors")
    options = CheckpointOptions(config=str(checkpoint), tokenizer=str(checkpoint))
    one = costs_of(open_checkpoint(str(file), options=options), "fp32")
    other = costs_of(open_checkpoint(str(checkpoint)), "fp32")
    for name in ("transformer", "text_encoder_3"):
        assert one[name].numbers == pytest.approx(other[name].numbers, rel=0.1)
        assert one[name].most > 1.4 * other[name].most


def test_without_room_nothing_is_begun(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("it began")

    checkpoint, _ = made("sd3", "dual t5")
    takes = need([*costs_of(open_checkpoint(str(checkpoint))).values()], ()).disk_bytes
    for part in ("_provenance", "start_worker", "staged"):
        monkeypatch.setattr(exporting, part, begun)
    room(monkeypatch, takes // 2)
    with pytest.raises(BundleError) as caught:
        export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp16", backends=())
    assert f"{takes / 1e9:.3g} GB" in str(caught.value) and f"{takes // 2 / 1e9:.3g} GB" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    room(monkeypatch, 2 * takes)
    with pytest.raises(AssertionError, match="it began"):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp16", backends=())


def test_what_it_takes_is_said_first(made: Make, tmp_path: Path) -> None:
    told = list[str]()

    def report(what: str, done: int, total: int) -> None:
        told.append(what)
        if what.startswith("exporting text"):
            raise KeyboardInterrupt

    checkpoint, _ = made("sd3", "dual t5")
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp16", backends=(), report=report)
    takes = need([*costs_of(open_checkpoint(str(checkpoint))).values()], ())
    said = next(place for place, what in enumerate(told) if f"{takes.disk_bytes / 1e9:.3g} GB of disk" in what)
    assert said < next(place for place, what in enumerate(told) if what.startswith("exporting text"))


def test_a_bundle_that_is_there_takes_nothing(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 0)
    checkpoint = sd1_bundle.parent / "sd1-checkpoint"
    assert export_checkpoint(str(checkpoint), sd1_bundle, precision="fp32").already_there


def test_what_an_earlier_run_left_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, left = tmp_path / "bundle [1]", tmp_path / ".bundle [1].partial-0123456789ab" / "onnx"
    left.mkdir(parents=True)
    (left / "model.onnx").write_bytes(b"x" * 1000)
    room(monkeypatch, 5000)
    assert free_bytes(target) == 6000
    assert free_bytes(tmp_path / "not" / "there" / "yet") == 5000
    assert needs.require_room(target, needs.Need(disk_bytes=6000, memory_bytes=1))
    with pytest.raises(BundleError):
        needs.require_room(target, needs.Need(disk_bytes=6001, memory_bytes=1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_says_what_published_sizes_take(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = random_sd3.save_sd3(PUBLISHED[name], tmp_path / "checkpoint", half=True, hollow=True)
    takes = need([*costs_of(open_checkpoint(str(checkpoint))).values()], ())
    stored = sum(file.stat().st_size for file in checkpoint.glob("*/*.safetensors"))
    cells = [name, *(f"{size / 1e9:.3g} GB" for size in (stored, takes.disk_bytes, takes.memory_bytes))]
    assert f"| {' | '.join(cells)} |" in PAGE.read_text().splitlines()
    room(monkeypatch, takes.disk_bytes - 1)
    with pytest.raises(BundleError):
        export_checkpoint(str(checkpoint), tmp_path / "bundle", precision="fp16", backends=())


def test_drawing_for_8_bits_takes_all_networks_in_float32_and_two_of_the_largest_on_the_disk() -> None:
    each = [Cost(most=60, left=20, numbers=10), Cost(most=6000, left=2000, numbers=1000, memory=100)]
    plain, drawn = need(each, ()), need(each, (), drawn=True)
    assert drawn.disk_bytes - plain.disk_bytes == 2 * 4 * 1000
    each = [Cost(most=6, left=2, numbers=10**9, memory=10)]
    assert need(each, (), drawn=True).memory_bytes - need(each, ()).memory_bytes == 4 * 10**9 - 10
