"""The export's process: what hangs is ended and says where, what is slow is not, what was given up answers nobody."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest

from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.export import _job
from latentrt.export.work import worker
from latentrt.export.work.finished import MARKERS
from latentrt.export.work.jobs import ExportJob

SLOW = "text_encoder"


class OutOfTimeError(Exception):
    """What a caller's time limit raises."""


@pytest.fixture
def jobs(sd1_bundle: Path, tmp_path: Path) -> tuple[ExportJob, ExportJob]:
    """Return a job that waits forever, because nobody writes into the pipe that it reads, and one that ends."""
    graphs = tmp_path / "graphs"
    shutil.copytree(sd1_bundle / "onnx", graphs)
    opened = open_checkpoint(str(graphs))
    (tmp_path / "staged" / MARKERS).mkdir(parents=True)
    ending = _job(opened, "vae_decoder", tmp_path / "staged", "fp32")
    waiting = _job(opened, SLOW, tmp_path / "staged", "fp32")
    folder = tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(folder / "model.onnx")
    return replace(waiting, folder=str(folder)), ending


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_job_that_hangs_is_ended_and_says_where_it_stood_and_the_next_one_runs(
    jobs: tuple[ExportJob, ExportJob],
) -> None:
    hanging, ending = jobs
    with worker.start_worker("onnx", patience_s=3.0) as process:
        with pytest.raises(RuntimeError) as caught:
            process.run(hanging)
        assert " 3 s" in str(caught.value) and SLOW in str(caught.value)
        assert "in adopt_graph" in str(caught.value)  # the child's own stack
        assert process.run(ending).component == ending.component


@pytest.mark.parametrize("busy", [True, False])
def test_what_computes_longer_than_the_patience_is_only_slow(busy: bool) -> None:
    program = "while time.process_time() < 2.5: pass" if busy else "time.sleep(600)"
    command = [sys.executable, "-c", f"import time\n{program}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert worker._watch(child.stdout, child.pid, 1.0) is busy
    assert (child.returncode == 0) is busy


@pytest.mark.usefixtures("alarm")
def test_a_request_that_was_given_up_says_how_long_and_is_never_answered(jobs: tuple[ExportJob, ExportJob]) -> None:
    hanging, ending = jobs
    with worker.start_worker("onnx") as process:
        process.run(ending)
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(OutOfTimeError) as caught:
            process.run(hanging)
        (note,) = caught.value.__notes__
        assert SLOW in note and "adopt" in note and "load" in note
        with pytest.raises(RuntimeError, match="ended"):
            process.run(ending)


@pytest.mark.usefixtures("alarm")
def test_an_answer_that_comes_late_is_not_the_next_one(
    jobs: tuple[ExportJob, ExportJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer lies in the pipe before the process can be ended."""
    _, ending = jobs
    other = replace(ending, component="vae_encoder", folder=ending.folder.replace("decoder", "encoder"))
    with worker.start_worker("onnx") as process:
        process.run(ending)
        read = process._process.stdout
        assert read is not None

        class Interrupted:
            def __iter__(self) -> Iterator[str]:
                raise OutOfTimeError

        with monkeypatch.context() as patch:
            patch.setattr(process._process, "stdout", Interrupted())
            patch.setattr(process._process, "kill", lambda: None)
            with pytest.raises(OutOfTimeError):
                process.run(other)
        assert process.run(ending).component == ending.component
