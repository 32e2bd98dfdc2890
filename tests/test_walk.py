"""A newcomer's walk on each Python, with the wheel and in a clone: everything that README shows, from export to Ray.

Its environments, below .cache/, hold PyTorch as PyPI has it: 6 GB each. They are kept, and made again when
pyproject.toml changes. What is drawn must be what this environment draws.
"""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from latentrt import Control, Lora, Pipeline
from latentrt.engines.spec import Array
from tests.conftest import Controlled, MakeControlled
from tests.hub_cache import in_hub_cache
from tests.lora_files import every_layer, kohya, save
from tests.test_schema_1 import aged
from tests.test_service import LEAST_DB, PROMPT, ROOT, Service, kept_environment, outer, psnr, wheel

__all__ = ["wheel"]  # a fixture
pytestmark = pytest.mark.slow(reason="makes environments of 6 GB")
WAIT_S = 300
DRAWN: dict[str, Any] = {"steps": 3, "seed": 5, "size": (32, 32)}
ASKED: dict[str, Any] = {"prompt": "a red circle", "size": "32x32", "extra_body": {"steps": 3, "seed": 5}}
WITH: dict[str, tuple[str, ...]] = {
    "plain": (),
    "lora": ("--lora", "loras/style.safetensors:0.8"),
    "control": ("--control", "edges=plain.png:0.5"),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "latentrt"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(params=["3.11", "3.12", "3.13"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["wheel", "clone"])
def programs(request: pytest.FixtureRequest, version: str, wheel: Path) -> Path:
    """The programs of an environment with all that a walk needs, and latentrt from the wheel, or from a clone."""
    latentrt = [str(wheel)] if request.param == "wheel" else ["--editable", str(request.getfixturevalue("clone"))]
    return kept_environment(f"walk-{version}", version, (f"{wheel}[export,serve,ray]",), latentrt=latentrt)


@pytest.fixture(scope="module")
def own(controlled: MakeControlled) -> Controlled:
    return controlled("sd1", "")


@pytest.fixture
def walk(own: Controlled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """A folder to walk in, with a checkpoint in a hub's cache and a LoRA; the pictures that are to be drawn there."""
    monkeypatch.chdir(tmp_path)
    in_hub_cache(own.checkpoint, tmp_path / "hub", repository="models--user--name")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "loras").mkdir()
    style = save(tmp_path / "loras" / "style.safetensors", kohya(every_layer(own.checkpoint, seed=3)))
    with Pipeline.load(own.bundle, "cpu") as pipe:
        plain = pipe(PROMPT[0], **DRAWN)
        loras = [Lora(file=style, scale=0.8)]
        controls = [Control(name="edges", image=plain.images[0], scale=0.5)]
        return {
            "plain": plain.pixels[0],
            "lora": pipe(PROMPT[0], loras=loras, **DRAWN).pixels[0],
            "control": pipe(PROMPT[0], controls=controls, **DRAWN).pixels[0],
        }


def near(found: Array, expected: Array) -> bool:
    return psnr(found, expected) >= LEAST_DB


def pixels(data: bytes | Path) -> Array:
    with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
        return np.asarray(image)


def test_a_newcomer_walks(programs: Path, own: Controlled, walk: dict[str, Array], tmp_path: Path) -> None:
    command = Service(bin=programs, cache=tmp_path / "cache")
    assert "can be exported" in command.run("inspect", "user/name")
    edges = ("--controlnet", f"edges={own.networks['edges']}", "--precision", "fp32")
    assert command.json("export", "user/name", "mine", *edges)["engines"]
    assert command.json("export", "user/name", "mine", *edges)["already_there"]
    for name, options in WITH.items():
        command.run("generate", "mine", *PROMPT, *options, "-o", f"{name}.png")
        assert near(pixels(tmp_path / f"{name}.png"), walk[name])
    assert not near(walk["plain"], walk["lora"])
    assert not near(walk["plain"], walk["control"])
    assert all(row["ok"] for row in command.json("verify", "mine"))

    aged(tmp_path / "mine", tmp_path / "old")
    command.run("generate", "old", *PROMPT, "-o", "old.png")
    assert near(pixels(tmp_path / "old.png"), walk["plain"])

    served_pictures(programs, walk)
    assert near(drawn_by_ray(programs, tmp_path), walk["plain"])


def served_pictures(programs: Path, walk: dict[str, Array]) -> None:
    """Ask the service for each picture as OpenAI's client does."""
    image = base64.b64encode(Path("plain.png").read_bytes()).decode()
    bodies: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"loras": [{"name": "style", "scale": 0.8}]},
        "control": {"controls": [{"name": "edges", "image": image, "scale": 0.5}]},
    }
    with started([programs / "latentrt", "serve", "mine", "--loras", "loras", "--port", 0, "--json"]) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for name, body in bodies.items():
            asked = ASKED | {"extra_body": ASKED["extra_body"] | body}
            data = client.images.generate(model="mine", **asked).data
            assert data is not None
            assert near(pixels(base64.b64decode(data[0].b64_json or "")), walk[name])


def drawn_by_ray(programs: Path, folder: Path) -> Array:
    """Deploy the bundle on a cluster of one machine, by that environment's Ray, and ask it."""
    command = [str(programs / "python"), str(ROOT / "tests" / "ray_cluster.py"), "/tmp/ray-walk"]  # sockets: short
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=outer()) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            address = json.loads(cluster.stdout.readline())["address"]
            told = {"deploy": "walk", "arguments": {"bundles": {"mine": str(folder / "mine")}}}
            print(json.dumps(told), file=cluster.stdin, flush=True)
            assert cluster.stdout.readline() == "{}\n"
            body = {"prompt": PROMPT[0], **DRAWN, "size": "32x32"}
            answer = httpx.post(f"{address}/walk/v1/images/generations", json=body, timeout=WAIT_S)
            return pixels(base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"]))
        finally:
            cluster.stdin.close()
            cluster.wait(WAIT_S)


@contextmanager
def started(command: Sequence[object]) -> Iterator[str]:
    """Run a service and give its address; it ends in order when it is told to."""
    written = [str(part) for part in command]
    with subprocess.Popen(written, stdout=subprocess.PIPE, text=True, env=outer()) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
