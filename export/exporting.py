"""The whole export: open, convert one network at a time, check, write the manifest, build engines, publish."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import resource
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt import __version__
from latentrt.engines.building import build_engines
from latentrt.engines.bundle import Bundle, disk_errors, publish, record_tree, staging, write_manifest
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.engines.manifest import MANIFEST, SCHEMA_VERSION, ComponentSpec, Manifest, Provenance
from latentrt.engines.parsing import ParseError, parse
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import Array, BackendName, Precision
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.components import COMPONENTS, EXPORTED, OTHER, Component, torch_dtype
from latentrt.export.golden import check_graph, open_graph, record, specs, write_golden
from latentrt.export.graphs import DATA_SUFFIX, OPSET, export_graph
from latentrt.export.optimum import adopt_graph, write_configs
from latentrt.export.tokenizer import read_clip_files, write_tokenizer

MARKS = ".finished"
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One network that is done: its entry in the manifest and how it went."""

    spec: ComponentSpec
    error: float
    seconds: float
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How an export went. `peak_rss_bytes` is the process's largest resident memory so far."""

    bundle: str
    precision: Precision
    components: dict[str, Finished]
    seconds: float
    peak_rss_bytes: int
    already_there: bool = False

    @property
    def rss_ratio(self) -> float:
        """Return peak memory over the bytes of the largest network's weights."""
        return self.peak_rss_bytes / max(finished.spec.weights_bytes for finished in self.components.values())


def export_checkpoint(
    checkpoint: str,
    target: Path,
    *,
    precision: Precision = "fp32",
    backends: Sequence[BackendName] = ("cpu",),
    overwrite: bool = False,
    revision: str | None = None,
    report: Report = silent,
) -> Summary:
    """Turn a checkpoint into a bundle at `target`.

    checkpoint: a directory in diffusers' or optimum's layout, a hub id, or `demo`
    backends: engines to build for this machine; none for the canonical graphs alone
    A run that is killed leaves nothing at the target, and the next run with the same options resumes.
    Raises CheckpointError (what is exported), BundleError (where to) and EngineError (building).
    """
    start = time.perf_counter()
    opened = open_checkpoint(checkpoint, revision=revision)
    hashes = opened.hashes()
    key = export_key(hashes, precision)
    if _stands(target, key, overwrite=overwrite):
        return _summary(target, precision, {}, start, already_there=True)
    staged = staging(target, key)
    with disk_errors(staged):
        finished = {part.name: _component(opened, part, staged, precision, report) for part in COMPONENTS}
        _write_bundle(opened, staged, precision, finished, hashes, key)
        for backend in backends:
            build_engines(Bundle.open(staged), backend, report=report)
        shutil.rmtree(staged / MARKS)
    publish(staged, target, overwrite=overwrite)
    return _summary(target, precision, finished, start)


def export_key(hashes: dict[str, str], precision: Precision) -> str:
    """Return what an export's result depends on, as one SHA-256."""
    text = json.dumps([hashes, precision, __version__, OPSET, SCHEMA_VERSION], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stands(target: Path, key: str, *, overwrite: bool) -> bool:
    """Tell whether this very bundle stands at the target. Raises BundleError where something else does."""
    if not target.exists():
        return False
    if not (target / MANIFEST).is_file():
        raise BundleError(f"'{target}' exists and is not a bundle; choose another path for the bundle")
    if Bundle.open(target).manifest.provenance.export_key == key:
        return True
    if not overwrite:
        raise BundleError(
            f"'{target}' holds a bundle of another checkpoint, precision or version; "
            "add --overwrite to replace it, or choose another path"
        )
    return False


def _component(checkpoint: Checkpoint, part: Component, staged: Path, precision: Precision, report: Report) -> Finished:
    mark = staged / MARKS / f"{part.name}.json"
    finished = _read_mark(mark)
    if finished is not None:
        return dataclasses.replace(finished, resumed=True)
    report(f"export {part.name}", 0, 1)
    shutil.rmtree(staged / "onnx" / part.name, ignore_errors=True)
    convert = adopt_graph if checkpoint.source == "onnx" else _convert
    start = time.perf_counter()
    spec, error = convert(checkpoint, part, staged, precision)
    finished = Finished(spec=spec, error=error, seconds=round(time.perf_counter() - start, 3))
    mark.parent.mkdir(exist_ok=True)
    beside = mark.with_suffix(".part")
    beside.write_text(json.dumps(dataclasses.asdict(finished)))
    beside.replace(mark)
    report(f"export {part.name}", 1, 1)
    return finished


def _read_mark(mark: Path) -> Finished | None:
    try:
        return parse(Finished, json.loads(mark.read_text()))
    except (OSError, ValueError, ParseError):
        return None


def _convert(
    checkpoint: Checkpoint, part: Component, staged: Path, precision: Precision
) -> tuple[ComponentSpec, float]:
    """Load one network with torch, record it, write its graph, free it, and check the graph alone."""
    graph, golden = f"onnx/{part.name}/model.onnx", f"golden/{part.name}.safetensors"
    config = checkpoint.configs[part.name]
    plan = part.plan(config)
    module = _load(checkpoint, part)
    pairs = [record(module, part.record(config, sizes), plan.outputs) for sizes in (EXPORTED, OTHER)]
    module = module.to(torch_dtype(precision))
    weights = sum(value.numel() * value.element_size() for value in module.parameters())
    inputs = {name: _tensor(name, array, precision) for name, array in pairs[0][0].items()}
    export_graph(module, inputs, plan, staged / graph)
    del module
    gc.collect()
    write_golden(pairs[0], staged / golden)
    session = open_graph(staged / graph)
    takes, gives = specs(session)
    error = check_graph(part.name, session, pairs, precision)
    files = tuple(name for name in (graph, graph + DATA_SUFFIX) if (staged / name).is_file())
    return ComponentSpec(files=files, golden=golden, inputs=takes, outputs=gives, weights_bytes=weights), error


def _load(checkpoint: Checkpoint, part: Component) -> Any:
    try:
        import diffusers  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"exporting needs {error.name}, which is not installed; install it with: pip install 'latentrt[export]'"
        ) from None
    transformers.logging.disable_progress_bar()  # ours tells how far the export is
    return part.load(checkpoint.folder(part.name), torch.float32)


def _tensor(name: str, array: Array, precision: Precision) -> Any:
    import torch

    tensor = torch.from_numpy(array)
    # timesteps stay float32: above 2048 float16 cannot tell one from the next, and Karras steps have fractions
    return tensor.to(torch_dtype(precision)) if tensor.is_floating_point() and name != "timestep" else tensor


def _write_bundle(
    checkpoint: Checkpoint,
    staged: Path,
    precision: Precision,
    finished: dict[str, Finished],
    hashes: dict[str, str],
    key: str,
) -> None:
    clip = read_clip_files(checkpoint.root / "tokenizer")
    tokenizer = write_tokenizer(clip, staged, "tokenizer/tokenizer.json")
    write_configs(checkpoint, clip, staged / "onnx")
    folders = (staged / name for name in ("onnx", "golden", "tokenizer"))
    files = {f"{folder.name}/{name}": entry for folder in folders for name, entry in record_tree(folder).items()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        producer=f"latentrt {__version__}",
        family=checkpoint.family,
        precision=precision,
        provenance=Provenance(checkpoint=checkpoint.name, files=hashes, tools=_tools(), export_key=key),
        components={name: part.spec for name, part in finished.items()},
        tokenizers={"tokenizer": tokenizer},
        schedule=checkpoint.schedule,
        latents=checkpoint.latents,
        default_size=checkpoint.default_size,
        files=files,
    )
    write_manifest(staged, manifest)


def _tools() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _summary(
    target: Path, precision: Precision, finished: dict[str, Finished], start: float, *, already_there: bool = False
) -> Summary:
    if already_there:
        components = Bundle.open(target).manifest.components
        finished = {
            name: Finished(spec=spec, error=0.0, seconds=0.0, resumed=True) for name, spec in components.items()
        }
    return Summary(
        bundle=str(target),
        precision=precision,
        components=finished,
        seconds=round(time.perf_counter() - start, 3),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        already_there=already_there,
    )
