"""NVIDIA's own wheels, where they import without a GPU: a stand-in must not be able to bless a name that none has."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.spec import EngineKey
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.logger import KEPT_LINES, LogScope

WHEELS = {"tensorrt-lean": "tensorrt-lean-cu13-bindings", "tensorrt-rtx": "tensorrt-rtx-cu13-bindings"}


def installed(library: trt_library.Library) -> str:
    """Return the version of a library's wheel; skip where it is not installed. Whether it imports is another matter."""
    try:
        return importlib.metadata.version(WHEELS[library])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{WHEELS[library]} is not installed")


@pytest.fixture
def lean_key() -> EngineKey:
    return EngineKey(
        backend="tensorrt",
        backend_version=installed("tensorrt-lean"),
        device="NVIDIA L4",
        precision="fp16",
        graphs="",
        options=(trt_library.LEAN,),
    )


def test_what_the_lean_wheels_install_runs_the_engines_of_its_version(lean_key: EngineKey) -> None:
    library = trt_library.runtime_of("tensorrt", lean_key)
    assert library is not None and library.__name__ in trt_library.MODULES["tensorrt-lean"]
    assert trt_library.version_of(library) == lean_key.backend_version
    assert not hasattr(library, "Builder")


def test_what_the_lean_wheels_install_runs_no_other_engines(lean_key: EngineKey) -> None:
    for fields in ({"options": ()}, {"backend_version": "10.14.1.48"}):
        assert trt_library.runtime_of("tensorrt", msgspec.structs.replace(lean_key, **fields)) is None


def test_the_rtx_wheels_build_and_run(sd1_bundle: Path) -> None:
    version = installed("tensorrt-rtx")
    builder = trt_library.require("tensorrt-rtx")
    assert trt_library.version_of(builder) == version
    assert trt_library.runtimes("tensorrt-rtx") == [(builder, None)]
    options = trt_library.BuildOptions(compute_capability="8.9")
    key = trt_library.key(Bundle.open(sd1_bundle), "tensorrt-rtx", options)
    assert trt_library.runtime_of("tensorrt-rtx", key) is builder


@pytest.fixture(params=WHEELS)
def library(request: pytest.FixtureRequest) -> ModuleType:
    installed(request.param)
    name = next(name for name in trt_library.MODULES[request.param] if importlib.util.find_spec(name))
    return importlib.import_module(name)


def test_errors_that_a_real_library_logs_are_told_and_its_warnings_are_not(library: ModuleType) -> None:
    before, told = LogScope(library), LogScope(library)
    assert told.logger is before.logger, "the library keeps its process's first"
    for severity in ("WARNING", "ERROR", "INTERNAL_ERROR"):
        told.logger.log(getattr(library.ILogger.Severity, severity), f"{severity}\n of the test")
    assert told.lines == before.lines == ["ERROR of the test", "INTERNAL_ERROR of the test"]
    assert LogScope(library).lines == []


def test_of_many_errors_the_last_are_kept(library: ModuleType) -> None:
    told = LogScope(library)
    for number in range(100):
        told.logger.log(library.ILogger.Severity.ERROR, f"error {number}")
    assert told.lines == [f"error {number}" for number in range(100 - KEPT_LINES, 100)]
    later = LogScope(library)
    later.logger.log(library.ILogger.Severity.ERROR, "the last")
    assert later.lines == ["the last"]
