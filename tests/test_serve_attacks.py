"""What a service refuses before it does any work for it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import RequestError
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.web_errors import WebError
from tests.lora_files import save
from tests.serving import served


class Service:
    """A service that is attacked."""

    def __init__(self, address: str, loras: Path) -> None:
        self.address, self.loras = address, loras

    def send(self, path: str, body: bytes, media: str, **headers: str) -> int:
        """Return the status of an answer to a POST."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        try:
            connection.request("POST", path, body, {"content-type": media, **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    def send_json(self, path: str, body: Any, **headers: str) -> int:
        return self.send(path, json.dumps(body).encode(), "application/json", **headers)

    def send_form(self, path: str, fields: dict[str, str], file: bytes) -> int:
        border = secrets.token_hex(8)
        parts = [f'--{border}\r\ncontent-disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
        head = f'--{border}\r\ncontent-disposition: form-data; name="image"; filename="../../x.png"\r\n'
        body = "".join(parts).encode() + head.encode() + b"content-type: image/png\r\n\r\n" + file
        return self.send(path, body + f"\r\n--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}")

    def admitted(self) -> float:
        """Return how many pictures were taken on."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("latentrt_admitted_total"))


@pytest.fixture(scope="module")
def service(sd1_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("loras")
    (folder.parent / "outside.safetensors").write_bytes(b"secret")
    (folder / "damaged.safetensors").write_bytes(b"no LoRA")
    (folder / "folder.safetensors").mkdir()
    zeros = {"lora_A": np.zeros((1, 4, 3, 3), np.float32), "lora_B": np.zeros((32, 1, 1, 1), np.float32)}
    save(folder / "alone.safetensors", {f"base_model.model.unet.conv_in.{role}.weight": zeros[role] for role in zeros})
    options = ServeOptions(loras=folder, pictures=tmp_path_factory.mktemp("pictures"))
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu"}) as models, served(build(models)) as address:
        yield Service(address, folder)


def huge_png() -> bytes:
    """Return a PNG of 1 kB whose header says 100 megapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(900_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


DRAW = {"prompt": "a circle", "steps": 1}
PATHS = ("/v1/images/generations", "/sdapi/v1/txt2img", "/jobs")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}])
def test_foreign_names_and_pages_have_nothing_drawn(service: Service, path: str, headers: dict[str, str]) -> None:
    before = service.admitted()
    assert service.send_json(path, DRAW, **headers) == 403
    assert service.send(path, json.dumps(DRAW).encode(), "text/plain", **headers) == 403
    assert service.admitted() == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {**DRAW, "model": "../tiny"}),
        ("/v1/images/generations", {**DRAW, "model": "/etc/passwd"}),
        ("/v1/images/generations", {**DRAW, "loras": [{"name": "../outside"}]}),
        ("/v1/images/generations", {**DRAW, "loras": [{"name": "../outside.safetensors"}]}),
        ("/jobs", {**DRAW, "model": "../tiny"}),
        ("/jobs", {**DRAW, "loras": [{"name": "../outside"}]}),
        ("/sdapi/v1/txt2img", {**DRAW, "override_settings": {"sd_model_checkpoint": "../tiny"}}),
        ("/sdapi/v1/txt2img", {"prompt": "a circle <lora:../outside:1>", "steps": 1}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "../tiny"}),
    ],
)
def test_names_are_never_paths(service: Service, path: str, body: Any) -> None:
    before = service.admitted()
    assert 400 <= service.send_json(path, body) < 500
    assert service.admitted() == before


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {**DRAW, "loras": [{"name": "damaged"}]}),
        ("/v1/images/generations", {**DRAW, "loras": [{"name": "alone"}]}),
        ("/jobs", {**DRAW, "loras": [{"name": "alone"}]}),
        ("/sdapi/v1/txt2img", {"prompt": "a circle <lora:damaged:1>", "steps": 1}),
        ("/sdapi/v1/txt2img", {"prompt": "a circle <lora:alone:1>", "steps": 1}),
    ],
)
def test_where_a_lora_lies_is_not_told(service: Service, path: str, body: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=60)
    headers = {"content-type": "application/json", "x-latentrt-session": "abcdefghijklmnop"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 400 and ("'damaged'" in text or "'alone'" in text) and str(service.loras) not in text


def test_a_folder_is_no_lora(service: Service) -> None:
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=60)
    connection.request("GET", "/sdapi/v1/loras")
    names = [one["name"] for one in json.loads(connection.getresponse().read())]
    connection.close()
    assert names == ["alone", "damaged"]


@pytest.mark.parametrize(
    "path",
    ["/page/../../pyproject.toml", "/page/%2e%2e/%2e%2e/pyproject.toml", "/page//etc/passwd", "/v1/../jobs/../x"],
)
def test_paths_lead_nowhere(service: Service, path: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=60)
    connection.request("GET", path)
    assert connection.getresponse().status == 404
    connection.close()


def jpeg(**options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


def endless(kind: str) -> bytes:
    """Return a small JPEG on which a decoder spends far more than on a picture."""
    if kind == "scans":
        whole = jpeg(progressive=True)
        last = whole[whole.rindex(b"\xff\xda") : -2]
        return whole[:-2] + last * 200 + b"\xff\xd9"
    segment = {
        "segments": b"\xff\xe1\x00\x09Exif\0\0.",
        "hidden": b"\xff\xf0" + b"\xff\xe1\x00\x09Exif\0\0.",
        "junk": bytes(200),
    }[kind]
    return b"\xff\xd8\xff\xd9" + segment * 2000 + jpeg()[2:]


@pytest.mark.parametrize("kind", ["scans", "segments", "hidden", "junk"])
def test_a_file_that_keeps_a_decoder_busy_is_refused_unread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrt.runtime.images.read_parameters import read_text
    from latentrt.runtime.serve.pictures import read_image

    file, opened = endless(kind), list[object]()
    monkeypatch.setattr(Image, "open", lambda *given, **_: opened.append(given))
    with pytest.raises(WebError):
        read_image(file, name="image", most=10**6)
    with pytest.raises(RequestError):
        read_text(file)
    assert not opened


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True, "exif": b"Exif\0\0" + bytes(60_000)}, {"dpi": (300, 300)}]
)
def test_pictures_are_read_all_the_same(options: dict[str, Any]) -> None:
    from latentrt.runtime.serve.pictures import read_image

    file = jpeg(comment=b"\xff\xda" * 1000, **options) + b"\xff\xda" * 2000  # a film behind it, for one
    assert read_image(file, name="image", most=10**6).size == (64, 64)


def test_warnings_of_a_clients_files_are_not_kept() -> None:
    from latentrt.runtime.serve.pictures import read_image

    tags = b"".join(struct.pack("<HHLL", number + 1000, 2, 100_000 + number, 8) for number in range(50))
    notes = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 50) + tags + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=notes)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        build(Models({}, ServeOptions()))
        read_image(file.getvalue(), name="image", most=100)
    assert not seen


def test_no_more_images_are_decoded_than_pictures_are_asked_for(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[object]()
    monkeypatch.setattr(Image, "open", lambda *given, **_: opened.append(given))
    texts = [base64.b64encode(huge_png()).decode()] * 500
    assert service.send_json("/sdapi/v1/img2img", {**DRAW, "init_images": texts}) == 400
    assert not opened


def test_a_small_file_of_a_hundred_megapixels_is_refused_by_its_header(service: Service) -> None:
    file = huge_png()
    text = base64.b64encode(file).decode()
    assert len(file) < 1100
    before = service.admitted()
    assert service.send_form("/v1/images/edits", {"prompt": "a circle"}, file) in (400, 413)
    assert service.send_form("/jobs", {"prompt": "a circle"}, file) in (400, 413, 415)
    assert service.send_json("/sdapi/v1/img2img", {**DRAW, "init_images": [text]}) in (400, 413, 422)
    assert 400 <= service.send_json("/sdapi/v1/png-info", {"image": text}) < 500
    assert service.admitted() == before
