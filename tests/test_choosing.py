"""Which backend and which engines are taken on which machine, and what is said where none can be."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.bundle.manifest import ENGINE_RECORD
from latentrt.engines.cuda.gpus import Gpu
from latentrt.engines.errors import BundleError, EngineError, NotInstalledError, WrongMachineError
from latentrt.engines.find import choose, choose_to_build, find_engines, serving_engines, shapes_of
from latentrt.engines.onnxruntime import keys
from latentrt.engines.open import open_engines
from latentrt.engines.spec import BackendName, EngineKey
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.export.cli import inspect
from latentrt.runtime.pipeline import Pipeline
from tests.stand_in import H200, L4, install
from tests.studio import DRAWN

SMALL = BuildOptions(sizes=((32, 32),))
TALL = BuildOptions(sizes=((32, 64),), batches=(1, 2))
ONE = WorkspaceShape(pictures=1, tokens=77, width=32, height=32)


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(sd1_bundle, tmp_path / "bundle"))


def pretend(bundle: Bundle, key: EngineKey) -> Path:
    """Put engines with another key into a bundle: the CPU's files, recorded as those of another target."""
    directory, record = find_engines(bundle, "cpu")
    target = directory.parent / key.directory
    shutil.copytree(directory, target)
    write_manifest(target, msgspec.structs.replace(record, key=key))
    return target


def key_of(bundle: Bundle, gpu: Gpu, *, backend: BackendName = "tensorrt", **fields: Any) -> EngineKey:
    rtx = backend == "tensorrt-rtx"
    common: dict[str, Any] = {
        "backend": backend,
        "backend_version": "1.7.1.116" if rtx else "11.4.0.106",
        "device": f"compute capability {gpu.compute_capability}" if rtx else gpu.name,
        "compute_capability": gpu.compute_capability,
        "sm_count": None if rtx else gpu.sm_count,
        "driver_major": None if rtx else gpu.driver_major,
        "precision": bundle.manifest.precision,
        "graphs": bundle.manifest.graphs_digest(latents=True),
        "profiles": ("32x32 pictures 1 rows 1 tokens 77", "32x32 pictures 1 rows 2 tokens 77"),
        "options": (f"recipe {trt_library.RECIPE}", "state rows 6"),
    }
    return EngineKey(**common | fields)


def test_without_a_gpu_auto_is_the_cpu(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=None)
    assert choose("auto", copy).backend == "cpu"
    assert choose_to_build("auto", BuildOptions()).backend == "cpu"


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        (["tensorrt"], "tensorrt"),
        (["tensorrt-rtx"], "tensorrt-rtx"),
        (["tensorrt", "tensorrt-rtx"], "tensorrt"),
    ],
)
def test_auto_takes_the_fastest_engines_that_the_bundle_has_for_this_gpu(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, held: list[BackendName], taken: str
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    for backend in held:
        pretend(copy, key_of(copy, L4, backend=backend))
    choice = choose("auto", copy)
    assert choice.backend == taken
    assert choice.reason.startswith("auto") and L4.name in choice.reason and f" {taken} " in choice.reason


def test_auto_takes_onnx_runtimes_cuda_engines_where_there_are_no_others(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    cuda = replace(BACKENDS["cuda"], unavailable=lambda: None)
    monkeypatch.setitem(BACKENDS, "cuda", cuda)
    pretend(copy, keys.key(copy, "cuda", device=0))
    pretend(copy, key_of(copy, H200))  # of another GPU: not for here
    assert choose("auto", copy).backend == "cuda"


def test_auto_never_leaves_the_gpu_without_a_word(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle holds engines for the CPU, which would run: slowly, and nobody asked for it."""
    install(monkeypatch, tensorrt="11.4.0.106")
    pretend(copy, key_of(copy, H200))
    with pytest.raises(WrongMachineError, match=rf"{L4.name} .*`latentrt build {re.escape(str(copy.root))}`") as caught:
        open_engines(copy)
    assert "device: NVIDIA L4 here, NVIDIA H200 there" in caught.value.differences
    assert open_engines(copy, "cpu").choice.backend == "cpu"  # a name of the user's own is always obeyed


@pytest.mark.parametrize(
    ("libraries", "gpu", "options", "taken"),
    [
        ({"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}, L4, SMALL, "tensorrt"),
        ({"tensorrt_rtx": "1.7.1.116"}, L4, SMALL, "tensorrt-rtx"),
    ],
)
def test_auto_builds_the_best_that_can_be_built_here(
    libraries: dict[str, str], gpu: Gpu, options: BuildOptions, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, gpu=gpu, **libraries)
    choice = choose_to_build("auto", options)
    assert choice.backend == taken and gpu.name in choice.reason and f" {taken} " in choice.reason


def test_auto_builds_nothing_that_this_gpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX does not serve an H200: its engines would be built and never run."""
    install(monkeypatch, gpu=H200, tensorrt_rtx="1.7.1.116")
    with pytest.raises(EngineError, match=rf"{H200.name} .*\b9\.0\b"):
        choose_to_build("auto", SMALL)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another GPU": ({"device": "NVIDIA A100"}, "device: NVIDIA L4 here, NVIDIA A100 there"),
    "another chip of the name": ({"sm_count": 60}, "sm_count: 58 here, 60 there"),
    "another driver": ({"driver_major": 12}, "driver_major: 13 here, 12 there"),
    "another version": ({"backend_version": "10.13.3.9"}, r"backend_version: .*11\.4\.0\.106 here, 10\.13\.3\.9 there"),
    "another precision": ({"precision": "fp16"}, "precision: fp32 here, fp16 there"),
    "another export": ({"graphs": "0" * 64}, "graphs: .* here, 0+ there"),
    "another latentrt": ({"options": ("recipe 1",)}, rf"recipe: {trt_library.RECIPE} here, 1 there"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_engines_of_another_target_are_refused_and_the_difference_is_named(
    what: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    fields, words = OTHERS[what]
    pretend(copy, key_of(copy, L4, **fields))
    with pytest.raises(WrongMachineError) as caught:
        find_engines(copy, "tensorrt")
    (difference,) = caught.value.differences
    assert re.fullmatch(words, difference) and "latentrt build" in str(caught.value)


LEAN = (f"recipe {trt_library.RECIPE}", "version compatible True", "state rows 6")


@pytest.mark.parametrize(
    ("installed", "options", "runs_on"),
    [
        ({"tensorrt": "11.4.0.106"}, (), "tensorrt"),
        ({"tensorrt_lean_bindings": "11.4.0.106"}, LEAN, "tensorrt_lean_bindings"),
        ({"tensorrt_lean": "11.4.0.106", "tensorrt_lean_bindings": "11.4.0.106"}, LEAN, "tensorrt_lean"),
        ({"tensorrt": "11.4.0.106", "tensorrt_lean_bindings": "11.4.0.106"}, LEAN, "tensorrt_lean_bindings"),
        ({"tensorrt": "11.5.0.1", "tensorrt_lean_bindings": "11.4.0.106"}, LEAN, "tensorrt_lean_bindings"),
        ({"tensorrt": "11.4.0.106", "tensorrt_lean_bindings": "11.4.0.106"}, (), "tensorrt"),
        ({"tensorrt_lean_bindings": "11.4.0.106"}, (), None),
        ({"tensorrt_lean_bindings": "11.5.0.1"}, LEAN, None),
        ({"tensorrt_lean_bindings": "11.4.0.106.post1"}, LEAN, "tensorrt_lean_bindings"),
        ({"tensorrt": "11.5.0.1"}, LEAN, None),
    ],
)
def test_engines_run_on_the_runtime_of_the_version_that_built_them(
    installed: dict[str, str],
    options: tuple[str, ...],
    runs_on: str | None,
    copy: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, **installed)
    key = key_of(copy, L4, options=options or (f"recipe {trt_library.RECIPE}",))
    library = trt_library.runtime_of("tensorrt", key)
    assert (library and library.__name__) == runs_on
    assert bool(trt_library.mismatches(copy, "tensorrt", key)) == (runs_on is None)


def test_a_key_that_is_there_is_hit_and_any_other_missed(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    built = build_engines(copy, "tensorrt", options=SMALL)

    def compile_graph(*_: object, **__: object) -> bytes:
        raise EngineError("compiled again")

    monkeypatch.setattr(tensorrt, "compile_graph", compile_graph)
    assert build_engines(copy, "tensorrt", options=SMALL) == built
    with pytest.raises(EngineError, match="compiled again"):
        build_engines(copy, "tensorrt", options=TALL)


def test_of_several_engines_those_that_fit_are_taken(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    for options in (SMALL, TALL):
        build_engines(copy, "tensorrt", options=options)
    assert len(serving_engines(copy, "tensorrt")) == 2
    for shape in (ONE, replace(ONE, height=64), replace(ONE, height=64, pictures=2)):
        _, record = find_engines(copy, "tensorrt", needs=shape)
        assert any(
            profile.startswith(f"{shape.width}x{shape.height} pictures {shape.pictures} ")
            for profile in record.key.profiles
        )
    _, record = find_engines(copy, "tensorrt")
    assert record.key.profiles[0].startswith("32x32")  # the bundle's own size, where nothing else is asked for


@pytest.mark.parametrize(
    ("shape", "mend"),
    [
        (replace(ONE, pictures=2), "--size 32x32 --batch 2 --tokens 77"),
        (replace(ONE, height=48), "--size 32x48 --batch 1 --tokens 77"),
        (replace(ONE, tokens=154), "--size 32x32 --batch 1 --tokens 154"),
    ],
)
def test_a_shape_that_no_engine_has_names_those_there_are_and_the_command(
    shape: WorkspaceShape, mend: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    for options in (SMALL, TALL):
        build_engines(copy, "tensorrt", options=options)
    with pytest.raises(EngineError, match=rf"`latentrt build .* --backend tensorrt {mend}`") as caught:
        find_engines(copy, "tensorrt", needs=shape)
    held = ("32x32 pictures 1 tokens 77", "32x64 pictures 1 tokens 77", "32x64 pictures 2 tokens 77")
    assert all(words in str(caught.value) for words in held)


def test_inspect_shows_the_shapes_there_are(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(copy, "tensorrt", options=replace(TALL, references=False))
    assert [shapes_of(record) for record in copy.engine_directories().values()] == [
        [],
        ["32x64 pictures 1 tokens 77", "32x64 pictures 2 tokens 77"],
    ]
    monkeypatch.setenv("COLUMNS", "200")
    table = CliRunner().invoke(inspect, [str(copy.root)]).output
    assert "32x64 pictures 2 tokens 77" in table and " any " in table


def test_what_was_chosen_is_logged_once(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(copy, "tensorrt", options=SMALL)
    with caplog.at_level(logging.INFO, logger="latentrt"):
        opened = open_engines(copy)
        opened.workspace(copy.manifest.latents, ONE, state_rows=6, **DRAWN)
    (line,) = [record.getMessage() for record in caplog.records if opened.choice.reason in record.getMessage()]
    assert "auto" in line and L4.name in line and "tensorrt 11.4.0.106" in line
    opened.close()


def test_engines_of_another_shape_are_opened_when_they_are_needed(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = install(monkeypatch, tensorrt="11.4.0.106")
    for options in (SMALL, TALL):
        build_engines(copy, "tensorrt", options=options)
    opened = open_engines(copy, "tensorrt", components=("text_encoder", "unet", "vae_decoder"))
    for shape in (ONE, replace(ONE, height=64), ONE):
        assert opened.workspace(copy.manifest.latents, shape, state_rows=6, **DRAWN).shape == shape
    with pytest.raises(EngineError, match="--batch 9"):
        opened.workspace(copy.manifest.latents, replace(ONE, pictures=9), state_rows=6, **DRAWN)
    opened.close()
    assert device.leftovers() == {}


def test_a_record_whose_key_is_not_its_directorys_is_refused(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming a directory does not make its engines fit."""
    install(monkeypatch, tensorrt="11.4.0.106")
    directory = pretend(copy, key_of(copy, H200))
    directory.rename(directory.with_name(key_of(copy, L4).directory))
    with pytest.raises(BundleError, match=r"\(device: NVIDIA L4 here, NVIDIA H200 there"):
        find_engines(copy, "tensorrt")


def damage(bundle: Bundle, how: str) -> Path:
    """Spoil the UNet's plan; `recorded` as if it had been built so."""
    directory, record = find_engines(bundle, "tensorrt")
    file = directory / record.entries["unet"]
    content = file.read_bytes()
    file.write_bytes(content[:20] if "truncated" in how else b"\x00" * len(content))
    if "recorded" in how:
        document = json.loads((directory / ENGINE_RECORD).read_text())
        entry = record_file(directory, file.name)
        document["files"][file.name] = {"bytes": entry.bytes, "sha256": entry.sha256}
        (directory / ENGINE_RECORD).write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ("truncated", BundleError, r"unet\.engine\D+20\D"),
        ("corrupted", BundleError, r"unet\.engine.*SHA-256"),
        ("truncated, recorded", EngineError, r"tensorrt 11\.4\.0\.106 .*unet\.engine"),
        ("corrupted, recorded", EngineError, r"tensorrt 11\.4\.0\.106 .*unet\.engine"),
    ],
)
def test_a_damaged_plan_is_refused(
    how: str, error: type[Exception], told: str, copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(copy, "tensorrt", options=SMALL)
    damage(copy, how)
    with pytest.raises(error, match=told):
        open_engines(copy, "tensorrt")


@pytest.mark.parametrize(
    ("libraries", "gpu", "error", "told"),
    [
        ({"tensorrt": "11.4.0.106"}, None, WrongMachineError, "NVIDIA"),
        ({}, L4, NotInstalledError, r"pip install 'latentrt\[tensorrt\]'"),
    ],
    ids=["no driver", "no library"],
)
def test_a_machine_that_lacks_something_is_told_what(
    libraries: dict[str, str],
    gpu: Gpu | None,
    error: type[EngineError],
    told: str,
    copy: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as there:
        install(there, tensorrt="11.4.0.106")
        build_engines(copy, "tensorrt", options=SMALL)
    install(monkeypatch, gpu=gpu, **libraries)
    with pytest.raises(error, match=rf"'tensorrt' .*{told}"):
        open_engines(copy, "tensorrt")


def test_a_long_prompt_is_several_rows_of_the_text_encoder(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tensorrt="11.4.0.106")
    record = build_engines(copy, "tensorrt", options=replace(SMALL, tokens=(77, 231)))
    assert [profile["batch"] for profile in record.specs["text_encoder"].profiles] == [1, 3, 2, 6]
    assert {profile["tokens"] for profile in record.specs["unet"].profiles} == {77, 231}


def test_the_pipeline_draws_with_compiled_engines_what_it_draws_on_the_cpu(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in runs the very graphs that the compiler would get, on one CPU: no more than a rounding differs."""
    device = install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(copy, "tensorrt", options=BuildOptions(sizes=((32, 32),), batches=(1, 3)))
    with Pipeline.load(copy.root) as compiled, Pipeline.load(copy.root, "cpu") as plain:
        for options in ({"n": 1}, {"n": 3}, {"n": 1, "guidance": 1.0}):
            asked: Any = {"seed": 7, "size": (32, 32), "steps": 3, **options}
            found, expected = (pipe("a red circle", **asked) for pipe in (compiled, plain))
            assert found.backend == "tensorrt" and L4.name in found.reason
            assert abs(found.pixels.astype(int) - expected.pixels.astype(int)).max() <= 1
    assert device.leftovers() == {}
