"""Kernels that TensorRT-RTX compiled are found by the next process, and never stand in the way. On the stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from tests.host_device import HostDevice
from tests.host_tensorrt import make_library
from tests.studio import DRAWN, ONE, TWO, Request, Studio, assert_same, expected, make_studio, picture

PASSES = {"text_encoder": "run last_hidden_state 1", "unet": "run next_state 1", "vae_decoder": "run pixels 0"}
FILES = {f"{component}.sm89.kernels" for component in PASSES}


@pytest.fixture(scope="module")
def original(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return make_studio(Bundle.open(sd1_bundle), tmp_path_factory.mktemp("plans") / "bundle")


@pytest.fixture
def studio(original: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Studio:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return replace(original, directory=shutil.copytree(original.directory, tmp_path / "bundle" / "engines" / "rtx"))


@pytest.fixture
def device() -> Iterator[HostDevice]:
    device = HostDevice()
    yield device
    assert device.leftovers() == {}


def library_for(device: HostDevice, *, version: str = "1.7.1.116", refuses: str = "") -> Any:
    library = make_library(device, rtx=True)
    library.__version__, library.refuses = version, {refuses} - {""}
    return library


def drawn(studio: Studio, device: HostDevice, **options: Any) -> list[str]:
    """Draw a picture in a session of its own; return what kernels were compiled for."""
    library = library_for(device, **options)
    with studio.open(device, library=library) as session:
        assert_same(picture(session.workspace(ONE, **DRAWN), studio, Request()), expected(studio, Request()))
    return list(library.compiled)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name not in {f"{name}.engine" for name in STUDIO}}


STUDIO = (*PASSES, "vae_encoder")


def test_the_next_process_compiles_nothing(studio: Studio, device: HostDevice) -> None:
    assert set(drawn(studio, device)) == set(PASSES.values())
    assert kept(studio.directory) == FILES
    assert drawn(studio, device) == []


def test_what_is_drawn_for_the_first_time_is_added(studio: Studio, device: HostDevice) -> None:
    drawn(studio, device)
    library = library_for(device)
    with studio.open(device, library=library) as session:
        request = Request(shape=TWO)
        assert_same(picture(session.workspace(TWO, **DRAWN), studio, request), expected(studio, request))
    assert set(library.compiled) == {"run last_hidden_state 2", "run next_state 3", "run pixels 1"}
    assert drawn(studio, device) == []


def test_kernels_are_written_before_the_end(studio: Studio, device: HostDevice) -> None:
    """A service may be killed: what its first picture compiled is on the disk when the second is asked for."""
    with studio.open(device, library=library_for(device)) as session:
        picture(session.workspace(ONE, **DRAWN), studio, Request())
        session.workspace(ONE, **DRAWN)
        assert kept(studio.directory) == FILES


def test_kernels_of_another_release_are_compiled_anew_and_replaced(studio: Studio, device: HostDevice) -> None:
    drawn(studio, device, version="1.4.0.76")
    assert set(drawn(studio, device)) == set(PASSES.values())
    assert drawn(studio, device) == []


def test_a_damaged_file_costs_time_and_no_picture(studio: Studio, device: HostDevice) -> None:
    for name in FILES:
        (studio.directory / name).write_bytes(b"half of a fi")
    assert set(drawn(studio, device)) == set(PASSES.values())
    assert drawn(studio, device) == []


def test_where_engines_are_read_only_kernels_go_into_the_users_cache(
    studio: Studio, device: HostDevice, tmp_path: Path
) -> None:
    for name in FILES:  # not even root replaces a directory with a file
        (studio.directory / name / "in the way").mkdir(parents=True)
    drawn(studio, device)
    assert kept(tmp_path / "cache" / "kernels" / studio.directory.name) == FILES
    assert drawn(studio, device) == []


def test_where_nothing_can_be_written_pictures_are_drawn_all_the_same(
    studio: Studio, device: HostDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    for name in FILES:
        (studio.directory / name / "in the way").mkdir(parents=True)
    for _ in range(2):
        assert set(drawn(studio, device)) == set(PASSES.values())
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2 * len(FILES)


def test_a_library_that_gives_no_content_keeps_what_there_was(studio: Studio, device: HostDevice) -> None:
    drawn(studio, device)
    before = {name: (studio.directory / name).read_bytes() for name in FILES}
    drawn(studio, device, refuses="serialize")
    assert {name: (studio.directory / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("call", ["create_runtime_cache", "set_runtime_cache"])
def test_a_library_that_refuses_a_cache_is_an_error(studio: Studio, device: HostDevice, call: str) -> None:
    with (
        studio.open(device, library=library_for(device, refuses=call)) as session,
        pytest.raises(EngineError, match=f"{call}: as the test wishes"),
    ):
        session.workspace(ONE, **DRAWN)


def test_exchanged_weights_need_no_other_kernels(studio: Studio, device: HostDevice) -> None:
    library = library_for(device)
    with studio.open(device, library=library) as session:
        picture(session.workspace(ONE, **DRAWN), studio, Request())
        compiled = list(library.compiled)
        session.refit("unet", lambda program, stream: None)
        assert_same(picture(session.workspace(ONE, **DRAWN), studio, Request()), expected(studio, Request()))
        assert library.compiled == compiled


def test_tensorrt_keeps_none(studio: Studio, device: HostDevice) -> None:
    with studio.open(device) as session:
        picture(session.workspace(ONE, **DRAWN), studio, Request())
    assert kept(studio.directory) == set()
