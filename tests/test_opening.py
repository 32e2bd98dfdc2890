"""How bundles open: only what is opened is read, sessions open side by side, the first text is encoded early."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines import comparison
from latentrt.engines.bundle.files import Bundle, Check, check_file, record_tree
from latentrt.engines.bundle.manifest import FileRecord
from latentrt.engines.comparison import Comparison
from latentrt.engines.errors import BundleError, RequestError
from latentrt.engines.find import find_engines
from latentrt.engines.onnxruntime import backend, engines, session
from latentrt.engines.onnxruntime import build as onnxruntime
from latentrt.engines.onnxruntime.engines import Sessions
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.open import open_engines
from latentrt.engines.spec import Array, Engine
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Request


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
    with pytest.raises(BundleError, match=r"unet\.onnx\.data .*SHA-256"):
        open_engines(copy, "cpu", threads=1)
    assert len(closed) == 1


def test_sizes_are_compared_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    files = record_tree(tmp_path)
    (tmp_path / "one").write_bytes(b"12")
    with pytest.raises(BundleError, match=r"/one\D+2\D+1\D"):
        Comparison(tmp_path, files, check="hash")


def test_large_sessions_on_the_cpu_open_side_by_side(sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("text_encoder", "unet", "vae_decoder")
    meet, real = threading.Barrier(len(names)), session.open_session

    def open_session(*given: object) -> object:
        meet.wait(60)  # raises where one is opened after another
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "open_session", open_session)
    monkeypatch.setattr(engines, "LARGE_BYTES", 0)
    opened = open_engines(Bundle.open(sd1_bundle), "cpu", components=names, threads=1)
    running: dict[str, Engine] = dict(opened.engines)
    assert {name: engine.spec.component for name, engine in running.items()} == {name: name for name in names}
    opened.close()


class Slow(Sessions):
    """Sessions whose denoiser opens when `after` is set, or never in time."""

    after = threading.Event()

    def _load(self, component: str, *changed: Mapping[str, Array]) -> OnnxRuntimeEngine:
        if component == "unet":
            assert self.after.wait(60), "the text waits for the denoiser"
        return super()._load(component, *changed)


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["side by side", "one after another"])
def test_the_first_text_is_encoded_while_other_networks_open(
    large: int, sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, real = list[str](), OnnxRuntimeEngine.run_bound
    monkeypatch.setattr(Slow, "after", threading.Event())
    monkeypatch.setattr(engines, "LARGE_BYTES", large)

    def run_bound(self: OnnxRuntimeEngine, binding: object, **named: int) -> None:
        real(self, binding, **named)
        ran.append(self.spec.component)
        Slow.after.set()  # the denoiser opens once the text has been encoded

    monkeypatch.setattr(OnnxRuntimeEngine, "run_bound", run_bound)
    monkeypatch.setattr(backend, "Sessions", Slow)
    first = Request(prompt="a red circle", negative_prompt="blue", steps=1, guidance=2.0, seed=1)
    with Pipeline.load(sd1_bundle, "cpu", threads=1, first=first) as pipe:
        assert ran == ["text_encoder"]
        early = pipe.draw(first).pixels
        assert "text_encoder" not in ran[1:]
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as pipe:
        assert np.array_equal(pipe.draw(first).pixels, early)


def test_a_first_request_that_cannot_be_drawn_is_refused_and_a_failed_opening_is_told(
    copy: Bundle,
) -> None:
    with pytest.raises(RequestError):
        Pipeline.load(copy.root, "cpu", first=Request(prompt="a", steps=0))
    directory, record = find_engines(copy, "cpu")
    alter(directory / record.entries["unet"])
    with pytest.raises(BundleError, match="unet"):  # and nobody waits for text encoders that never come
        Pipeline.load(copy.root, "cpu", first=Request(prompt="a", steps=1))


def test_text_encoders_that_are_opened_on_demand_are_not_waited_for(sd1_bundle: Path) -> None:
    first = Request(prompt="a red circle", steps=1, seed=1)
    with Pipeline.load(sd1_bundle, "cpu", threads=1, free_text_encoders=True, first=first) as pipe:
        assert pipe.draw(first).pixels.shape == (1, 32, 32, 3)
