"""The whole export: a checkpoint becomes a bundle beside its target, then takes its place in one rename."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from latentrt import __version__
from latentrt.engines.build import build_engines, check_can_build
from latentrt.engines.bundle.files import Bundle, disk_errors, record_file, write_manifest
from latentrt.engines.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    SIZES,
    ComponentSpec,
    DenoiserSpec,
    Manifest,
    Provenance,
)
from latentrt.engines.bundle.quantisation import refusal
from latentrt.engines.bundle.staging import publish, staged, sweep
from latentrt.engines.errors import BundleError, CheckpointError, NotInstalledError
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import QUANTISED, BackendName, Precision
from latentrt.export import INSTALL
from latentrt.export.additions.ip_adapters import IMAGE_PROJECTION, attention_layers, own_dimensions
from latentrt.export.additions.refiner import add_refiner
from latentrt.export.checkpoint import Checkpoint, open_checkpoint
from latentrt.export.configs.families import FAMILIES
from latentrt.export.graphs.optimum import write_configs
from latentrt.export.graphs.preview import PreviewFit, fit_preview
from latentrt.export.networks.components import COMPONENTS, REFINER, place_of
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.parts import TEXT_ENCODERS as TOKENIZERS
from latentrt.export.sources.parts import SharedEncoder, Source, WeightSource
from latentrt.export.sources.tokenizer import Vocabulary, read_vocabulary
from latentrt.export.work.finished import MARKERS, Finished, read_marker
from latentrt.export.work.jobs import ExportJob
from latentrt.export.work.need import costs, need, require_room
from latentrt.export.work.worker import start_worker

if TYPE_CHECKING:
    from latentrt.export.quantisation.quantise import Draw

# The CPU computes in float32 whatever the weights are, so float16 would only cost accuracy there; a GPU's matrix
# units want float16, which also halves memory.
DEFAULT_PRECISION: Mapping[BackendName, Precision] = {
    "cpu": "fp32",
    "cuda": "fp16",
    "tensorrt": "fp16",
    "tensorrt-rtx": "fp16",
}
NEEDED: Mapping[Source, tuple[str, ...]] = {
    "torch": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors"),
    "onnx": ("transformers", "onnx", "onnxruntime", "safetensors"),
}
TOOLS: Mapping[Source, tuple[str, ...]] = {
    "torch": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers"),
    "onnx": ("transformers", "onnx", "onnxruntime", "tokenizers"),
}
SHARED = ("text_encoder_2",)  # what a refiner reads of the checkpoint's own, and must have the same weights of


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export did. `already_there` says that the bundle was there already and nothing was done.

    preview_r_squared: the share of the colours' variance that the latent preview explains; None if none was fitted
    """

    manifest: Manifest
    components: Mapping[str, Finished]
    resumed: tuple[str, ...]
    engines: Mapping[str, str]
    seconds: float
    already_there: bool = False
    preview_r_squared: float | None = None


def export_checkpoint(
    checkpoint: str,
    target: Path,
    *,
    precision: Precision | None = None,
    backends: Sequence[BackendName] = ("cpu",),
    overwrite: bool = False,
    options: CheckpointOptions | None = None,
    draw: Draw | None = None,
    report: Report = silent,
) -> Exported:
    """Export a checkpoint to a bundle and build its engines.

    checkpoint: a directory in diffusers' or optimum's layout, a safetensors file, a hub id, or `demo`
    precision: of the graphs; None for what suits the first backend (fp32 on a CPU, fp16 on a GPU)
    backends: whose engines are built for this machine; may be empty
    draw: draws prompts for fp8 and int8: `latentrt.runtime.verify.recorded.draw_recorded`, which no module of this
        folder may import
    report: is told first what the export takes of the disk and of memory
    Raises CheckpointError, BundleError (before any work where the disk has no room for it) and EngineError:
    NotInstalledError where a library is missing. A killed export leaves the target as it was; the same call again
    continues with the components that are missing.
    """
    start = time.perf_counter()
    report("reading the checkpoint", 0, 1)
    options = options or CheckpointOptions()
    opened = add_refiner(open_checkpoint(checkpoint, options=options), options)
    _require_tools(opened.source)
    tokenizers = _tokenizers(opened)
    precision = precision or (DEFAULT_PRECISION[backends[0]] if backends else "fp32")
    _require_computed(precision, backends, draw)
    report("reading the checkpoint", 1, 1)
    what = f"exporting ({_require_room(opened, target, precision, backends, overwrite=overwrite)})"
    report(what, 0, 1)
    provenance = _provenance(opened, precision)
    _existing(target, provenance, overwrite=overwrite)  # refused before anything is written
    with staged(target, provenance.export_key) as directory:
        if existing := _existing(target, provenance, overwrite=overwrite):
            shutil.rmtree(directory)
            return _kept(existing, backends, report, start)
        finished, resumed = _components(_with_tokens(opened, tokenizers), directory, _exported_in(precision), report)
        report("fitting the preview", 0, 1)
        preview = fit_preview(directory, opened.latents)
        report("fitting the preview", 1, 1)
        manifest = _manifest(opened, directory, precision, provenance, finished, preview, tokenizers)
        if precision in QUANTISED and draw is not None:
            from latentrt.export.quantisation.quantise import quantise  # with onnx_ir, for these alone

            manifest = quantise(directory, manifest, precision, draw, report)
        write_manifest(directory, manifest)
        engines = _build(Bundle.open(directory), backends, report)
        _publish(directory, target, overwrite=overwrite)
    report(what, 1, 1)
    return Exported(
        manifest=manifest,
        components=finished,
        resumed=resumed,
        engines=engines,
        seconds=time.perf_counter() - start,
        preview_r_squared=preview.r_squared,
    )


def _require_room(
    checkpoint: Checkpoint, target: Path, precision: Precision, backends: Sequence[BackendName], *, overwrite: bool
) -> str:
    """Say what will be taken of the disk and of memory. Raises BundleError where the disk has not that much."""
    if (target / MANIFEST).is_file() and not overwrite:  # nothing will be exported
        return "the bundle may be there already"
    networks = _networks(checkpoint)
    ordered = {name: networks[name] for name in _ordered(checkpoint)}
    found = costs(ordered, checkpoint.source, _exported_in(precision))
    return require_room(target, need(found, backends, drawn=precision in QUANTISED))


def _tokenizers(checkpoint: Checkpoint) -> dict[str, Vocabulary]:
    """Read every tokenizer, for a text encoder that has a vector for each of its words. Raises CheckpointError."""
    rows = {
        TOKENIZERS[name]: checkpoint.configs[name].get("vocab_size", 49408)
        for name in TOKENIZERS
        if name in checkpoint.configs
    }
    special = checkpoint.special_tokens
    return {
        name: read_vocabulary(name, folder, rows=rows.get(name), special=special.get(name))
        for name, folder in checkpoint.tokenizers.items()
    }


def _with_tokens(checkpoint: Checkpoint, tokenizers: Mapping[str, Vocabulary]) -> Checkpoint:
    """Return a checkpoint whose dimensions name the tokens that a text begins and ends with, and with its texts."""
    dimensions = dict(checkpoint.dimensions)
    for tokenizer in reversed([*tokenizers.values()]):  # the first one's tokens are those that count
        dimensions |= tokenizer.dimensions()
    named = {encoder: tokenizers[name].texts() for encoder, name in TOKENIZERS.items() if name in tokenizers}
    return dataclasses.replace(checkpoint, dimensions=dimensions, texts=named)


def _exported_in(precision: Precision) -> Precision:
    """Return what components are exported in, before any of them goes into 8 bits."""
    return "fp16" if precision in QUANTISED else precision


def _require_computed(precision: Precision, backends: Sequence[BackendName], draw: Draw | None) -> None:
    """Raise CheckpointError or EngineError where a precision cannot be made, or not be computed, so far as is known."""
    if precision in QUANTISED and draw is None:
        raise CheckpointError(f"--precision {precision} needs what draws prompts: give export_checkpoint draw=…")
    for backend in backends:
        if reason := refusal(precision, backend):
            raise reason
        check_can_build(backend)


def _provenance(checkpoint: Checkpoint, precision: Precision) -> Provenance:
    files = checkpoint.hashes()
    tools = {name: importlib.metadata.version(name) for name in TOOLS[checkpoint.source]}
    options = dict(checkpoint.options)
    document = [__version__, SCHEMA_VERSION, precision, files, tools, options]
    key = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return Provenance(checkpoint=checkpoint.name, files=files, tools=tools, options=options, export_key=key)


def _require_tools(source: Source) -> None:
    absent = [name for name in NEEDED[source] if importlib.util.find_spec(name) is None]
    if absent:
        raise NotInstalledError(f"exporting needs what is not installed: {', '.join(absent)}", install=INSTALL)


def _existing(target: Path, provenance: Provenance, *, overwrite: bool) -> Bundle | None:
    """Return the bundle at the target if it is what would be made. Raises BundleError if it is something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not (target / MANIFEST).is_file():
        raise BundleError(f"'{target}' exists and is not a bundle; choose another path for the bundle")
    if overwrite:
        return None
    bundle = Bundle.open(target)
    if bundle.manifest.provenance.export_key != provenance.export_key:
        raise BundleError(
            f"'{target}' is a bundle of '{bundle.manifest.provenance.checkpoint}' in {bundle.manifest.precision}, made "
            "from other weights, with other options or tools; pass --overwrite to replace it, or choose another path"
        )
    return bundle


def _kept(bundle: Bundle, backends: Sequence[BackendName], report: Report, start: float) -> Exported:
    return Exported(
        manifest=bundle.manifest,
        components={},
        resumed=(),
        engines=_build(bundle, backends, report),
        seconds=time.perf_counter() - start,
        already_there=True,
    )


def _components(
    checkpoint: Checkpoint, staged: Path, precision: Precision, report: Report
) -> tuple[dict[str, Finished], tuple[str, ...]]:
    """Export every component that no earlier run has finished. Returns all of them, and the names of those kept."""
    names = _ordered(checkpoint)
    found = {name: read_marker(staged, name) for name in names}
    kept = {name: finished for name, finished in found.items() if finished is not None}
    made = {}
    if len(kept) < len(names):
        with start_worker(checkpoint.source) as worker:
            for name in names:
                if name not in kept:
                    report(f"exporting {name}", 0, 1)
                    made[name] = worker.run(_job(checkpoint, name, staged, precision))
                    report(f"exporting {name}", 1, 1)
    every = kept | made
    return {name: every[name] for name in names}, tuple(kept)


def _ordered(checkpoint: Checkpoint) -> list[str]:
    """Return its components, in the order in which they are exported."""
    return sorted(_networks(checkpoint), key=lambda name: (place_of(_row(checkpoint, name)), name))


def _networks(checkpoint: Checkpoint) -> dict[str, Path | WeightSource]:
    """Return where each network's weights are, the refiner's included."""
    further = {REFINER: checkpoint.refiner.networks[checkpoint.refiner.denoiser]} if checkpoint.refiner else {}
    return {**checkpoint.networks, **further}


def _row(checkpoint: Checkpoint, component: str) -> str:
    """Return the component's row in the table: its name, but for what has a name of the user's or another network."""
    if component in (adapter.spec.projection for adapter in checkpoint.image_adapters):
        return IMAGE_PROJECTION
    controls = checkpoint.controls.get(component)
    return controls.row if controls else checkpoint.rows.get(component, component)


def _job(checkpoint: Checkpoint, component: str, staged: Path, precision: Precision) -> ExportJob:
    folder, weight_source = _place(_networks(checkpoint)[component], staged / MARKERS / "weights")
    refiner, controls = checkpoint.refiner, checkpoint.controls.get(component)
    shared = None
    if refiner and component in SHARED:
        other, how = _place(refiner.networks[component], staged / MARKERS / "shared")
        shared = SharedEncoder(name=refiner.name, folder=other, weight_source=how)
    return ExportJob(
        component=component,
        row=_row(checkpoint, component),
        source=checkpoint.source,
        folder=folder,
        weight_source=weight_source,
        root=str(staged.resolve()),
        precision=precision,
        dimensions={
            **(refiner.dimensions if refiner and component == REFINER else checkpoint.dimensions),
            **own_dimensions(checkpoint).get(component, {}),
            **(controls.dimensions if controls else {}),
        },
        scaling_factor=checkpoint.latents.scaling_factor,
        shift=checkpoint.latents.shift,
        affine=checkpoint.normalising.get(component),
        shared=shared,
        texts=checkpoint.texts.get(component, ()),
        image_adapters=checkpoint.image_adapters if component == checkpoint.denoiser else (),
        skip_layers=checkpoint.skip_layers,
    )


def _place(network: Path | WeightSource, written: Path) -> tuple[str, WeightSource | None]:
    """Return the folder of a network, and how to write it where it is not there yet."""
    weight_source = network if isinstance(network, WeightSource) else None
    folder = written if isinstance(network, WeightSource) else network
    return str(folder.absolute()), weight_source


def _manifest(
    checkpoint: Checkpoint,
    staged: Path,
    precision: Precision,
    provenance: Provenance,
    finished: Mapping[str, Finished],
    preview: PreviewFit,
    tokenizers: Mapping[str, Vocabulary],
) -> Manifest:
    """Write the files that are not graphs, and describe the bundle."""
    with disk_errors(staged):
        specs = {name: one.write(staged, f"{name}/tokenizer.json") for name, one in tokenizers.items()}
        extras = write_configs(checkpoint, tokenizers, staged / "onnx")
    files = {name: record for component in finished.values() for name, record in component.files.items()}
    others = (*(spec.file for spec in specs.values()), *(path.relative_to(staged).as_posix() for path in extras))
    files |= {name: record_file(staged, name) for name in others}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        producer=_producer(),
        family=checkpoint.family,
        precision=precision,
        provenance=provenance,
        components={name: _component_spec(checkpoint, name, component) for name, component in finished.items()},
        tokenizers=specs,
        schedule=checkpoint.schedule,
        latents=msgspec.structs.replace(checkpoint.latents, preview=preview.weights),
        default_size=checkpoint.default_size,
        files=dict(sorted(files.items())),
        denoisers=_denoisers(checkpoint),
        defaults=FAMILIES[checkpoint.family].defaults,
    )


def _denoisers(checkpoint: Checkpoint) -> dict[str, DenoiserSpec]:
    """Say what each denoiser takes, the one that draws first."""
    refiner = {REFINER: checkpoint.refiner} if checkpoint.refiner else {}
    return {name: _denoiser(one) for name, one in {checkpoint.denoiser: checkpoint, **refiner}.items()}


def _denoiser(checkpoint: Checkpoint) -> DenoiserSpec:
    texts, adapters = FAMILIES[checkpoint.family].held(checkpoint.networks), checkpoint.image_adapters
    return DenoiserSpec(
        text_encoders=texts,
        zero_negative=checkpoint.zero_negative,
        sizes=SIZES.get(checkpoint.dimensions["size_numbers"], ()),
        frames=checkpoint.frames,
        shown=FAMILIES[checkpoint.family].shown,
        skip_layers=checkpoint.skip_layers,
        text_width=checkpoint.dimensions["attention_width"] if any(text.tokens for text in texts) else None,
        image_prompts=tuple(adapter.spec for adapter in adapters),
        image_layers=tuple(attention_layers(checkpoint.configs[checkpoint.denoiser])) if adapters else (),
    )


def _producer() -> str:
    return f"latentrt {__version__}"


def _component_spec(checkpoint: Checkpoint, name: str, finished: Finished) -> ComponentSpec:
    controls = checkpoint.controls.get(name)
    return ComponentSpec(
        role=COMPONENTS[_row(checkpoint, name)].role,
        files=finished.graph_files,
        golden=finished.golden,
        inputs=finished.inputs,
        outputs=finished.outputs,
        weights_bytes=finished.weights_bytes,
        weights=finished.weights,
        error=finished.error,
        float32_layers=finished.float32_layers,
        largest_activation=finished.largest_activation,
        of=checkpoint.denoiser if controls else None,
        control=controls.control if controls else None,
    )


def _build(bundle: Bundle, backends: Sequence[BackendName], report: Report) -> dict[str, str]:
    return {backend: build_engines(bundle, backend, report=report).key.directory for backend in backends}


def _publish(directory: Path, target: Path, *, overwrite: bool) -> None:
    with disk_errors(target):
        shutil.rmtree(directory / MARKERS)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
    publish(directory, target, overwrite=overwrite)
    sweep(target.parent, glob.escape(target.name))  # killed exports to this place, with other options
