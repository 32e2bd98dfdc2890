"""Checkpoints of the hub, fetched by its real client from a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.hub_cache import REVISION

PROGRAM = """
import logging, sys
from latentrt.engines.errors import LatentrtError
from latentrt.export.sources.hub import download
logging.basicConfig(format="%(levelname)s %(message)s")
try:
    print(download("user/model", revision=None))
except LatentrtError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(2)
"""
FILES: Mapping[str, bytes] = {
    "model_index.json": b"{}",
    "README.md": b"# a model",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"text",
    "text_encoder/pytorch_model.bin": b"pickle",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
    "safety_checker/model.safetensors": b"checker",
}


@dataclass
class Hub:
    """What the server was asked for. status: what it answers to everything, 200 for what was asked"""

    address: str = ""
    status: int = 200
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub() -> Iterator[Hub]:
    told = Hub()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.asked.append(self.path)
            if told.status != 200:
                self._answer(told.status, b"{}")
            elif "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": "0"} for name in FILES]
                self._answer(200, json.dumps(tree).encode())
            elif self.path.startswith("/api/models/user/model"):
                siblings = [{"rfilename": name} for name in FILES]
                document = {"id": "user/model", "sha": REVISION, "siblings": siblings, "tags": []}
                self._answer(200, json.dumps(document).encode())
            elif "/resolve/" not in self.path:
                self._answer(404, b"{}")
            else:
                content = FILES[self.path.partition(f"/resolve/{REVISION}/")[2]]
                self._answer(200, content, hashlib.sha256(content).hexdigest())

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, body: bytes, etag: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if etag is not None:
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        told.address = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield told
        server.shutdown()


def fetch(address: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Fetch user/model in a process of its own: the client reads its environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = {**inherited, "HF_ENDPOINT": address, "HF_HUB_CACHE": str(cache), **environment}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def fetched(root: str) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


def test_what_the_export_reads_is_fetched_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    run = fetch(hub.address, tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    others = {"README.md", "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors"}
    assert fetched(run.stdout.strip()) == set(FILES) - others - {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert not any(path.endswith(tuple(others)) for path in hub.asked)


@pytest.mark.parametrize("status", [None, 500, 503])
def test_a_hub_that_does_not_answer_leaves_what_was_fetched_before_and_that_is_said(
    hub: Hub, tmp_path: Path, status: int | None
) -> None:
    """It is asked once: the client's own five further tries are 23 silent seconds."""
    before = fetch(hub.address, tmp_path).stdout
    hub.asked.clear()
    hub.status = status or 200
    run = fetch(hub.address if status else "http://127.0.0.1:9", tmp_path)
    assert (run.returncode, run.stdout) == (0, before)
    assert run.stderr.startswith("WARNING")
    assert "user/model" in run.stderr
    assert REVISION in run.stderr
    assert [path for path in hub.asked if path.startswith("/api/models/")] == ["/api/models/user/model"] * bool(status)


def test_who_asks_for_no_network_is_not_warned_of_it(hub: Hub, tmp_path: Path) -> None:
    before = fetch(hub.address, tmp_path).stdout
    run = fetch(hub.address, tmp_path, HF_HUB_OFFLINE="1")
    assert (run.returncode, run.stdout, run.stderr) == (0, before, "")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_refuses_is_not_taken_from_what_was_fetched_before(hub: Hub, tmp_path: Path, status: int) -> None:
    fetch(hub.address, tmp_path)
    hub.status = status
    run = fetch(hub.address, tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("CheckpointError")
    assert str(status) in run.stderr


def test_a_hub_that_does_not_answer_for_what_was_never_fetched_is_asked_again_and_then_one_sentence(
    hub: Hub, tmp_path: Path
) -> None:
    hub.status = 503
    run = fetch(hub.address, tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("CheckpointError")
    assert run.stderr.count("\n") == 1
    assert sum(path.startswith("/api/models/user/model") for path in hub.asked) > 1


def test_a_cache_that_cannot_be_written_is_not_the_networks_fault(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    run = fetch(hub.address, tmp_path / "cache")
    assert run.returncode == 2
    assert run.stderr.startswith("CheckpointError")
    assert str(tmp_path / "cache") in run.stderr
    assert run.stderr.count("\n") == 1
