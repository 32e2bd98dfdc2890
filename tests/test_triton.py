"""Triton: what is written into a model repository, what a call becomes, and NVIDIA's own server drawing pictures.

The server is that of the wheel nvidia-pytriton, which `make .cache/triton-venv` puts into an environment of its own:
NumPy 2 kills the process in which it runs Python.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import threading
import venv
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from latentrt import Batcher, BatcherOptions, Lora, Pipeline, Request
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, LatentrtError, QueueFullError, RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.triton.answer import Answer
from latentrt.runtime.triton.repository import CONFIG, ModelOptions, write_model
from latentrt.runtime.triton.tensors import INPUTS, Asked, read

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".cache" / "triton-venv"
WAIT_S = 120
NEAR_DB = 60


@pytest.fixture(scope="module")
def pipe(sd1_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(sd1_bundle, "cpu", threads=1) as opened:
        yield opened


def psnr(one: Array, other: Array) -> float:
    error = np.mean((one.astype(np.float64) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# --- the repository ---


def files_of(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_a_model_holds_its_configuration_its_code_and_all_that_the_bundle_names(
    sd1_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(sd1_bundle)
    target = write_model(sd1_bundle, tmp_path, ModelOptions())
    copied = target / "1" / "bundle" / bundle.name
    assert files_of(copied) >= {"manifest.json", *bundle.manifest.files}
    with Pipeline.load(copied, "cpu", threads=1) as pipe:
        assert pipe("a circle", steps=1, seed=0).settings[0].model == bundle.name
    assert {path.name for path in target.iterdir()} == {CONFIG, "1"}
    assert [path.name for path in tmp_path.iterdir()] == [target.name], "nothing is left of the preparation"


def test_a_linked_bundle_stays_where_it_is(sd1_bundle: Path, tmp_path: Path) -> None:
    target = write_model(sd1_bundle, tmp_path, ModelOptions(), link=True)
    (link,) = (target / "1" / "bundle").iterdir()
    assert link.is_symlink() and link.resolve() == sd1_bundle.resolve()


def test_a_version_is_added_and_none_is_replaced_unless_forced(sd1_bundle: Path, tmp_path: Path) -> None:
    write_model(sd1_bundle, tmp_path, ModelOptions(), name="shapes", link=True)
    with pytest.raises(RequestError):
        write_model(sd1_bundle, tmp_path, ModelOptions(), name="shapes", link=True)
    with pytest.raises(RequestError):
        write_model(sd1_bundle, tmp_path, ModelOptions(slots=2), name="shapes", version=2, link=True)
    target = write_model(sd1_bundle, tmp_path, ModelOptions(), name="shapes", version=2, link=True)
    assert {path.name for path in target.iterdir()} == {CONFIG, "1", "2"}
    write_model(sd1_bundle, tmp_path, ModelOptions(slots=2), name="shapes", version=3, link=True, force=True)
    assert {path.name for path in target.iterdir()} == {CONFIG, "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert sd1_bundle.is_dir(), "replacing a link leaves what it leads to"


@pytest.mark.parametrize("name", ["", ".", "..", "../shapes", "a/b", "/tmp/x", ".hidden", "a b", "a\n", "ä"])
def test_a_name_that_leads_elsewhere_is_refused(sd1_bundle: Path, tmp_path: Path, name: str) -> None:
    repository = tmp_path / "models"
    if name:
        with pytest.raises(RequestError):
            write_model(sd1_bundle, repository, ModelOptions(), name=name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_never_replaced(sd1_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("a friend")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "letters")
    for name in ("letters", "elsewhere"):
        with pytest.raises(RequestError):
            write_model(sd1_bundle, tmp_path, ModelOptions(), name=name, force=True)
    assert files_of(tmp_path / "letters") == {"dear.txt"}
    target = write_model(sd1_bundle, tmp_path, ModelOptions(), name="shapes")
    own = target / "1" / "bundle" / sd1_bundle.name
    with pytest.raises(RequestError):
        write_model(own, tmp_path, ModelOptions(), name="shapes", version=2, force=True)
    assert (own / "manifest.json").is_file()


def test_an_altered_bundle_leaves_no_model(sd1_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "altered"
    write_model(sd1_bundle, tmp_path, ModelOptions(), name="first")
    (tmp_path / "first" / "1" / "bundle" / sd1_bundle.name).rename(bundle)
    graph = bundle / "onnx" / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError):
        write_model(bundle, tmp_path / "models", ModelOptions())
    assert not (tmp_path / "models" / "altered").exists()


# --- what a call asks for ---


def asked(options: ServeOptions | None = None, **arrays: Any) -> Asked:
    given = {name: np.asarray(value, dtype=dtype_of(name)) for name, value in arrays.items()}
    return read(given.get, options or ServeOptions())


def size(picture: Any) -> tuple[int, int]:
    return picture.size


def png(width: int, height: int) -> bytes:
    """Return a small file that claims so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", zlib.crc32(b"IDAT"))


def drawn(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def dtype_of(name: str) -> Any:
    kinds = {"TYPE_STRING": np.object_, "TYPE_BOOL": np.bool_, "TYPE_INT64": np.int64, "TYPE_FP64": np.float64}
    return kinds.get(INPUTS[name].kind, np.float32)


def test_the_fields_of_a_request_arrive_as_they_are() -> None:
    found = asked(
        prompt=[b"a circle"],
        negative_prompt=[b""],
        seed=[7],
        size=[64, 32],
        sigmas=[1.5],
        guidance_interval=[0.25, 0.5],
        control_name=[b"edges"],
        control_image=[drawn(8, 8)],
        partial_images=[2],
    )
    assert found.request.prompt == "a circle" and found.request.negative_prompt == "" and found.request.seed == 7
    assert found.request.size == (64, 32) and found.request.sigmas == [1.5]
    assert found.request.guidance_interval == (0.25, 0.5)
    assert [(one.name, size(one.image), one.scale) for one in found.request.controls] == [("edges", (8, 8), 1.0)]
    assert (found.format, found.partials, found.base64) == ("png", 2, False)


def test_loras_are_named_among_those_of_the_server_and_never_by_a_path(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").touch()
    options = ServeOptions(loras=tmp_path)
    found = asked(options, prompt=[b"a"], lora_name=[b"style"], lora_scale=[0.5]).request.loras
    assert found == (Lora(file=tmp_path / "style.safetensors", scale=0.5),)
    for name in (b"nope", b"../style", bytes(tmp_path / "style.safetensors")):
        with pytest.raises(RequestError):
            asked(options, prompt=[b"a"], lora_name=[name])
    with pytest.raises(RequestError):
        asked(prompt=[b"a"], lora_name=[b"style"])


def test_every_field_of_a_request_is_an_input() -> None:
    assert set(Request.__struct_fields__) - set(INPUTS) == {"controls", "image_prompts", "loras"}


@pytest.mark.parametrize(
    ("arrays", "field"),
    [
        ({"n": [11]}, "n"),
        ({"n": [0]}, "n"),
        ({"prompt": [b"a"] * 6, "n": [2]}, "n"),
        ({"steps": [151]}, "steps"),
        ({"timesteps": [1.0] * 151}, "timesteps"),
        ({"size": [4096, 4096]}, "size"),
        ({"guidance": [float("nan")]}, "guidance"),
        ({"sampler": [b"\xff"]}, "sampler"),
        ({"output_format": [b"bmp"]}, "output_format"),
        ({"output_compression": [101]}, "output_compression"),
        ({"partial_images": [4]}, "partial_images"),
        ({"control_name": [b"edges"]}, "controls"),
        ({"image_prompt_name": [b"plain"]}, "image_prompts"),
        ({"seed": []}, "seed"),
        ({"image": [b"GIF89a"]}, "image"),
        ({"image": [drawn(1, 1), png(2049, 2048)]}, "image"),
        ({"image": [drawn(1, 1)], "mask": [png(60_000, 60_000)]}, "mask"),
        ({"image": [drawn(9, 9)[:-30]]}, "image"),
        ({"control_name": [b"edges"], "control_image": [png(2049, 2048)]}, "control_image"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(arrays: Mapping[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as refused:
        asked(**{"prompt": [b"a circle"], **arrays})
    assert refused.value.field == field


# --- an answer, without a server ---


class Told:
    """What a client is told; it goes away when `leaves` says so."""

    def __init__(self, leaves: Callable[[], bool] = lambda: False) -> None:
        self.sent: list[dict[str, Any]] = []
        self.error: tuple[str, str] | None = None
        self.over = threading.Event()
        self._leaves = leaves

    def send(self, outputs: Mapping[str, bytes]) -> None:
        assert not self.over.is_set()
        self.sent.append(json.loads(outputs["info"]))

    def fail(self, sentence: str, code: str) -> None:
        assert not self.over.is_set()
        self.error = (sentence, code)
        self.over.set()

    def end(self) -> None:
        assert not self.over.is_set()
        self.over.set()

    def is_cancelled(self) -> bool:
        assert not self.over.is_set(), "Triton has freed what it would ask"
        return self._leaves()


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool


def test_a_client_that_leaves_frees_its_slot_within_a_stage(pipe: Pipeline, beside: ThreadPoolExecutor) -> None:
    asked_after = list[int]()  # the client is looked for after each stage, and is gone after the third

    def leaves() -> bool:
        asked_after.append(len(asked_after) + 1)
        return len(asked_after) == 3

    told = Told(leaves)
    with Batcher(pipe) as batcher:
        answer = Answer(told, beside, done=lambda _: None)
        answer.begin(Asked(request=Request(prompt="a circle", steps=50, seed=1)), batcher)
        assert told.over.wait(WAIT_S)
    assert told.error is not None and told.error[1] == "CANCELLED"
    assert asked_after == [1, 2, 3]


def test_a_client_that_leaves_while_its_picture_waits_is_forgotten(pipe: Pipeline, beside: ThreadPoolExecutor) -> None:
    told, held, go = Told(lambda: True), threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        held.set()
        assert go.wait(WAIT_S)

    with Batcher(pipe, BatcherOptions(slots=1)) as batcher:
        (first,) = batcher.submit(Request(prompt="a circle", steps=2, seed=1), on_step=hold)
        assert held.wait(WAIT_S)
        answer = Answer(told, beside, done=lambda _: None)
        answer.begin(Asked(request=Request(prompt="a star", steps=2, seed=2)), batcher)
        answer.look_after()
        go.set()
        assert first.result(WAIT_S).pixels.shape[0] == 1
        assert told.over.wait(WAIT_S)
    assert told.sent == [] and told.error is not None and told.error[1] == "CANCELLED"


def test_all_pictures_of_a_call_come_and_then_its_end(pipe: Pipeline, beside: ThreadPoolExecutor) -> None:
    told, ended = Told(), list[Answer]()
    answer = Answer(told, beside, done=ended.append)
    with Batcher(pipe) as batcher:
        answer.begin(Asked(request=Request(prompt="a circle", steps=3, n=3, seed=5), partials=1), batcher)
        assert told.over.wait(WAIT_S)
    final = [info for info in told.sent if info["type"] == "picture"]
    assert {(info["picture"], info["seed"]) for info in final} == {(0, 5), (1, 6), (2, 7)}
    assert sorted(info["picture"] for info in told.sent if info["type"] == "partial") == [0, 1, 2]
    assert told.error is None and ended == [answer]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("size: too large"), "INVALID_ARG"),
        (QueueFullError("full", retry_after_s=1), "UNAVAILABLE"),
        (BundleError("gone"), "INTERNAL"),
        (KeyError("secret"), "INTERNAL"),
    ],
)
def test_an_error_has_tritons_code_and_only_our_own_sentences(
    beside: ThreadPoolExecutor, error: Exception, code: str
) -> None:
    told = Told()
    Answer(told, beside, done=lambda _: None).fail(error)
    assert told.error is not None and told.error[1] == code
    assert (str(error) == told.error[0]) == isinstance(error, LatentrtError)


def test_an_answer_that_cannot_be_ended_is_over_all_the_same(beside: ThreadPoolExecutor) -> None:
    class Gone(Told):
        def fail(self, sentence: str, code: str) -> None:
            raise ConnectionError(sentence)

    ended = list[Answer]()
    answer = Answer(Gone(), beside, done=ended.append)
    with pytest.raises(ConnectionError):
        answer.fail(RequestError("size: too large"))
    assert ended == [answer]


def test_importing_the_runtime_and_the_command_loads_neither_triton_nor_a_web_library() -> None:
    heavy = ("triton_python_backend_utils", "ray", "starlette", "uvicorn")
    code = (
        f"import sys, latentrt.runtime.pipeline, latentrt.runtime.triton.cli; print(set({heavy!r}) & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# --- NVIDIA's server ---


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def interpreter(folder: Path) -> Path:
    """Make an environment that sees that of Triton and this source: Triton's Python reads no PYTHONPATH."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (theirs,) = ENVIRONMENT.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(f"{ROOT / 'src'}\n{theirs.resolve()}\n")
    return folder / "bin"


class Server:
    """NVIDIA's server on a repository: its addresses, and calls over gRPC."""

    def __init__(self, repository: Path, folder: Path) -> None:
        (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
        home = packages / "pytriton" / "tritonserver"
        self._http, self._grpc, metrics = free_ports(3)
        libraries = [str(packages / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        environment = {
            "HOME": str(folder),
            "PATH": f"{interpreter(folder / 'venv')}:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(libraries),
        }
        command = [home / "bin" / "tritonserver", f"--model-repository={repository}"]
        command += [f"--backend-directory={home / 'backends'}", "--disable-auto-complete-config"]
        for kind, port in (("http", self._http), ("grpc", self._grpc), ("metrics", metrics)):
            command += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http}"

    def wait(self) -> None:
        for _ in range(10 * WAIT_S):
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.address}/v2/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            with_pause = threading.Event()
            with_pause.wait(0.1)
        raise AssertionError(self.log.read_text())

    def calls(self, *calls: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Make calls from Triton's own client, see tests/triton_client.py."""
        program = [ENVIRONMENT / "bin" / "python", ROOT / "tests" / "triton_client.py", f"127.0.0.1:{self._grpc}"]
        done = subprocess.run(
            [*program, "tiny"], input=json.dumps(calls), capture_output=True, text=True, timeout=2 * WAIT_S, check=False
        )
        assert done.returncode == 0, done.stderr + self.log.read_text()
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@pytest.fixture(scope="module")
def server(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not (ENVIRONMENT / ".installed").is_file():
        pytest.skip("NVIDIA's server is not here; `make .cache/triton-venv` brings it, 550 MB")
    folder = tmp_path_factory.mktemp("triton")
    write_model(sd1_bundle, folder / "models", ModelOptions(slots=2, threads=1), name="tiny")
    server = Server(folder / "models", folder)
    try:
        server.wait()
        yield server
    finally:
        server.end()


def pixels_of(answer: Mapping[str, Any]) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["image"]))))


@pytest.mark.slow
def test_the_server_draws_the_library_s_picture(server: Server, pipe: Pipeline) -> None:
    options: dict[str, Any] = {"prompt": "a circle", "seed": 3, "steps": 5, "guidance": 3.0, "sampler": "euler"}
    (found,) = server.calls({"inputs": {**options, "n": 2, "negative_prompt": "blue"}})
    alone = pipe.draw(Request(**options, n=2, negative_prompt="blue"))
    assert found["error"] is None and len(found["answers"]) == 2
    for answer in found["answers"]:
        number = answer["info"]["picture"]
        assert psnr(pixels_of(answer), alone.pixels[number]) >= NEAR_DB
        assert answer["info"]["seed"] == 3 + number
        assert answer["info"]["settings"]["sampler"] == alone.settings[number].sampler


@pytest.mark.slow
def test_partial_pictures_come_in_order_before_the_last(server: Server) -> None:
    inputs = {"prompt": "a star", "sampler": "euler", "steps": 8, "partial_images": 3, "output_format": "webp"}
    (found,) = server.calls({"inputs": inputs})
    infos = [answer["info"] for answer in found["answers"]]
    assert [(info["type"], info.get("partial"), info.get("stage")) for info in infos] == [
        ("partial", 0, 1),
        ("partial", 1, 3),
        ("partial", 2, 4),
        ("picture", None, None),
    ]
    assert all(pixels_of(answer).ndim == 3 for answer in found["answers"])


@pytest.mark.slow
def test_calls_of_two_clients_share_their_stages(server: Server) -> None:
    calls = [{"inputs": {"prompt": "a star", "steps": 60, "size": [128, 128], "seed": seed}} for seed in (1, 2)]
    one, other = (set(found["answers"][-1]["info"]["step_seconds"]) for found in server.calls(*calls))
    assert one & other, "a stage that both were in took both the same time, to the last digit"


@pytest.mark.slow
def test_a_cancelled_call_frees_its_slot(server: Server) -> None:
    """Two slots: the third call is drawn while the first still is, since the second was cancelled."""
    size, long = {"size": [128, 128]}, {"steps": 150, "partial_images": 3}
    first, cancelled, third = server.calls(
        {"inputs": {"prompt": "a star", **long, **size}},
        {"inputs": {"prompt": "a heart", **long, **size}, "cancel_after": 1},
        {"inputs": {"prompt": "a circle", "steps": 2, **size}},
    )
    assert [answer["info"]["type"] for answer in cancelled["answers"]] == ["partial"]
    assert third["answers"][-1]["info"]["type"] == first["answers"][-1]["info"]["type"] == "picture"
    assert third["place"] < first["place"]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{"sampler": "nope"}, {"n": 11}, {"size": [17, 17]}, {"image": "none"}], ids=str)
def test_bad_input_is_an_invalid_argument(server: Server, inputs: Mapping[str, Any]) -> None:
    (found,) = server.calls({"inputs": {"prompt": "a circle", **inputs}})
    assert found["answers"] == [] and found["error"].startswith(next(iter(inputs)))
    address = f"{server.address}/v2/models/tiny/generate_stream"
    refused = httpx.post(address, json={"prompt": "a circle", "base64": True, **inputs}, timeout=WAIT_S)
    assert refused.status_code == 400, "HTTP's form of INVALID_ARG"


@pytest.mark.slow
def test_pictures_come_over_http_as_server_sent_events(server: Server, pipe: Pipeline) -> None:
    options = {"prompt": "a circle", "seed": 3, "steps": 4}
    body = {**options, "base64": True, "partial_images": 1}
    address = f"{server.address}/v2/models/tiny/generate_stream"
    with httpx.stream("POST", address, json=body, timeout=WAIT_S) as answer:
        events = [json.loads(line.removeprefix("data:")) for line in answer.iter_lines() if line]
    assert [json.loads(event["info"])["type"] for event in events] == ["partial", "picture"]
    assert psnr(pixels_of(events[-1]), pipe.draw(Request(**options)).pixels[0]) >= NEAR_DB


@pytest.mark.slow
def test_a_server_that_is_told_to_end_draws_what_it_accepted(sd1_bundle: Path, server: Server, tmp_path: Path) -> None:
    write_model(sd1_bundle, tmp_path / "models", ModelOptions(threads=1), name="tiny", link=True)
    ending = Server(tmp_path / "models", tmp_path)
    try:
        ending.wait()
        body = {"prompt": "a star", "steps": 150, "size": [128, 128], "base64": True, "partial_images": 3}
        address = f"{ending.address}/v2/models/tiny/generate_stream"
        with httpx.stream("POST", address, json=body, timeout=WAIT_S) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(ending.process.pid, signal.SIGTERM)
            assert len(list(lines)) == 3
        assert ending.process.wait(WAIT_S) == 0
    finally:
        ending.end()
