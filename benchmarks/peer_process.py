"""A peer's process, and the picture that it draws of the same noise as we do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from peer_install import own_environment, say
from peer_tables import ENVIRONMENTS, PEERS, ROOT, PeerError
from PIL import Image

Array = np.ndarray[Any, Any]
WORKER = Path(__file__).with_name("peer_worker.py")
LOAD_S, DRAW_S = 1800.0, 900.0
PLACES = ("checkpoint", "bundle", "cache", "tiny", "threads")  # of a job: what does not change its picture


class Worker:
    """A peer's process: `draw` asks it for one batch. environment: another one than its own"""

    def __init__(self, name: str, job: Mapping[str, Any], cache: Path, environment: str | None = None) -> None:
        self.name = name
        self.log = cache / f"{name}.log"
        self.peak_rss_bytes: int | None = None
        python = cache / "environments" / (environment or PEERS[name].environment) / "bin" / "python"
        say(f"{name}: loading")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), str(WORKER), name, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**own_environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])},
            )
        try:
            self.load_s = float(self._answer(LOAD_S)["load_s"])
        except PeerError:
            self.close()
            raise

    def draw(self) -> tuple[float | None, list[float]]:
        """Return the seconds of a batch, None if there are steps alone, and those of its steps."""
        told = self._ask("draw")
        return told["seconds"], told["steps"]

    def picture(self, file: Path) -> None:
        """Write the bytes of the first picture of the prompt itself, of torch's noise."""
        self._ask(f"picture {file}")

    def seconds(self) -> float:
        """Draw, and return the seconds of the batch, or of its steps."""
        seconds, steps = self.draw()
        return sum(steps) if seconds is None else seconds

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        told = self._answer(DRAW_S)
        self.peak_rss_bytes = told["peak_rss_bytes"]
        return told

    def _answer(self, most_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], most_s)
        if not ready:
            self.close()
            raise PeerError(f"no answer within {most_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise PeerError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        told = self.log.read_text(errors="replace").replace(f"{ROOT}/", "")
        lines = [line for line in told.splitlines() if line.strip()]
        return f"ended with code {self._process.poll()}: {' | '.join(lines[-2:])[:300]}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not sent any more
                    pipe.close()


def draw_picture(name: str, job: Mapping[str, Any], cache: Path, worker: Worker | None = None) -> Array | None:
    """Return a peer's picture, once drawn for a job: (height, width, 3), uint8. None for one that draws none.

    worker: one that draws it anew; otherwise a process of the peer's own, where no earlier one has drawn it
    """
    if name == "plain":
        return None
    what = [
        {key: value for key, value in job.items() if key not in PLACES},
        ENVIRONMENTS[PEERS[name].environment].installs,
    ]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(job["cache"]) / "pictures" / f"{name}-{digest}"
    file.parent.mkdir(parents=True, exist_ok=True)
    if worker is not None:
        worker.picture(file)
    elif not file.is_file():
        made = Worker(name, job, cache, PEERS[name].draws)
        try:
            made.picture(file)
        finally:
            made.close()
    pixels = np.frombuffer(file.read_bytes(), np.uint8).reshape(job["height"], job["width"], 3)
    Image.fromarray(pixels).save(file.with_suffix(".png"))
    return pixels


def decibels(ours: Array, theirs: Array) -> float:
    """Return the peak signal-to-noise ratio of two pictures of 8 bits; 99 where they are the same."""
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255.0**2 / error))
