"""A bundle on a machine that it holds no engines for: they are built at first use, beside it or in the user's cache."""

from __future__ import annotations

import errno
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from latentrt.engines.backends import BACKENDS
from latentrt.engines.build import build_engines, build_missing, engines_at
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle, cache_folder
from latentrt.engines.bundle.staging import PARTIAL
from latentrt.engines.cli import build as build_command
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.find import cannot_build, find_engines
from latentrt.engines.onnxruntime import keys
from latentrt.engines.verify.verify import verify
from latentrt.runtime.pipeline import Pipeline
from tests.refused import caused_by
from tests.stand_in import L4, install

ROOT = Path(__file__).parent.parent
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK)


@pytest.fixture
def bare(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle without engines."""
    root = shutil.copytree(sd1_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(root)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sealed(bare: Bundle, cache: Path) -> Bundle:
    """A bundle in which nothing can be put: what would be the folder of its engines is a file. Root is held off too."""
    (bare.root / "engines").write_text("")
    return bare


def draw(root: Path, **options: Any) -> tuple[Any, str]:
    """Return a picture and the reason for its backend."""
    with Pipeline.load(root, "cpu", **options) as pipe:
        result = pipe("a red circle", steps=3, seed=5)
    return result.pixels, result.reason


def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)


def test_engines_are_built_when_they_are_needed_and_that_is_said(
    bare: Bundle, sd1_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EngineError):
        draw(bare.root)
    with caplog.at_level(logging.WARNING, "latentrt"):
        pixels, reason = draw(bare.root, build=True)
    directory, _ = find_engines(bare, "cpu")
    assert directory.parent == bare.root / "engines"
    assert str(directory) in reason
    assert any(str(directory) in record.getMessage() for record in caplog.records)
    assert np.array_equal(pixels, draw(sd1_bundle)[0])
    again, plain = draw(bare.root, build=True)
    assert np.array_equal(pixels, again) and str(directory) not in plain


def test_engines_of_another_library_or_instruction_set_stay_beside_those_that_are_built(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(sd1_bundle, tmp_path / "bundle")
    before = set((root / "engines").iterdir())
    monkeypatch.setattr(keys, "instruction_set", lambda: "x86_64 avx")
    draw(root, build=True)
    assert len(set((root / "engines").iterdir()) - before) == 1 and before <= set((root / "engines").iterdir())


def test_a_bundle_that_cannot_be_written_has_its_engines_in_the_cache(sealed: Bundle, cache: Path) -> None:
    pixels, reason = draw(sealed.root, build=True)
    directory, record = find_engines(sealed, "cpu")
    assert directory.is_relative_to(cache) and str(directory) in reason
    assert np.array_equal(draw(sealed.root)[0], pixels)  # later loads find them, without being told to build
    assert all(row.ok for row in verify(sealed, backend="cpu"))
    assert not list(cache.rglob(f".*{PARTIAL}*"))
    moved = Bundle.open(shutil.copytree(sealed.root, sealed.root.with_name("moved")))
    assert engines_at(moved, record.key) == directory  # another copy of the bundle has the same engines


def test_the_bundles_own_engines_come_before_the_caches(sealed: Bundle, cache: Path) -> None:
    build_engines(sealed, "cpu")
    (sealed.root / "engines").unlink()
    kept = build_engines(sealed, "cpu")
    assert not (sealed.root / "engines").exists()  # those of the cache do
    build_engines(sealed, "cpu", force=True)
    directory, _ = find_engines(sealed, "cpu")
    assert directory == sealed.root / "engines" / kept.key.directory
    assert list(sealed.engine_directories()) == [directory]


def test_another_bundles_engines_in_the_cache_are_not_taken(sealed: Bundle, sd2_bundle: Path, tmp_path: Path) -> None:
    build_engines(sealed, "cpu")
    root = shutil.copytree(sd2_bundle, tmp_path / "other", ignore=shutil.ignore_patterns("engines"))
    assert Bundle.open(root).engine_directories() == {}


def test_an_altered_engine_in_the_cache_is_refused(sealed: Bundle) -> None:
    build_engines(sealed, "cpu")
    directory, record = find_engines(sealed, "cpu")
    with (directory / record.entries["unet"]).open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff" * 20)
    with pytest.raises(BundleError):
        draw(sealed.root, build=True)


def read_only(root: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a folder be one in which nothing can be prepared, for root too."""
    real = tempfile.TemporaryFile

    def refuse(*arguments: Any, dir: Path, **options: Any) -> Any:
        if dir.is_relative_to(root):
            raise OSError(code, "no")
        return real(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("code", READ_ONLY, ids=[errno.errorcode[code] for code in READ_ONLY])
def test_every_way_of_being_read_only_leads_to_the_cache(
    code: int, bare: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only(bare.root, code, monkeypatch)
    record = build_engines(bare, "cpu")
    place = engines_at(bare, record.key)
    assert place is not None and place.is_relative_to(cache)


def test_engines_that_would_stay_hidden_behind_those_of_a_read_only_bundle_are_not_built(
    bare: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = build_engines(bare, "cpu")
    read_only(bare.root, errno.EROFS, monkeypatch)
    with pytest.raises(BundleError):
        build_engines(bare, "cpu", force=True)
    assert not list(cache.rglob("engine.json")) and engines_at(bare, record.key) is not None


def test_a_full_disk_is_not_answered_by_another_place(
    bare: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(BundleError, check=caused_by(errno.ENOSPC)):
        build_engines(bare, "cpu")
    assert not cache.exists()


def test_where_nothing_can_be_written_the_variable_is_named(
    sealed: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(BundleError, match="LATENTRT_CACHE"):
        build_engines(sealed, "cpu")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LATENTRT_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, Path("/c")),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, Path("/x/latentrt")),
        ({"LATENTRT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, Path("/h/.cache/latentrt")),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, Path("/h/.cache/latentrt")),
        ({"HOME": "relative"}, None),
    ],
)
def test_the_cache_is_where_the_platform_has_caches(
    variables: dict[str, str], expected: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LATENTRT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == expected


def test_the_best_backend_of_a_gpu_is_built_and_not_the_cpus(bare: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engines(bare, "cpu")
    install(monkeypatch, gpu=L4, tensorrt="11.4.0.106")
    choice = build_missing(bare, "auto")
    assert choice.backend == "tensorrt" and str(bare.root / "engines") in choice.reason
    assert str(bare.root) not in build_missing(bare, "auto").reason  # nothing is built any more
    assert {record.key.backend for record in bare.engine_directories().values()} == {"cpu", "tensorrt"}


def test_what_cannot_run_here_is_not_built(bare: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=None, tensorrt_rtx="1.7.1.116")
    for backend in ("tensorrt", "tensorrt-rtx", "tensorrtx"):
        with pytest.raises(EngineError):
            build_missing(bare, backend)
    assert bare.engine_directories() == {}


def test_gpu_engines_of_the_same_graphs_with_other_latents_have_another_key(
    bare: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, gpu=L4, tensorrt="11.4.0.106")
    latents = msgspec.structs.replace(bare.manifest.latents, scaling_factor=bare.manifest.latents.scaling_factor / 2)
    other = Bundle(root=bare.root, manifest=msgspec.structs.replace(bare.manifest, latents=latents))
    options = BuildOptions()
    keys = {name: [BACKENDS[name].key(bundle, options) for bundle in (bare, other)] for name in ("cpu", "tensorrt")}  # type: ignore[index]
    assert keys["cpu"][0] == keys["cpu"][1]
    assert keys["tensorrt"][0].directory != keys["tensorrt"][1].directory


@pytest.mark.parametrize("backend", ["cpu", "tensorrt", "tensorrt-rtx"])
def test_what_building_lacks_is_onnx_and_never_torch(
    backend: str, bare: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "cpu":
        install(monkeypatch, gpu=L4, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    without_onnx(monkeypatch)
    for attempt in (
        lambda: build_engines(bare, backend),  # type: ignore[arg-type]
        lambda: Pipeline.load(bare.root, backend),
        lambda: Pipeline.load(bare.root, backend, build=True),
    ):
        with pytest.raises(EngineError, match=r"\bonnx\b.*pip install 'latentrt\[build\]'") as caught:
            attempt()
        assert "export" not in str(caught.value)
    assert not (bare.root / "engines").exists()


def test_references_for_verify_name_the_option_that_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, gpu=L4, tensorrt="11.4.0.106")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "--no-references" in str(cannot_build("tensorrt", BuildOptions()))
    assert cannot_build("tensorrt", BuildOptions(references=False)) is None


def test_engines_that_are_there_need_nothing_to_be_kept(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnx(monkeypatch)
    bundle = Bundle.open(sd1_bundle)
    assert build_engines(bundle, "cpu").key == find_engines(bundle, "cpu")[1].key
    draw(sd1_bundle, build=True)


def test_the_build_command_says_where_the_engines_are(sealed: Bundle, cache: Path) -> None:
    result = CliRunner().invoke(build_command, [str(sealed.root), "--backend", "cpu"])
    assert result.exit_code == 0 and str(cache) in result.stdout


def test_nobody_but_export_asks_for_torch() -> None:
    asking = [
        path.relative_to(ROOT).as_posix()
        for folder in ("engines", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if "latentrt[export]" in path.read_text()
    ]
    assert asking == []
