"""The service under long use: a process of its own, asked over HTTP by many threads, some of which hang up."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
from benchmarks.torture.soak import THREADS, Asker, Early, Found, Mode, measure
from benchmarks.torture.watch import end_of
from PIL import Image

from latentrt.engines.errors import CancelledError, DeadlineError, RequestError
from latentrt.runtime.calls import Cancellation
from latentrt.runtime.request import Control, Lora, Request

HANGS_UP_S = 0.05
ANSWERS_S = 300.0
PLAIN = ("prompt", "n", "steps", "seed", "sampler", "guidance", "strength", "deadline")


@contextlib.contextmanager
def service(bundle: Path, loras: Path, log: Path) -> Iterator[dict[str, Any]]:
    """Start `latentrt serve`; give its address and process. It must end in order."""
    command = [sys.executable, "-m", "latentrt", "serve", str(bundle), "--port", "0", "--json", "--threads", "1"]
    further = ["--slots", "4", "--waiting", str(4 * THREADS), "--loras", str(loras), "--max-connections", "500"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*command, *further], stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True
        )
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield {**ready, "pid": process.pid}
        finally:
            process.send_signal(signal.SIGTERM)
            ended = end_of(process)
    assert ended is not None and process.returncode == 0, f"the service ended with {process.returncode}"


def png(pixels: Any) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, format="PNG")
    return file.getvalue()


def fields(request: Request) -> dict[str, Any]:
    """Return a request as the fields that the service takes, but for an image to start from."""
    found = {name: getattr(request, name) for name in PLAIN}
    if request.size is not None:
        found["size"] = "x".join(map(str, request.size))
    found["loras"] = [
        {"name": Path(one.file).stem, "scale": one.scale} for one in request.loras if isinstance(one, Lora)
    ]
    controls = [one for one in request.controls if isinstance(one, Control)]
    found["controls"] = [{"name": one.name, "image": base64.b64encode(png(one.image)).decode()} for one in controls]
    return {name: value for name, value in found.items() if value not in (None, [])}


def send(session: requests.Session, address: str, request: Request, timeout: float) -> requests.Response:
    """Ask for pictures; an image to start from is a file of a form."""
    sent = fields(request)
    if request.image is None:
        return session.post(f"{address}/v1/images/generations", json=sent, timeout=timeout)
    files = {"image": ("a.png", png(request.image), "image/png")}
    if request.mask is not None:
        files["mask"] = ("m.png", _transparent(request.mask), "image/png")
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in sent.items()}
    return session.post(f"{address}/v1/images/edits", data=form, files=files, timeout=timeout)


def _transparent(mask: Any) -> bytes:
    """Return a mask as OpenAI's clients send it: transparent where it is repainted."""
    alpha = np.where(np.asarray(mask) >= 128, 0, 255).astype(np.uint8)
    return png(np.dstack([alpha * 0, alpha * 0, alpha * 0, alpha]))


class Client:
    """One thread's connection."""

    def __init__(self, address: str) -> None:
        self._address, self._session = address, requests.Session()

    def __call__(self, request: Request, cancel: Cancellation) -> Any:
        """Return the pixels. Raises as `Pipeline.draw` does; one that is to be cancelled hangs up."""
        timeout = HANGS_UP_S if isinstance(cancel, Early) else ANSWERS_S
        for _ in range(1000):
            try:
                answer = send(self._session, self._address, request, timeout)
            except requests.Timeout:
                raise CancelledError("hung up") from None
            if answer.status_code != 429:
                break
            time.sleep(0.05)
        if answer.status_code == 200:
            files = [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]
            return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        kind = {504: DeadlineError, 499: CancelledError, 400: RequestError}.get(answer.status_code)
        if kind is None:
            raise AssertionError(f"status {answer.status_code}: {answer.text[:300]}")
        raise kind(answer.text[:300])


def measure_service(
    bundle: Path, known: list[tuple[Request, Any]], work: Path, seconds: float, seed: int
) -> tuple[Mode, list[Found]]:
    """Ask a service for some seconds, and look at its process meanwhile."""
    log = work / "service.log"
    with service(bundle, work, log) as started:
        askers = [Asker(known, Client(started["address"]), f"{seed} service {n}") for n in range(THREADS)]
        done, found = measure("service", started["pid"], askers, seconds)
    if "Traceback" in (said := log.read_text(errors="replace")):
        found.append(Found(mode="service", what=f"its log: {said[-1500:]}"))
    return done, found
