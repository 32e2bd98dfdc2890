"""What reads what others wrote: for each reader what it is given, how it is called, and what it may refuse with."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from benchmarks.torture.sources import Sources

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import BundleError, CheckpointError, RequestError


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One reader.

    kind: how what it reads is changed, see `mutate`
    seeds: what it reads without an error
    read: reads bytes; raises one of `refusals`, and nothing else
    """

    kind: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]


def _file(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Return what writes bytes to a file and reads that."""
    path = folder / name

    def write_and_read(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return write_and_read


def _manifest(given: Sources, folder: Path) -> Target:
    from latentrt.engines.bundle.files import manifest_from_json

    seeds = tuple((root / "manifest.json").read_bytes() for root in (given.bundle, given.other))
    return Target(
        kind="json",
        seeds=seeds,
        read=lambda data: manifest_from_json(data, where="manifest.json"),
        refusals=(BundleError,),
    )


def _record(given: Sources, folder: Path) -> Target:
    from latentrt.engines.bundle.files import engine_record_from_json

    seeds = tuple(file.read_bytes() for file in given.bundle.glob("engines/*/engine.json"))
    return Target(
        kind="json",
        seeds=seeds,
        read=lambda data: engine_record_from_json(data, where="engine.json"),
        refusals=(BundleError,),
    )


def _tensors(given: Sources, folder: Path) -> Target:
    from safetensors.numpy import save

    from latentrt.engines.bundle.safetensors_header import read_header

    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.ones((2,), np.float16), "c": np.ones((), np.int64)}

    def read(path: Path) -> object:
        file = read_header(path)
        return [file.read_float32(name) for name, one in file.tensors.items() if one.dtype in ("F32", "F16", "BF16")]

    seeds = (save(arrays), save(arrays, {"format": "pt"}), save({}))
    return Target(kind="tensors", seeds=seeds, read=_file(folder, "t.safetensors", read), refusals=(CheckpointError,))


def _lora(given: Sources, folder: Path) -> Target:
    from tests.lora_files import every_layer, kohya, peft, save

    from latentrt.runtime.draw.loras import Loras
    from latentrt.runtime.request import Lora

    some = every_layer(given.checkpoint, seed=1)[:6]
    files = [save(folder / f"{make.__name__}.safetensors", make(some)) for make in (kohya, peft)]
    loras = Loras(Bundle.open(given.bundle))
    return Target(
        kind="tensors",
        seeds=tuple(file.read_bytes() for file in files),
        read=_file(folder, "lora.safetensors", lambda path: loras.changes((Lora(file=path),))),
        refusals=(RequestError,),
    )


def _embedding(given: Sources, folder: Path) -> Target:
    from safetensors.numpy import save

    from latentrt.runtime.text.textual_inversion import load_embedding

    vectors = np.ones((2, 32), np.float32)
    seeds = tuple(save(arrays) for arrays in ({"emb_params": vectors}, {"clip_l": vectors, "clip_g": vectors}))
    return Target(
        kind="tensors", seeds=seeds, read=_file(folder, "e.safetensors", load_embedding), refusals=(RequestError,)
    )


def _tokenizer(given: Sources, folder: Path) -> Target:
    from latentrt.runtime.text.tokenizer import PromptTokenizer

    spec = Bundle.open(given.bundle).manifest.tokenizers["tokenizer"]
    seeds = ((given.bundle / spec.file).read_bytes(),)

    def read(path: Path) -> object:
        return PromptTokenizer(path, spec)(["a red circle, and a café"])

    return Target(
        kind="json", seeds=seeds, read=_file(folder, "tokenizer.json", read), refusals=(BundleError, RequestError)
    )


def _folder(given: Sources, folder: Path) -> Target:
    """Read a checkpoint's directory of which one JSON file is changed: the first byte says which one."""
    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.sources.tokenizer import read_vocabulary

    root = folder / "checkpoint"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(given.checkpoint, root)
    files = sorted(root.rglob("*.json"))
    whole = {file: file.read_bytes() for file in files}

    def read(data: bytes) -> object:
        file = files[(data[0] if data else 0) % len(files)]
        file.write_bytes(data[1:])
        try:
            checkpoint = open_checkpoint(str(root))
            names = checkpoint.tokenizers if file.parent.name == "tokenizer" else ()  # transformers takes long for it
            return [read_vocabulary(name, checkpoint.tokenizers[name]) for name in names]
        finally:
            file.write_bytes(whole[file])

    seeds = tuple(bytes([number]) + whole[file] for number, file in enumerate(files))
    return Target(kind="folder", seeds=seeds, read=read, refusals=(CheckpointError,))


def _single(given: Sources, folder: Path) -> Target:
    """Read a single file of which the header is given, and the rest is as long as that of SD 1.5, and empty."""
    from tests.single_files import save_header
    from tests.test_single_file import DEMO, ONE, published

    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.options import CheckpointOptions

    whole = save_header(folder / "whole.safetensors", published({"cross_attention_dim": 768}, ONE))
    with whole.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    rest, path = whole.stat().st_size - 8 - length, folder / "single.safetensors"
    options = CheckpointOptions(tokenizer=str(DEMO))

    def read(data: bytes) -> object:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(data)) + data)
            file.truncate(8 + len(data) + rest)
        return open_checkpoint(str(path), options=options)

    return Target(kind="json", seeds=(header,), read=read, refusals=(CheckpointError,))


def _unigram(given: Sources, folder: Path) -> Target:
    """Read the tokenizer of a T5 that lies in a checkpoint."""
    from tests.tiny_t5 import save_unigram

    from latentrt.export.sources.unigram import read_unigram

    save_unigram(folder)
    seeds = ((folder / "tokenizer.json").read_bytes(),)
    read = _file(folder, "tokenizer.json", lambda path: read_unigram(path.parent))
    return Target(kind="json", seeds=seeds, read=read, refusals=(CheckpointError,))


def _pictures(parameters: str | None = None) -> tuple[bytes, ...]:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels = np.random.default_rng(1).integers(0, 255, (24, 16, 3), dtype=np.uint8)
    found = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("GIF", "P")):
        file, further = io.BytesIO(), dict[str, Any]()
        if kind == "PNG" and parameters is not None:
            further["pnginfo"] = info = PngInfo()
            info.add_itxt("parameters", parameters)
        Image.fromarray(pixels).convert(mode).save(file, format=kind, **further)
        found.append(file.getvalue())
    return tuple(found)


def _image(given: Sources, folder: Path) -> Target:
    from latentrt.runtime.images.read import read_pictures

    return Target(
        kind="bytes", seeds=_pictures(), read=lambda data: read_pictures(data, factor=8), refusals=(RequestError,)
    )


def _settings(given: Sources, folder: Path) -> Target:
    from latentrt.runtime.images.read_parameters import parse, read_text

    text = (
        'a red circle\nNegative prompt: blue\nSteps: 4, Sampler: Euler, CFG scale: 7.5, Seed: 3, Size: 64x64, A: "b, c"'
    )

    def read(data: bytes) -> object:
        parse(data.decode("utf-8", "replace"))
        return parse(read_text(data) or "")

    seeds = tuple(file for file in _pictures(text) if not file.startswith(b"GIF"))
    return Target(kind="bytes", seeds=seeds, read=read, refusals=(RequestError,))


def _report(given: Sources, folder: Path) -> Target:
    from latentrt.runtime.bench.result import read_report

    root = Path(__file__).parent.parent.parent / "results"
    seeds = ((root / "bench-demo.json").read_bytes(),)
    return Target(kind="json", seeds=seeds, read=_file(folder, "r.json", read_report), refusals=(RequestError,))


def _bodies(given: Sources, folder: Path) -> Target:
    """Ask the service: the first byte says what for, and whether the rest is JSON or a form."""
    from tests.test_serve_fuzz import BASES, PICTURES, ROUTES, Service, as_form, check

    from latentrt.runtime.serve.app import build
    from latentrt.runtime.serve.models import Models
    from latentrt.runtime.serve.options import Limits, ServeOptions

    limits = Limits(pixels=64 * 64, steps=2, pictures=2, body_bytes=2**20)
    models = Models({"tiny": given.bundle}, ServeOptions(slots=4, limits=limits), {"backend": "cpu", "threads": 1})
    models.__enter__()  # for as long as the process lives
    service = Service(build(models))

    def read(data: bytes) -> object:
        first = data[0] if data else 0
        path = ROUTES[first % len(ROUTES)]
        form = "multipart/form-data; boundary=cut" if first >= 128 else "application/json"
        answer = service("POST", path, data[1:], {"content-type": form})
        check(answer, path, deadline=b"deadline" in data)
        return answer

    seeds = [bytes([number]) + json.dumps(BASES[path]).encode() for number, path in enumerate(ROUTES)]
    edits = next(n for n in range(128, 256) if ROUTES[n % len(ROUTES)] == "/v1/images/edits")
    seeds.append(bytes([edits]) + as_form(BASES["/v1/images/edits"], [("image", PICTURES[0])])[0])
    return Target(kind="folder", seeds=tuple(seeds), read=read, refusals=())


Make = Callable[[Sources, Path], Target]
TARGETS: Mapping[str, Make] = {
    "manifest": _manifest,
    "engine record": _record,
    "safetensors header": _tensors,
    "lora": _lora,
    "embedding": _embedding,
    "tokenizer": _tokenizer,
    "tokenizer of T5": _unigram,
    "checkpoint folder": _folder,
    "single file": _single,
    "image": _image,
    "picture settings": _settings,
    "bench result": _report,
    "http bodies": _bodies,
}
