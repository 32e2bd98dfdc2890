"""What writes: each command that leaves something behind, with what lies there before and what must lie there after."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from benchmarks.torture.sources import Sources

from latentrt.engines.bundle.files import Bundle, check_file
from latentrt.engines.errors import LatentrtError

PROMPT = "a red circle"


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """One command that writes.

    words: of the command; `{under}`, `{checkpoint}`, `{bundle}` and `{store}` stand for places
    prepare: puts there what lies there before
    state: says what lies there, in words that differ between old, new and absent; raises AssertionError for a half
    torch: it exports
    partly: what it leaves may be a part of the work, such as the first of two pictures
    adds: a second run adds to what the first one left
    """

    words: tuple[str, ...]
    prepare: Callable[[Sources, Path], None]
    state: Callable[[Path], str]
    torch: bool = False
    partly: bool = False
    adds: bool = False

    def command(self, sources: Sources, under: Path) -> tuple[str, ...]:
        """Return the words with their places."""
        places = {"under": under, **{name: getattr(sources, name) for name in Sources.__struct_fields__}}
        return tuple(word.format(**places) for word in self.words)


def bundle_state(root: Path) -> str:
    """Return which bundle lies at a path, whole, with which engines; `absent` if none. Raises AssertionError."""
    if not root.exists():
        return "absent"
    try:
        bundle = Bundle.open(root)
        for name in bundle.manifest.files:
            bundle.path(name, check="hash")
        engines = bundle.engine_directories()
        for directory, record in engines.items():
            for name, file in record.files.items():
                check_file(directory, name, file, check="hash")
    except LatentrtError as error:
        raise AssertionError(f"half a bundle: {error}") from error
    built = "with engines" if engines else "bare"
    return f"{bundle.manifest.precision} {bundle.manifest.provenance.export_key[:8]} {built}"


def store_state(root: Path) -> str:
    """Return how many builds a store holds, each with all its content. Raises AssertionError."""
    records = sorted(root.glob("[!.]*/engine.json"))
    for record in records:
        for file in json.loads(record.read_text())["files"].values():
            content = root / "sha256" / file["sha256"]
            assert content.is_file() and hashlib.sha256(content.read_bytes()).hexdigest() == file["sha256"]
    return f"{len(records)} builds"


def result_state(under: Path) -> str:
    """Return which results of `bench` lie there. Raises AssertionError."""
    found = {}
    for file in (under / "r.json", under / "r.html"):
        text = file.read_text() if file.exists() else None
        assert text is None or text == "old" or text.endswith(("}\n", "</html>\n")), f"half a {file.name}"
        found[file.name] = "absent" if text is None else "old" if text == "old" else "new"
    return " ".join(found.values())


def picture_state(under: Path) -> str:
    """Return how many whole pictures lie there. Raises AssertionError."""
    from PIL import Image

    files = sorted(path for path in under.rglob("*") if path.is_file() and not path.name.startswith("."))
    for file in files:
        with Image.open(file) as image:
            for frame in range(getattr(image, "n_frames", 1)):
                image.seek(frame)
                image.load()
    return f"{len(files)} pictures"


def model_state(under: Path) -> str:
    """Return what lies in a repository of Triton's. Raises AssertionError."""
    model = under / "models" / "tiny"
    if not model.exists():
        return "absent"
    assert (model / "config.pbtxt").is_file() and (model / "1" / "model.py").is_file()
    return bundle_state(next((model / "1").glob("*/*/manifest.json")).parent)


def kept_state(under: Path) -> str:
    """Return whether a graph is kept, which is asked for as the export does. Raises AssertionError."""
    files = sorted(path for path in under.rglob("key") if path.is_file())
    for file in files:
        whole = file.read_bytes()
        assert hashlib.sha256(whole[32:]).digest() == whole[:32]
    return f"{len(files)} kept"


def keep(folder: str) -> None:
    """Keep a graph, in a cache at a folder."""
    import os

    os.environ["LATENTRT_CACHE"] = folder
    from latentrt.export.graphs.kept_traces import keep_graph

    keep_graph("key", b"graph" * 1000)


def store_picture(folder: str) -> None:
    """Put a picture where the service keeps those that are asked for by address."""
    import io

    from PIL import Image

    from latentrt.runtime.serve.openai.store import put

    content = io.BytesIO()
    Image.new("RGB", (64, 64)).save(content, format="PNG")
    put(Path(folder), content.getvalue(), "png")


def _nothing(sources: Sources, under: Path) -> None:
    del sources, under


def _other(sources: Sources, under: Path) -> None:
    shutil.copytree(sources.other, under / "b")


def _whole(sources: Sources, under: Path) -> None:
    shutil.copytree(sources.bundle, under / "b")


def _bare(sources: Sources, under: Path) -> None:
    shutil.copytree(sources.bundle, under / "b", ignore=shutil.ignore_patterns("engines"))


def _closed(sources: Sources, under: Path) -> None:
    """Put a bundle there in which no engines can be put: a file has their folder's name, which stops root too."""
    _bare(sources, under)
    (under / "b" / "engines").touch()


def _old_results(sources: Sources, under: Path) -> None:
    del sources
    (under / "r.json").write_text("old")
    (under / "r.html").write_text("old")


def _of(name: str) -> Callable[[Path], str]:
    return lambda under: bundle_state(under / name)


def _with_store(under: Path) -> str:
    return f"{bundle_state(under / 'b')}, {store_state(under / 'store')}"


QUICK = ("--steps", "1", "--size", "64x64")
BUILD = ("build", "{under}/b", "--backend", "cpu")
BENCH = ("bench", "{bundle}", "--steps", "1", "--rounds", "1", "--seconds", "1", "--cold", "0", "--no-golden")
SCENES = {
    "export": Scene(
        words=("export", "{checkpoint}", "{under}/b", "--precision", "fp32"),
        prepare=_nothing,
        state=_of("b"),
        torch=True,
    ),
    "export --overwrite": Scene(
        words=("export", "{checkpoint}", "{under}/b", "--precision", "fp32", "--overwrite"),
        prepare=_other,
        state=_of("b"),
        torch=True,
    ),
    "build": Scene(words=BUILD, prepare=_bare, state=_of("b")),
    "build --force": Scene(words=(*BUILD, "--force"), prepare=_whole, state=_of("b")),
    "publish": Scene(words=(*BUILD, "--store", "{under}/store"), prepare=_whole, state=_with_store, partly=True),
    "fetch": Scene(words=(*BUILD, "--store", "{store}", "--fetch-only"), prepare=_bare, state=_of("b")),
    "fetch into the cache": Scene(
        words=(*BUILD, "--store", "{store}", "--fetch-only"), prepare=_closed, state=_of("b")
    ),
    "bench": Scene(
        words=(*BENCH, "--json", "{under}/r.json", "--html", "{under}/r.html"),
        prepare=_old_results,
        state=result_state,
        partly=True,
    ),
    "generate": Scene(
        words=("generate", "{bundle}", PROMPT, *QUICK, "-n", "2", "--seed", "1", "--output", "{under}/pictures"),
        prepare=_nothing,
        state=picture_state,
        partly=True,
        adds=True,
    ),
    "animate": Scene(
        words=("animate", "{bundle}", f"{PROMPT}@1", f"{PROMPT}@2", *QUICK, "--frames", "3", "-o", "{under}/a.webp"),
        prepare=_nothing,
        state=picture_state,
    ),
    "animate mp4": Scene(
        words=("animate", "{bundle}", f"{PROMPT}@1", f"{PROMPT}@2", *QUICK, "--frames", "3", "-o", "{under}/a.mp4"),
        prepare=_nothing,
        state=lambda under: "new" if (under / "a.mp4").exists() else "absent",
    ),
    "export-triton": Scene(
        words=("export-triton", "{bundle}", "{under}/models", "--name", "tiny", "--force"),
        prepare=_nothing,
        state=model_state,
    ),
    "keep a graph": Scene(
        words=("call", "benchmarks.torture.writing.scenes:keep", "{under}/cache"),
        prepare=_nothing,
        state=kept_state,
        partly=True,
    ),
    "keep a picture": Scene(
        words=("call", "benchmarks.torture.writing.scenes:store_picture", "{under}/kept"),
        prepare=_nothing,
        state=picture_state,
        adds=True,
    ),
}
