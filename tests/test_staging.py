"""Work beside its place: by one living process at a time, and the next one removes what a killed one left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentrt.engines.build import build_engines
from latentrt.engines.bundle import staging
from latentrt.engines.bundle.files import Bundle, atomic_write, write_manifest
from latentrt.engines.bundle.staging import (
    LOCK,
    PARTIAL,
    can_hold,
    claimed,
    partial,
    publish,
    staged,
    staged_file,
    sweep,
)
from latentrt.engines.errors import BundleError
from latentrt.engines.find import find_engines
from latentrt.engines.verify.verify import verify
from tests.refused import caused_by

HOLD = """
import sys, time
from pathlib import Path
from latentrt.engines.bundle.staging import staged
with staged(Path(sys.argv[1]), sys.argv[2]) as directory:
    (directory / "half").write_text("work")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bare(sd1_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle without engines."""
    root = shutil.copytree(sd1_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    return Bundle.open(root)


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        kill(process)


def hold(target: Path, key: str) -> subprocess.Popen[str]:
    """Start a process that is at work beside a target."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(target), key], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)  # nothing, where it was killed before
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_same_work_finds_its_staging_directory_again(tmp_path: Path) -> None:
    found = []
    for key in ("a" * 64, "a" * 64, "b" * 64):
        with staged(tmp_path / "bundle", key) as directory:
            found.append(directory)
    assert found[0] == found[1] != found[2]
    assert sorted(tmp_path.iterdir()) == sorted(set(found))  # and no locks


def test_publishing_replaces_the_old_directory_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for content, overwrite, expected in (("old", False, "old"), ("lost", False, "old"), ("new", True, "new")):
        with staged(target, content) as directory:
            (directory / "file").write_text(content)
            publish(directory, target, overwrite=overwrite)
        assert (target / "file").read_text() == expected
        assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("kind", ["directory", "file"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "in two steps"])
def test_whatever_stands_there_is_replaced(
    exchanges: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    target = tmp_path / "bundle"
    target.mkdir() if kind == "directory" else target.touch()
    with staged(target, "new") as directory:
        (directory / "file").write_text("new")
        publish(directory, target, overwrite=True)
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("step", ["_exchange", "_put_aside"])
def test_what_is_about_to_take_its_place_is_not_swept_away(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(staging, step)

    def swept(one: Path, other: Path) -> object:
        sweep(other.parent)
        return real(one, other)

    if step == "_put_aside":
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(staging, step, swept)
    target = tmp_path / "bundle"
    for content in ("old", "new"):
        with staged(target, content) as directory:
            (directory / "file").write_text(content)
            publish(directory, target, overwrite=True)
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "in two steps"])
@pytest.mark.parametrize("stays", [False, True], ids=["once", "for good"])
def test_a_rename_that_fails_leaves_the_old_directory_in_its_place(
    exchanges: bool, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file system that cannot exchange, one that fails for good between the two steps has no way back."""
    for name in ("one", "other"):
        (tmp_path / "probe" / name).mkdir(parents=True)
    if exchanges and not staging._exchange(tmp_path / "probe" / "one", tmp_path / "probe" / "other"):
        pytest.skip("the file system of temporary files cannot exchange two directories")
    calls, failing = 0, 0

    def counted(real: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def call(one: Path, other: Path) -> object:
            nonlocal calls
            calls += 1
            if failing and (calls == failing or (stays and calls > failing)):
                raise OSError(errno.EIO, "Input/output error", str(other))
            return real(one, other)

        return call

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(staging, "_exchange", counted(staging._exchange) if exchanges else lambda one, other: False)
    told: list[bool] = []
    while not told or told[-1]:
        target, failing, calls = tmp_path / str(len(told)) / "bundle", 0, 0
        for content in ("old", "new"):
            with staged(target, content) as directory:
                (directory / "file").write_text(content)
                if content == "old":
                    publish(directory, target)
                    continue
                calls, failing = 0, len(told) + 1
                with contextlib.suppress(BundleError):
                    publish(directory, target, overwrite=True)
        told.append(calls >= failing)
        there = (target / "file").read_text() if target.exists() else "nothing"
        between = not exchanges and stays and failing == 4
        assert there == ("nothing" if between else "old" if told[-1] else "new")
        sweep(target.parent)
        assert names(target.parent) == ([] if between else ["bundle"])
    assert len(told) == (4 if exchanges else 5)


def test_a_path_is_held_by_one_thread_at_a_time(tmp_path: Path) -> None:
    inside, most, path = 0, 0, partial(tmp_path / "x", "key")

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with claimed(path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert names(tmp_path) == []


def test_what_a_living_process_prepares_is_left_alone_until_it_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    living, dying = hold(tmp_path / "a", "living"), hold(tmp_path / "b", "dying")
    processes += [living, dying]
    kill(dying)
    (tmp_path / f".old{PARTIAL}of-a-version-without-locks").mkdir()
    (tmp_path / "plain").mkdir()
    sweep(tmp_path)
    mine = partial(tmp_path / "a", "living").name
    assert names(tmp_path) == [mine, mine + LOCK, "plain"]
    sweep(tmp_path, "b")
    kill(living)
    sweep(tmp_path, "b")
    assert names(tmp_path) == [mine, mine + LOCK, "plain"]
    sweep(tmp_path, "a")
    assert names(tmp_path) == ["plain"]


def test_the_next_one_takes_over_from_a_killed_process(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    first = hold(tmp_path / "a", "key")
    processes.append(first)
    threading.Timer(0.3, first.kill).start()
    start = time.monotonic()
    with staged(tmp_path / "a", "key") as directory:  # waits until then
        assert time.monotonic() - start > 0.25
        assert (directory / "half").read_text() == "work"


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    (tmp_path / ".file.part").write_text("what a killed process left")
    with pytest.raises(ValueError), staged_file(file) as beside:
        beside.write_text("half")
        raise ValueError
    assert file.read_text() == "old"
    with staged_file(file) as beside:
        beside.write_text("new")
    assert file.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(BundleError, check=caused_by(errno.ENOLCK)), staged(tmp_path / "bundle", "key"):
        raise AssertionError("it was begun")
    assert not can_hold(tmp_path)


def build(bundle: Bundle, *further: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "latentrt", "build", str(bundle.root), "--backend", "cpu", *further]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def build_and_kill(bundle: Bundle, after: float, *further: str) -> bool:
    """Start a build and kill it some time after it began to write; tell whether it was still at work."""
    process = build(bundle, *further)
    assert process.stderr is not None and process.stderr.readline().startswith("build text_encoder")
    time.sleep(after)
    at_work = process.poll() is None
    kill(process)
    return at_work


@pytest.mark.parametrize(
    "kills",
    [4, pytest.param(60, marks=pytest.mark.slow(reason="sixty builds"))],
)
def test_killed_builds_leave_nothing_once_one_was_finished(bare: Bundle, tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    store = ["--store", str(tmp_path / "store")]
    waits = [*(chance.uniform(0, 0.4) for _ in range(kills - 1)), 0]  # the last one is at its beginning
    killed = [build_and_kill(bare, wait, "--force", *store) for wait in waits]
    assert sum(killed) >= kills // 2
    assert list((bare.root / "engines").glob(f".*{PARTIAL}*"))
    record = build_engines(bare, "cpu", store=store[1])
    assert names(bare.root / "engines") == [record.key.directory]
    assert all(row.ok for row in verify(bare, backend="cpu"))


def test_the_folder_of_a_killed_build_is_never_taken_for_engines(bare: Bundle) -> None:
    record = build_engines(bare, "cpu")
    directory, _ = find_engines(bare, "cpu")
    left = shutil.copytree(directory, partial(directory, "killed"))
    write_manifest(left, record)
    assert list(bare.engine_directories()) == [directory]
    assert build_engines(bare, "cpu") == record
    assert names(bare.root / "engines") == [record.key.directory]


def test_of_two_processes_that_build_the_same_one_builds_and_the_other_takes_that(bare: Bundle) -> None:
    both = [build(bare, "--json"), build(bare, "--json")]
    first, second = (json.loads(process.communicate()[0]) for process in both)
    assert first == second  # the seconds that the build took are in it
    assert names(bare.root / "engines") == [Path(next(iter(bare.engine_directories()))).name]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """So is /dev/null, for whoever is root."""
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with atomic_write(pipe) as content:
        content.write_bytes(b"result")
    reader.join(60)
    assert read == [b"result"] and pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
