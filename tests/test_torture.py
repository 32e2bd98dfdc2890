"""What `make torture` tries, in pieces that are quick, and what it has found: each of these failed before."""

from __future__ import annotations

import errno
import io
import json
import math
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks.torture import watch
from benchmarks.torture.__main__ import PARTS
from benchmarks.torture.devices import WAYS, Machine, Row, trial
from benchmarks.torture.page import PAGE, reports, with_table
from benchmarks.torture.process import try_program
from benchmarks.torture.reading.files import Altered
from benchmarks.torture.reading.reads import KEPT, State, attempt, try_target
from benchmarks.torture.reading.targets import TARGETS
from benchmarks.torture.soak import slope
from benchmarks.torture.sources import Sources
from benchmarks.torture.writing.layer import compiled, layer
from benchmarks.torture.writing.writes import Fault, Trial, distinct, faults, try_scene
from safetensors.numpy import save_file

from latentrt.__main__ import Refusal, refused
from latentrt.engines.build import build_engines
from latentrt.engines.bundle.files import Bundle, check_file, record_file
from latentrt.engines.bundle.safetensors_header import read_header, weights_format
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import _publish
from latentrt.export.graphs.golden import load_golden, save_golden
from latentrt.export.options import CheckpointOptions
from latentrt.export.work.finished import MARKERS
from latentrt.export.work.jobs import ExportJob, run_job
from latentrt.runtime.calls import Turn
from latentrt.runtime.serve.openai.store import put
from tests.refused import caused_by


@pytest.fixture(autouse=True)
def _compiler() -> None:
    try:
        compiled()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("scene", ["fetch", "fetch into the cache", "publish"])
def test_a_write_that_fails_leaves_the_old_state_one_sentence_and_a_rerun_that_works(
    scene: str, sd1_bundle: Path, tmp_path: Path
) -> None:
    store = tmp_path / "shelf"
    build_engines(Bundle.open(sd1_bundle), "cpu", store=str(store))
    given = Sources(checkpoint=sd1_bundle, bundle=sd1_bundle, other=sd1_bundle, store=store)
    with layer(tmp_path / "work", with_torch=False) as there:
        trial = Trial(scene, given, there)
        drawn = faults(distinct(trial.calls), random.Random(3))
        one_of_each = {fault.kind: fault for fault in drawn}
        assert {"create", "mkdir", "open", "rename", "sync", "write"} <= one_of_each.keys()
        for fault in one_of_each.values():
            (came, said), *wrong = trial.check(fault)
            assert wrong == [], fault
            assert came == "passed" or "latentrt: " in said


def test_a_run_in_the_long_form_goes_on_where_the_last_one_of_its_seed_stopped(
    sd1_bundle: Path, tmp_path: Path
) -> None:
    given = Sources(checkpoint=sd1_bundle, bundle=sd1_bundle, other=sd1_bundle, store=tmp_path / "none")
    with layer(tmp_path / "work", with_torch=False) as there:
        trial, kept = Trial("keep a picture", given, there), tmp_path / "kept.json"
        assert [try_scene(trial, 1, kept, until=0.0).tried for _ in range(2)] == [1, 2]
        whole = try_scene(trial, 1, kept, until=math.inf)
        assert whole.tried == whole.distinct == whole.refused + whole.passed > 2
        assert try_scene(trial, 1, kept, until=math.inf) == whole
        assert try_scene(trial, 2, kept, until=0.0).tried == 1


def test_engines_that_went_into_the_cache_are_gone_when_the_next_call_fails(sd1_bundle: Path, tmp_path: Path) -> None:
    """Else its rerun found them there and left the bundle without, whatever had failed."""
    build_engines(Bundle.open(sd1_bundle), "cpu", store=str(tmp_path / "shelf"))
    given = Sources(checkpoint=sd1_bundle, bundle=sd1_bundle, other=sd1_bundle, store=tmp_path / "shelf")
    with layer(tmp_path / "work", with_torch=False) as there:
        trial = Trial("fetch", given, there)
        for kind, error, comes in (("mkdir", errno.EACCES, "passed"), ("rename", errno.EIO, "refused")):
            call = next(call for call in trial.calls if call.kind == kind)
            fault = Fault(number=call.number, kind=kind, path=call.path, error=error, stays=False)
            (came, _), *wrong = trial.check(fault)
            assert (came, wrong) == (comes, [])


class Unreadable:
    """Stands for a disk that gives an I/O error: permissions do not hold for who is root."""

    def __init__(self, patch: pytest.MonkeyPatch, file: Path) -> None:
        real = io.open

        def fails(path: object, *arguments: object, **options: object) -> object:
            if str(path) == str(file):
                raise OSError(errno.EIO, "Input/output error", str(file))
            return real(path, *arguments, **options)  # type: ignore[call-overload]

        patch.setattr(io, "open", fails)


def test_a_file_of_a_bundle_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    record = record_file(tmp_path, "file")
    Unreadable(monkeypatch, tmp_path / "file")
    with pytest.raises(BundleError):
        check_file(tmp_path, "file", record, check="hash")


@pytest.mark.parametrize("read", [weights_format, read_header], ids=lambda read: read.__name__)
def test_weights_that_cannot_be_read_are_one_sentence(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, file)
    read(file)
    Unreadable(monkeypatch, file)
    with pytest.raises(CheckpointError):
        read(file)


def test_goldens_that_cannot_be_written_or_read_are_errors_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors' own functions for files have errors of their own for a full disk, which were tracebacks."""
    file, arrays = tmp_path / "golden.safetensors", {"x": np.ones(3, np.float32)}
    save_golden(file, arrays, arrays)
    Unreadable(monkeypatch, file)
    for action in (lambda: save_golden(file, arrays, arrays), lambda: load_golden(file)):
        with pytest.raises(OSError) as caught:
            action()
        assert caught.value.errno == errno.EIO


def test_a_note_of_an_export_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    job = ExportJob(
        component="unet",
        row="unet",
        source="torch",
        folder="",
        root=str(tmp_path),
        precision="fp16",
        dimensions={},
        scaling_factor=1.0,
        phase="narrow",
    )
    with pytest.raises(BundleError, match=rf"{MARKERS}/unet\.made\.json"):
        run_job(job)


def test_an_export_whose_notes_cannot_be_removed_is_not_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they were in the bundle for ever."""
    (tmp_path / "work" / MARKERS).mkdir(parents=True)

    def fails(path: Path, **options: object) -> None:
        if not options.get("ignore_errors"):
            raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(BundleError, check=caused_by(errno.EIO)):
        _publish(tmp_path / "work", tmp_path / "bundle", overwrite=False)
    assert not (tmp_path / "bundle").exists()


def test_a_picture_that_cannot_be_kept_for_its_address_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BundleError):
        put(tmp_path / "file", b"picture", "png")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_what_the_system_refuses_is_a_sentence_of_the_command_line(code: int) -> None:
    with pytest.raises(Refusal) as caught, refused(()):
        raise OSError(code, "no", "/some/file")
    assert caught.value.exit_code == 2 and "/some/file" in caught.value.message


def test_any_other_error_of_a_file_stays_a_bug() -> None:
    with pytest.raises(FileNotFoundError), refused(()):
        raise FileNotFoundError(errno.ENOENT, "no", "/some/file")


KEPT_FILES = sorted(path.name for path in KEPT.iterdir())


@pytest.mark.parametrize("name", KEPT_FILES)
def test_what_a_reader_once_failed_on_is_read_or_refused_in_one_sentence(
    name: str, sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    given = Sources(checkpoint=sd1_checkpoint, bundle=sd1_bundle, other=sd1_bundle, store=sd1_bundle)
    (target,) = [target for target in TARGETS if name.rpartition("-")[0] == target.replace(" ", "-")]
    _, wrong = attempt(TARGETS[target](given, tmp_path), (KEPT / name).read_bytes())
    assert wrong is None


@pytest.mark.parametrize("target", TARGETS)
def test_a_reader_reads_what_it_is_given_whole_and_refuses_much_of_what_is_changed(
    target: str, sd1_bundle: Path, sd1_checkpoint: Path, tmp_path: Path
) -> None:
    given = Sources(checkpoint=sd1_checkpoint, bundle=sd1_bundle, other=sd1_bundle, store=sd1_bundle)
    reader, state = TARGETS[target](given, tmp_path), State(seed=7)
    assert all(attempt(reader, data) == (True, None) for data in reader.seeds)
    try_target(target, reader, state, until=time.monotonic() + 60, most=20)
    assert state.found == [] and state.executions


def test_an_error_is_one_line_whatever_a_file_says() -> None:
    error = BundleError("a key\nthat\x00ends the line")
    assert str(error).isprintable() and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_altered_file_of_a_bundle_is_refused_or_harmless(sd1_bundle: Path, tmp_path: Path) -> None:
    altered = Altered("sd1", sd1_bundle, tmp_path / "altered")
    assert [found for number in range(12) for found in altered.attack(number, 5)] == []
    assert altered.counts["refused"] and altered.counts["verify_refused"]


def test_a_call_to_a_gpu_that_fails_is_told_and_the_next_one_works_or_is_told_why_not(
    sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, chance = Machine(monkeypatch, tmp_path, sd1_bundle), random.Random(2)
    for way in (*WAYS, "refused", "silent"):
        row, calls = Row(way=way), machine.tensorrt_calls if way in ("refused", "silent") else machine.cuda_calls
        for number in chance.sample(range(1, len(calls) + 1), 3):
            assert list(trial(machine, number, way, row)) == [], (way, number, calls[number - 1])
        assert row.failed == 3 and (row.restart if way in ("sticky", "forked") else row.next_works) == 3


@pytest.mark.parametrize("way", ["forked", "sticky"])
def test_a_gpu_that_is_lost_at_the_first_call_is_lost_at_the_next_load_too(
    way: str, sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    machine, row = Machine(monkeypatch, tmp_path, sd1_bundle), Row(way=way)
    assert machine.cuda_calls[0] == "create_stream"
    assert list(trial(machine, 1, way, row)) == [] and row.restart == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_slope_tells_growth_from_swinging() -> None:
    seconds = [float(second) for second in range(100)]
    noise = np.random.default_rng(1).normal(0, 1, 100)
    still, grows = (
        slope(seconds, noise.tolist()),
        slope(seconds, [0.2 * x + y for x, y in zip(seconds, noise, strict=True)]),
    )
    assert abs(still.drift) < still.spread and grows.drift > 2 * grows.spread


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    assert with_table(PAGE.read_text()) == PAGE.read_text()
    assert {report["part"] for report in reports()} == set(PARTS)


FORKED = """
import contextlib, os, sys, threading
from latentrt import Batcher, BatcherOptions, Pipeline, Request
from latentrt.errors import ClosedError
holding, done = threading.Event(), threading.Event()
with Pipeline.load(sys.argv[1], "cpu", threads=1) as pipe, Batcher(pipe, BatcherOptions(slots=2)) as batcher:
    def hold():
        with batcher._line.change:
            holding.set()
            done.wait()
    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(ClosedError):
            batcher.submit(Request(prompt="a"))
            os._exit(1)
        batcher.close()
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    holder.join()
sys.exit(ended)
"""


def test_a_batcher_in_a_fork_is_refused_whatever_its_thread_held_then(sd1_bundle: Path) -> None:
    """In a program of its own: to fork the process of the whole suite takes more memory than there may be."""
    command = [sys.executable, "-c", FORKED, str(sd1_bundle)]
    with subprocess.Popen(command, text=True, start_new_session=True) as program:
        assert watch.end_of(program) is not None, "it waited for ever"
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "trained_betas", True),
        ("text_encoder/config.json", "architectures", [["CLIPTextModel"]]),
        ("text_encoder/config.json", "architectures", 1),
    ],
)
def test_values_of_another_kind_in_a_checkpoints_configs_are_refused(
    sd1_checkpoint: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    copy = shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint")
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(copy), options=CheckpointOptions())


def test_a_class_that_is_no_name_is_one_that_nobody_knows(sd1_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint")
    index = json.loads((copy / "model_index.json").read_text())
    found = []
    for name in ("Somebody's", {"a": 1}):
        (copy / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", name]}))
        found.append(open_checkpoint(str(copy), options=CheckpointOptions()).family)
    assert found == ["sd1", "sd1"]


def test_the_turn_goes_to_who_has_waited_longest_and_not_to_who_had_it_last() -> None:
    turn, order, threads = Turn(), list[int](), list[threading.Thread]()

    def wait(number: int) -> None:
        with turn.hold():
            order.append(number)

    with turn.hold():
        for number in range(20):
            threads.append(threading.Thread(target=wait, args=(number,)))
            threads[-1].start()
            while len(turn._line) <= number:
                time.sleep(0.001)
    wait(20)
    for thread in threads:
        thread.join()
    assert order == [*range(21)]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("import threading; threading.Event().wait()", None),
        ("import time\nwhile time.process_time() < 3: pass", 0),
        ("import os, time\nif os.fork(): os.wait()\nelse:\n while time.process_time() < 3: pass", 0),
    ],
    ids=["waits for ever", "works", "waits for one that works"],
)
def test_what_waits_for_ever_is_told_from_what_works_for_long(
    body: str, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STILL_S", 2.0)
    with subprocess.Popen([sys.executable, "-c", body], text=True, start_new_session=True) as program:
        ended = watch.end_of(program)
    assert (ended is None) == (code is None) and program.returncode == (-9 if code is None else code)


ENDS = [
    "ends with a batcher at work",
    "forks while a thread draws, and the child uses that pipeline",
    "forks with a batcher at work, and the child ends",
]


@pytest.mark.parametrize("name", ENDS)
def test_a_program_that_forks_or_ends_while_it_draws_ends_in_order(name: str, sd1_bundle: Path) -> None:
    _, wrong, said = try_program(name, sd1_bundle)
    assert wrong is None, said
