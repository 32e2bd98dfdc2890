"""A full-size bundle of random weights in a few megabytes: the weights are sown from seeds, and grow where they run.

    python benchmarks/packed_bundle.py make sd15 .cache/packed/sd15.tar.gz      # export, sow, record, pack
    python benchmarks/packed_bundle.py pack demo/shapes .cache/packed/demo.tar.gz     # as it is, without engines
    python benchmarks/packed_bundle.py unpack .cache/packed/sd15.tar.gz /tmp/sd15

Speed needs the graphs that a user's export gives, not trained weights. `make` exports a random checkpoint of a
real size, puts seeded random numbers of each weight's own mean and deviation in its place, records the golden
outputs again (ONNX Runtime in fp32 on the CPU) and keeps everything but those numbers. `unpack` needs NumPy alone,
and the manifest's SHA-256 proves that it made the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.progress import Report, silent, terminal_report
from latentrt.engines.spec import Array

LEAST = 1024  # numbers: smaller tensors stay as they are
RECIPE = "recipe.json"
BLOCK = 1 << 22  # numbers made at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A stretch of a file that is made of a seed: `count` numbers of a dtype, normal with this mean and deviation."""

    file: str
    offset: int
    count: int
    dtype: str
    mean: float
    deviation: float
    seed: int

    @property
    def bytes(self) -> int:
        return self.count * np.dtype(self.dtype).itemsize

    def blocks(self) -> Iterator[Array]:
        """Yield the numbers, some at a time."""
        generator = np.random.Generator(np.random.PCG64(self.seed))
        for start in range(0, self.count, BLOCK):
            numbers = generator.standard_normal(min(BLOCK, self.count - start), dtype=np.float32)
            yield (numbers * np.float32(self.deviation) + np.float32(self.mean)).astype(self.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "pack", "unpack"])
    parser.add_argument("source", help="make: a shape of random_checkpoint.py; pack: a bundle; unpack: a packed one.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    arguments = parser.parse_args()
    if arguments.action == "unpack":
        unpack(Path(arguments.source), arguments.target)
        return
    if arguments.action == "pack":
        pack(Path(arguments.source), [], arguments.target)
        return
    with terminal_report() as report, tempfile.TemporaryDirectory() as folder:
        make(arguments.source, arguments.target, precision=arguments.precision, folder=Path(folder), report=report)
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1e6:.1f} MB")


def make(shape: str, target: Path, *, precision: Any, folder: Path, report: Report = silent) -> Path:
    """Export a random checkpoint and pack it. Returns the packed file; `folder` is for what lies between."""
    from random_checkpoint import save_random

    from latentrt.export.export import export_checkpoint

    checkpoint = save_random(shape, folder / "checkpoint", half=precision == "fp16")
    export_checkpoint(str(checkpoint), folder / shape, precision=precision, backends=(), report=report)
    shutil.rmtree(checkpoint)
    holes = sow(folder / shape)
    record_goldens(folder / shape, report)
    return pack(folder / shape, holes, target)


def sow(root: Path) -> list[Hole]:
    """Replace every large weight of a bundle with numbers from a seed. Engines of the old weights are removed."""
    bundle, holes = Bundle.open(root), list[Hole]()
    for component in bundle.manifest.components.values():
        holes += _sow_graph(root, component.graph, first_seed=len(holes))
    shutil.rmtree(root / "engines", ignore_errors=True)
    _record_files(root, {path for c in bundle.manifest.components.values() for path in c.files})
    return holes


def _sow_graph(root: Path, name: str, *, first_seed: int) -> list[Hole]:
    import onnx

    path, holes, inline = root / name, list[Hole](), dict[str, Hole]()
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor, str(path.parent))
        if values.size < LEAST or values.dtype not in (np.float16, np.float32):
            continue
        if not (spread := float(np.std(values, dtype=np.float64))):  # float16's own sums are slow, and overflow
            continue
        hole = Hole(
            file=name,
            offset=0,
            count=values.size,
            dtype=str(values.dtype),
            mean=float(np.mean(values, dtype=np.float64)),
            deviation=spread,
            seed=first_seed + len(holes) + len(inline),
        )
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            holes.append(_write_external(root, path, tensor, hole))
        else:
            tensor.ClearField("float_data")
            tensor.ClearField("int32_data")
            tensor.raw_data = b"".join(block.tobytes() for block in hole.blocks())
            inline[tensor.name] = hole
    onnx.save(model, str(path))
    written, raw = path.read_bytes(), {t.name: t.raw_data for t in model.graph.initializer if t.name in inline}
    return holes + [dataclasses.replace(hole, offset=written.index(raw[name])) for name, hole in inline.items()]


def _write_external(root: Path, graph: Path, tensor: Any, hole: Hole) -> Hole:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    data = graph.parent / facts["location"]
    found = dataclasses.replace(hole, file=data.relative_to(root).as_posix(), offset=int(facts.get("offset", 0)))
    _fill(root, found)
    return found


def _fill(root: Path, hole: Hole) -> None:
    with (root / hole.file).open("r+b") as file:
        file.seek(hole.offset)
        for block in hole.blocks():
            file.write(block.tobytes())


def record_goldens(root: Path, report: Report) -> None:
    """Run every graph on its recorded inputs, in fp32 on the CPU, and record what comes out."""
    from safetensors.numpy import load_file, save_file

    manifest = Bundle.open(root).manifest
    for done, (name, component) in enumerate(manifest.components.items()):
        report("record goldens", done, len(manifest.components))
        golden = load_file(root / component.golden)
        inputs = {key.removeprefix("input."): value for key, value in golden.items() if key.startswith("input.")}
        outputs = run_wide(root / component.graph, inputs)
        save_file({**{f"input.{k}": v for k, v in inputs.items()}, **_named(name, outputs)}, root / component.golden)
    report("record goldens", 1, 1)
    _record_files(root, {component.golden for component in manifest.components.values()})


def _named(component: str, outputs: dict[str, Array]) -> dict[str, Array]:
    broken = [name for name, value in outputs.items() if not np.isfinite(value).all()]
    if broken:
        raise SystemExit(f"{component}: the sown weights give no finite {', '.join(broken)}")
    return {f"output.{name}": np.ascontiguousarray(value) for name, value in outputs.items()}


def run_wide(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """Run a canonical graph in fp32 arithmetic on its own weights."""
    import onnx
    import onnxruntime

    from latentrt.engines.graphs import edits as graphs
    from latentrt.engines.graphs.widen import widen

    model = graphs.load_graph(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "wide.onnx"
        if widen(model, path.parent, file.with_name("wide.data")):
            onnx.save(model, str(file))
        else:
            file = path
        del model
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of SDXL's ten gigabytes
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
        feed = {taken.name: inputs[taken.name].astype(kinds[taken.type]) for taken in session.get_inputs()}
        found = session.run(None, feed)
    return {given.name: value for given, value in zip(session.get_outputs(), found, strict=True)}


def _record_files(root: Path, changed: set[str]) -> None:
    manifest = Bundle.open(root).manifest
    files = {name: record_file(root, name) if name in changed else old for name, old in manifest.files.items()}
    write_manifest(root, msgspec.structs.replace(manifest, files=files))


def pack(root: Path, holes: list[Hole], target: Path) -> Path:
    """Write a bundle without what its holes are filled with. Returns the file."""
    by_file: dict[str, list[Hole]] = {}
    for hole in sorted(holes, key=lambda hole: hole.offset):
        by_file.setdefault(hole.file, []).append(hole)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz") as archive:
        recipe = json.dumps({"holes": [dataclasses.asdict(hole) for hole in holes]}).encode()
        _add(archive, RECIPE, recipe)
        for path in sorted(
            path for path in root.rglob("*") if path.is_file() and path.parts[len(root.parts)] != "engines"
        ):
            name = path.relative_to(root).as_posix()
            _add(archive, name, b"".join(_kept(path, by_file.get(name, []))))
    return target


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _kept(path: Path, holes: list[Hole]) -> Iterator[bytes]:
    at = 0
    with path.open("rb") as file:
        for hole in holes:
            file.seek(at)
            yield file.read(hole.offset - at)
            at = hole.offset + hole.bytes
        file.seek(at)
        yield file.read()


def unpack(packed: Path, root: Path) -> Path:
    """Write the bundle again, weights and all, and check every file's SHA-256, on every core. Returns the bundle."""
    with tarfile.open(packed) as archive:
        kept = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        contents = {name: member.read() for name, member in kept.items() if member is not None}
    holes: dict[str, list[Hole]] = {}
    for entry in json.loads(contents.pop(RECIPE))["holes"]:
        holes.setdefault(entry["file"], []).append(Hole(**entry))
    for name, content in contents.items():
        assert ".." not in Path(name).parts
        _lay_out(root / name, content, sorted(holes.get(name, []), key=lambda hole: hole.offset))
    largest_first = sorted((hole for some in holes.values() for hole in some), key=lambda hole: -hole.count)
    with ThreadPoolExecutor(
        max_workers=len(os.sched_getaffinity(0))
    ) as threads:  # NumPy works outside of Python's lock
        list(threads.map(partial(_fill, root), largest_first))
        bundle = Bundle.open(root)
        list(threads.map(partial(bundle.path, check="hash"), bundle.manifest.files))
    return root


def _lay_out(path: Path, kept: bytes, holes: list[Hole]) -> None:
    """Write what was kept of a file where it belongs, and leave the holes open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = 0
    with path.open("wb") as file:
        for hole in holes:
            literal = hole.offset - file.tell()
            file.write(kept[taken : taken + literal])
            taken += literal
            file.seek(hole.bytes, os.SEEK_CUR)
        file.write(kept[taken:])
        file.truncate(max(file.tell(), *(hole.offset + hole.bytes for hole in holes), 0))


if __name__ == "__main__":
    main()
