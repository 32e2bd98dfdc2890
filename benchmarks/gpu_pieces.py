"""What a GPU machine that can download nothing lacks, in pieces small enough to carry there one at a time.

    python benchmarks/gpu_pieces.py make wheels .gpu                  # here: .gpu/wheels.00, .gpu/wheels.01, ...
    python benchmarks/gpu_pieces.py join /tmp/p wheels /tmp/p/site    # there: one folder, to be named in PYTHONPATH

A set is a folder of files: packages as an installer would lay them out, or packed bundles. `make` writes it as one
compressed archive, cut into pieces, and the SHA-256 of each piece beside them; `join` needs Python alone and unpacks
nothing that was altered. Pieces are for use, not for publishing: some libraries' licences allow no more.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from one_architecture import keep_architecture

PIECE_BYTES = 44 * 2**20  # the machine takes 64 MiB at a time, the working tree and other sets included
PYTHON = "3.12"  # of the GPU machine
# By the glibc that they ask for; pip matches exactly.
PLATFORMS = tuple(
    f"manylinux{glibc}_x86_64"
    for glibc in ["_2_35", "_2_34", "_2_31", "_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "1"]
)
ARCHITECTURE = 90  # compute capability 9.0
ONNX_RUNTIME_TOOLS = ("quantization", "tools", "transformers")
# What the runtime needs and a machine made for PyTorch lacks, and the peer; click, for the machine's may be older.
WHEELS = ("msgspec", "cachetools", "click", "diffusers==0.42.1", "importlib_metadata", "zipp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    maker = actions.add_parser("make")
    maker.add_argument("set", choices=SETS)
    maker.add_argument("folder", type=Path)
    maker.add_argument("--piece-mib", type=float, default=PIECE_BYTES / 2**20)
    joiner = actions.add_parser("join")
    joiner.add_argument("folder", type=Path)
    joiner.add_argument("set")
    joiner.add_argument("target", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "join":
        join(arguments.folder, arguments.set, arguments.target)
        return
    for piece in make(arguments.set, arguments.folder, piece_bytes=int(arguments.piece_mib * 2**20)):
        print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")


def make(name: str, folder: Path, *, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Gather a set and write its pieces. Returns them, in their order."""
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / name
        tree.mkdir()
        SETS[name](tree, folder)
        return cut(tree, name, folder, piece_bytes=piece_bytes)


def cut(tree: Path, name: str, folder: Path, *, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Write a folder as pieces `NAME.00`, `NAME.01` and so on, and `NAME.json` with their SHA-256. Returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}.[0-9][0-9]"):
        old.unlink()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=9 | lzma.PRESET_EXTREME) as archive:
        archive.add(tree, arcname=".", filter=_anonymous)
    whole, pieces, digests = packed.getbuffer(), list[Path](), dict[str, str]()
    for number, start in enumerate(range(0, len(whole), piece_bytes)):
        piece = folder / f"{name}.{number:02d}"
        piece.write_bytes(whole[start : start + piece_bytes])
        digests[piece.name] = hashlib.sha256(whole[start : start + piece_bytes]).hexdigest()
        pieces.append(piece)
    (folder / f"{name}.json").write_text(json.dumps(digests, indent=1))
    return pieces


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who made a file and when: the same set gives the same pieces."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def join(folder: Path, name: str, target: Path) -> Path:
    """Unpack a set from its pieces. Returns the target. Exits with a sentence where a piece is missing or altered."""
    digests: dict[str, str] = json.loads((folder / f"{name}.json").read_text())
    for piece, digest in digests.items():
        path = folder / piece
        if not path.is_file():
            raise SystemExit(f"gpu_pieces: {path} is missing; bring it, then join again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"gpu_pieces: {path} is not what {name}.json says; bring it again")
    target.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO(b"".join((folder / piece).read_bytes() for piece in digests))
    with tarfile.open(fileobj=whole, mode="r:xz") as archive:
        archive.extractall(target, filter="data")
    return target


# The sets: each fills an empty folder, and is told where pieces go, and where what takes long to make is kept.


def fill_wheels(tree: Path, _: Path) -> None:
    """What a machine for PyTorch lacks of our runtime's needs, and diffusers."""
    install(WHEELS, tree)


def fill_ort(tree: Path, _: Path) -> None:
    """ONNX Runtime with its CUDA provider, whose code is for that GPU alone; without its tools."""
    install(["onnxruntime-gpu==1.31.1"], tree)
    root = tree / "onnxruntime"
    for folder in (root / name for name in ONNX_RUNTIME_TOOLS):
        shutil.rmtree(folder)
    for file in (*root.glob("capi/libonnxruntime_providers_tensorrt.so"), *root.glob("capi/libonnxruntime.so.*")):
        file.unlink()  # the second is for programs in C: Python's module holds it too
    keep_architecture(root / "capi" / "libonnxruntime_providers_cuda.so", ARCHITECTURE)


def fill_bundles(tree: Path, kept: Path, *, of: str = "bundles") -> None:
    """The packed bundles that packed_bundle.py wrote to `bundles/`, or `larger/`, beside the pieces."""
    for packed in sorted((kept / of).glob("*.tar.gz")):
        shutil.copyfile(packed, tree / packed.name)


def fill_rtx(tree: Path, _: Path) -> None:
    """TensorRT for RTX whole: builder, ONNX parser and runtime."""
    install(["tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"], tree)


def install(requirements: Iterable[str], tree: Path) -> None:
    """Fetch wheels for the GPU machine's Python, without what they need, and lay them out as an installer would."""
    with tempfile.TemporaryDirectory() as downloads:
        wheel_options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "-q", "-d", downloads, *wheel_options, *platforms]
        subprocess.run([*command, *requirements], check=True)
        for wheel in sorted(Path(downloads).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(tree)


SETS: dict[str, Callable[[Path, Path], None]] = {
    "wheels": fill_wheels,
    "bundles": fill_bundles,
    "larger": partial(fill_bundles, of="larger"),
    "ort": fill_ort,
    "rtx": fill_rtx,
}

if __name__ == "__main__":
    main()
