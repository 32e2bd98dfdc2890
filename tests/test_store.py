"""A store of engines: machines of one kind build once, and nothing that is half there or altered is ever fetched."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from latentrt.engines import build as building
from latentrt.engines.build import build_engines
from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import ENGINE_RECORD, EngineRecord
from latentrt.engines.bundle.store import Store
from latentrt.engines.cli import build as build_command
from latentrt.engines.errors import BundleError, EngineError, LatentrtError, NotInstalledError, RequestError
from latentrt.engines.find import find_engines
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.verify.verify import verify
from tests.refused import caused_by
from tests.stand_in import H200, install

SMALL = BuildOptions(sizes=((32, 32),))


@pytest.fixture
def machines(sd1_bundle: Path, tmp_path: Path) -> Callable[[str], Bundle]:
    """Return a maker of machines: each has a copy of the bundle, without engines."""

    def make(name: str) -> Bundle:
        root = shutil.copytree(sd1_bundle, tmp_path / name)
        shutil.rmtree(root / "engines")
        return Bundle.open(root)

    return make


@pytest.fixture(params=["file", "memory", "plain path"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    urls = {
        "file": f"file://{tmp_path}/shelf",
        "memory": f"memory://{tmp_path.name}/shelf",
        "plain path": str(tmp_path / "shelf"),
    }
    return urls[request.param]


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes every later build an error."""

    def fail(*_: object, **__: object) -> EngineRecord:
        raise AssertionError("it was built")

    return lambda: monkeypatch.setattr(building, "_build_into", fail)


def names(bundle: Bundle) -> set[str]:
    return {str(path.relative_to(bundle.root)) for path in (bundle.root / "engines").rglob("*") if path.is_file()}


def test_the_second_machine_fetches_what_the_first_has_built(
    url: str, machines: Callable[[str], Bundle], no_building: Callable[[], None]
) -> None:
    first, second = machines("first"), machines("second")
    built = build_engines(first, "cpu", store=url)
    no_building()
    assert build_engines(second, "cpu", store=url) == built
    assert names(first) == names(second)
    assert all(row.ok for row in verify(second, backend="cpu"))


def test_engines_that_are_there_already_are_published_too(
    url: str, machines: Callable[[str], Bundle], no_building: Callable[[], None]
) -> None:
    first, second = machines("first"), machines("second")
    build_engines(first, "cpu")
    no_building()
    build_engines(first, "cpu", store=url)
    build_engines(second, "cpu", store=url, fetch_only=True)
    assert names(first) == names(second)


def test_another_kind_of_machine_builds_its_own(
    url: str, machines: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = {}
    for name, gpu in (("l4", None), ("h200", H200)):
        install(monkeypatch, tensorrt="11.4.0.106", **({} if gpu is None else {"gpu": gpu}))  # type: ignore[arg-type]
        bundles[name] = machines(name)
        build_engines(bundles[name], "tensorrt", options=SMALL, store=url)
    store = Store(url)
    records = [find_engines(bundles["h200"], "tensorrt")[1], *bundles["l4"].engine_directories().values()]
    assert [record.key.device for record in records] == ["NVIDIA H200", "NVIDIA L4"]
    assert all(store.holds(record.key) for record in records)


def test_a_machine_with_the_lean_runtime_alone_fetches_what_it_cannot_build(
    url: str, machines: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = replace(SMALL, version_compatible=True)
    install(monkeypatch, tensorrt="11.4.0.106")
    build_engines(machines("builder"), "tensorrt", options=lean, store=url)
    install(monkeypatch, tensorrt_lean_bindings="11.4.0.106")
    service = machines("service")
    with pytest.raises(NotInstalledError, match=r"'tensorrt'.*pip install 'latentrt\[tensorrt\]'"):
        build_engines(service, "tensorrt", options=lean)
    build_engines(service, "tensorrt", options=lean, store=url)
    directory, record = find_engines(service, "tensorrt")
    library = trt_library.runtime_of("tensorrt", record.key)
    assert library is not None and library.__name__ == "tensorrt_lean_bindings"
    assert directory.name == record.key.directory


def test_what_is_not_there_is_not_built_where_only_fetching_was_asked(
    url: str, machines: Callable[[str], Bundle], no_building: Callable[[], None]
) -> None:
    no_building()
    with pytest.raises(EngineError, match=r"\(cpu-.*--fetch-only"):
        build_engines(machines("one"), "cpu", store=url, fetch_only=True)
    with pytest.raises(RequestError, match="--store URL"):
        build_engines(machines("two"), "cpu", fetch_only=True)


class CutError(Exception):
    """The machine goes down."""


@pytest.mark.parametrize("after", [0, 1, 3])
def test_publishing_that_is_cut_off_is_never_fetched_and_can_be_done_again(
    after: int, url: str, machines: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Store._put
    left = [after]

    def cut(store: Store, path: str, source: Path) -> None:
        if not left[0]:
            raise CutError
        left[0] -= 1
        put(store, path, source)

    first, second = machines("first"), machines("second")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_put", cut)
        with pytest.raises(EngineError, match=r"^--store: .*\(CutError\b"):
            build_engines(first, "cpu", store=url)
    _, record = find_engines(first, "cpu")
    assert not Store(url).holds(record.key)
    build_engines(second, "cpu", store=url)  # it builds its own, and publishes that
    assert Store(url).holds(record.key)


def test_an_upload_that_was_cut_in_the_middle_of_a_file_is_done_again(
    machines: Callable[[str], Bundle], tmp_path: Path
) -> None:
    first, second = machines("first"), machines("second")
    record = build_engines(first, "cpu")
    file = record.files[record.entries["unet"]]
    half = tmp_path / "shelf" / "sha256" / file.sha256
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    url = str(tmp_path / "shelf")
    build_engines(first, "cpu", store=url)
    build_engines(second, "cpu", store=url, fetch_only=True)
    assert all(row.ok for row in verify(second, backend="cpu"))


def test_two_builders_publish_at_once_and_what_is_fetched_is_whole(url: str, machines: Callable[[str], Bundle]) -> None:
    bundles = [machines(name) for name in ("a", "b")]
    errors: list[BaseException] = []

    def build(bundle: Bundle) -> None:
        try:
            build_engines(bundle, "cpu", store=url, force=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(bundle,)) for bundle in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    third = machines("c")
    build_engines(third, "cpu", store=url, fetch_only=True)
    assert all(row.ok for row in verify(third, backend="cpu"))


def spoil(url: str, record: EngineRecord, change: str) -> None:
    """Alter what lies in a store."""
    files, root = fsspec.url_to_fs(url)
    path = f"{root}/{record.key.directory}/{ENGINE_RECORD}"
    document = json.loads(files.cat_file(path))
    unet = record.entries["unet"]
    content = f"{root}/sha256/{record.files[unet].sha256}"
    if change == "altered":
        files.pipe_file(content, b"\x00" * record.files[unet].bytes)
    elif change == "truncated":
        files.pipe_file(content, files.cat_file(content)[:100])
    elif change == "missing":
        files.rm_file(content)
    elif change == "leads outside":
        document["files"]["../../../escaped"] = document["files"][unet]
    elif change == "absolute":
        document["files"]["/tmp/escaped"] = document["files"][unet]
    elif change == "no hash":
        document["files"][unet]["sha256"] = "../../../etc/passwd"
    elif change == "another key":
        document["key"]["device"] = "another machine"
    elif change == "unknown field":
        document["run"] = "me"
    if document != json.loads(files.cat_file(path)):
        files.pipe_file(path, json.dumps(document).encode())
    if change == "half a record":
        files.pipe_file(path, files.cat_file(path)[:200])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("altered", r" unet\.onnx .* --store$"),
        ("truncated", r" unet\.onnx .* --store$"),
        ("missing", r"^--store: .* --store$"),
        ("leads outside", r"'\.\./\.\./\.\./escaped'"),
        ("absolute", "'/tmp/escaped'"),
        ("no hash", r"'\.\./\.\./\.\./etc/passwd'"),
        ("another key", r"\(device: .* here, another machine there\)"),
        ("unknown field", r" \$\.run: "),
        ("half a record", "JSON"),
    ],
)
def test_what_a_store_holds_is_not_trusted(
    change: str, told: str, url: str, machines: Callable[[str], Bundle], tmp_path: Path
) -> None:
    first, second = machines("first"), machines("second")
    spoil(url, build_engines(first, "cpu", store=url), change)
    with pytest.raises(LatentrtError, match=told):
        build_engines(second, "cpu", store=url)
    assert not (second.root / "engines").exists() or not list((second.root / "engines").iterdir())
    assert not list(tmp_path.rglob("escaped")) and not Path("/tmp/escaped").exists()


def test_a_full_disk_is_not_blamed_on_the_store(
    machines: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    url = str(tmp_path / "shelf")
    build_engines(machines("first"), "cpu", store=url)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "get_file", full)
    with pytest.raises(BundleError, check=caused_by(errno.ENOSPC)):
        build_engines(machines("second"), "cpu", store=url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nowhere://shelf", r"^--store: nowhere://shelf .*\(.*nowhere"),
        ("http://127.0.0.1:9/shelf", r"^--store: http://127\.0\.0\.1:9/shelf "),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence(
    url: str, told: str, machines: Callable[[str], Bundle], no_building: Callable[[], None]
) -> None:
    no_building()
    with pytest.raises(EngineError, match=told):
        build_engines(machines("one"), "cpu", store=url)


def test_without_fsspec_the_error_is_the_install_command(
    machines: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(NotInstalledError, match=r"^--store .*\bfsspec\b.*pip install 'latentrt\[store\]'"):
        build_engines(machines("one"), "cpu", store="file:///tmp/none")


def test_the_command_publishes_and_fetches(machines: Callable[[str], Bundle], tmp_path: Path) -> None:
    url = str(tmp_path / "shelf")
    first, second = machines("first"), machines("second")
    for bundle, further in ((first, []), (second, ["--fetch-only"])):
        words = [str(bundle.root), "--backend", "cpu", "--store", url, "--json", *further]
        result = CliRunner().invoke(build_command, words)
        assert result.exit_code == 0, result.output
    assert names(first) == names(second)
