"""`device=N`: which of several GPUs builds, is chosen for, and draws; and what is said of one that is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.cli import build
from latentrt.engines.cuda.gpus import find_gpu
from latentrt.engines.errors import EngineError, WrongMachineError
from latentrt.engines.find import choose, choose_to_build, find_engines, serves
from latentrt.engines.onnxruntime.session import OnnxRuntimeOptions, cuda_settings
from latentrt.runtime.cli import generate
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.verify.cli import verify
from tests.host_device import HostDevice
from tests.stand_in import H200, L4, install_several

SIZE = (32, 32)
OPTIONS = BuildOptions(sizes=(SIZE,), references=False)
DRAWN = {"prompt": "a red circle", "steps": 2, "seed": 3, "size": SIZE}


class Machine:
    """A machine with an L4 and an H200, and a bundle with engines for both."""

    def __init__(self, root: Path, devices: list[HostDevice]) -> None:
        self.root, self.devices = root, devices


@pytest.fixture(scope="module")
def machine(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    root = shutil.copytree(sd1_bundle, tmp_path_factory.mktemp("several") / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        devices = install_several(patch, (L4, H200), tensorrt="11.4.0.106")
        for device in (0, 1):
            build_engines(Bundle.open(root), "tensorrt", options=OPTIONS, device=device)
        yield Machine(root, devices)
        assert [device.leftovers() for device in devices] == [{}, {}]


def test_each_gpu_has_its_name_by_its_index(machine: Machine) -> None:
    found = [find_gpu(index) for index in (0, 1)]
    assert [(gpu.name, gpu.index) for gpu in found if gpu] == [(L4.name, 0), (H200.name, 1)]


@pytest.mark.parametrize("index", [2, -1])
def test_a_gpu_that_is_not_there_is_refused_with_how_many_are(machine: Machine, index: int) -> None:
    bundle = Bundle.open(machine.root)
    for attempt in (
        lambda: find_gpu(index),
        lambda: choose("auto", bundle, device=index),
        lambda: choose_to_build("auto", OPTIONS, device=index),
        lambda: serves("auto", bundle, device=index),
        lambda: find_engines(bundle, "tensorrt", device=index),
        lambda: build_engines(bundle, "tensorrt", options=OPTIONS, device=index),
        lambda: Pipeline.load(machine.root, device=index),
    ):
        with pytest.raises(WrongMachineError, match=rf"\bGPU {index}\b.* 2 "):
            attempt()


def test_engines_are_built_and_found_for_the_gpu_that_was_asked_for(machine: Machine) -> None:
    bundle = Bundle.open(machine.root)
    keys = [find_engines(bundle, "tensorrt", device=device)[1].key for device in (0, 1)]
    assert [key.device for key in keys] == [L4.name, H200.name]
    assert choose("auto", bundle, device=1).device == 1


def test_a_gpu_without_engines_is_told_with_the_command_that_names_it(machine: Machine, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(machine.root, tmp_path / "bundle"))
    shutil.rmtree(find_engines(bundle, "tensorrt", device=1)[0])
    for asked in ("auto", "tensorrt"):
        with pytest.raises(WrongMachineError, match=r"`latentrt build .* --device 1`"):
            Pipeline.load(bundle.root, asked, device=1)


def test_pipelines_on_two_gpus_serve_side_by_side_each_on_its_own(machine: Machine) -> None:
    with Pipeline.load(machine.root, device=1) as second, Pipeline.load(machine.root) as first:
        machine.devices[0].forget()
        found = second(**DRAWN)
        assert machine.devices[0].calls == [] and machine.devices[1].counted()["launch"]
        machine.devices[1].forget()
        same = first(**DRAWN)
        assert machine.devices[1].calls == [] and machine.devices[0].counted()["launch"]
        assert (found.pixels == same.pixels).all()


def test_a_cpu_has_no_other_device_than_0(machine: Machine) -> None:
    bundle = Bundle.open(machine.root)
    with pytest.raises(EngineError, match=r"\bGPU 1\b"):
        Pipeline.load(machine.root, "cpu", device=1)
    with pytest.raises(EngineError, match=r"\bGPU 1\b"):
        build_engines(bundle, "cpu", device=1, force=True)


def test_auto_takes_no_cpu_where_a_gpu_was_named(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_several(monkeypatch, ())
    assert choose("auto", Bundle.open(sd1_bundle)).backend == "cpu"
    with pytest.raises(WrongMachineError):
        choose("auto", Bundle.open(sd1_bundle), device=1)
    with pytest.raises(WrongMachineError):
        choose_to_build("auto", BuildOptions(), device=1)


def test_the_commands_take_a_device(machine: Machine, tmp_path: Path) -> None:
    def run(command: click.Command, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(command, [str(machine.root), *arguments, "--json"], catch_exceptions=False)
        assert done.exit_code == code
        return done.output

    machine.devices[0].forget()
    drawing = ("a red circle", "-o", str(tmp_path), "--steps", "2", "--size", "32")
    assert json.loads(run(generate, *drawing, "--device", "1"))["backend"] == "tensorrt"
    built = run(build, "--size", "32", "--no-references", "--device", "1")
    assert json.loads(built)["key"]["device"] == H200.name
    assert machine.devices[0].calls == []
    run(verify, "--backend", "tensorrt", "--device", "7", code=2)


def test_onnx_runtime_is_told_which_gpu(machine: Machine) -> None:
    spec = find_engines(Bundle.open(machine.root), "cpu")[1].specs["unet"]
    for device in (0, 1):
        settings = cuda_settings(OnnxRuntimeOptions(device=device), spec, every_stage=True)
        assert settings.get("device_id", "0") == str(device)
