"""How engines are opened: only their own files are read, weights are compared meanwhile, sessions open side by side."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from latentrt.engines.bundle import comparison
from latentrt.engines.bundle.comparison import Comparison
from latentrt.engines.bundle.files import Bundle, Check, check_file, record_tree
from latentrt.engines.bundle.manifest import FileRecord
from latentrt.engines.errors import BundleError
from latentrt.engines.find import find_engines
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime import session
from latentrt.engines.onnxruntime.engines import Sessions
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Engine
from latentrt.runtime.pipeline import Pipeline


@pytest.fixture
def copy(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def alter(file: Path) -> None:
    """Change the last byte of a file."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_file_is_compared_when_it_is_opened_and_not_before(copy: Bundle) -> None:
    directory, record = find_engines(copy, "cpu")
    alter(directory / record.entries["vae_encoder"])
    opened = open_engines(copy, "cpu", components=("unet", "vae_decoder"), threads=1)
    with pytest.raises(BundleError, match="vae_encoder"):
        opened.sizeless("vae_encoder")
    opened.close()
    alter(directory / record.entries["unet"])
    with pytest.raises(BundleError, match="unet"):
        open_engines(copy, "cpu", components=("unet",))
    open_engines(copy, "cpu", components=("unet",), check="size").close()


def test_weights_are_compared_while_sessions_open_and_altered_ones_end_those(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy.root / "engines")
    monkeypatch.setattr(onnxruntime, "EXTERNAL_BYTES", 0)
    closed, opened, real = list[Sessions](), threading.Event(), Sessions.__init__

    def open_sessions(self: Sessions, *given: object, **named: object) -> None:
        real(self, *given, **named)  # type: ignore[arg-type]
        opened.set()

    def check(folder: Path, name: str, file: FileRecord, *, check: Check) -> Path:
        if check == "hash" and name.endswith(".data"):
            assert opened.wait(60), "the sessions wait for the weights' hash"
        return check_file(folder, name, file, check=check)

    Pipeline.load(copy.root, "cpu", threads=1, build=True).close()
    directory, _ = find_engines(copy, "cpu")
    alter(directory / "unet.onnx.data")
    monkeypatch.setattr(Sessions, "__init__", open_sessions)
    monkeypatch.setattr(Sessions, "close", lambda self: closed.append(self))
    monkeypatch.setattr(comparison, "check_file", check)
    with pytest.raises(BundleError, match=r"unet\.onnx\.data was altered"):
        open_engines(copy, "cpu", threads=1)
    assert len(closed) == 1


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    files = record_tree(tmp_path)
    (tmp_path / "one").write_bytes(b"12")
    with pytest.raises(BundleError, match="truncated"):
        Comparison(tmp_path, files, check="hash")


def test_sessions_on_the_cpu_open_side_by_side(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("text_encoder", "unet", "vae_decoder")
    meet, real = threading.Barrier(len(names)), session.open_session

    def open_session(*given: object) -> object:
        meet.wait(60)  # raises where one is opened after another
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "open_session", open_session)
    opened = open_engines(Bundle.open(sd1_bundle), "cpu", components=names, threads=1)
    engines: dict[str, Engine] = dict(opened.engines)
    assert {name: engine.spec.component for name, engine in engines.items()} == {name: name for name in names}
    opened.close()
