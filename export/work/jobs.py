"""One component's work: load it, record golden pairs, write its graph, narrow or check it.

Each phase has its own process.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from latentrt.engines.bundle.files import disk_errors, record_file
from latentrt.engines.bundle.manifest import FileRecord
from latentrt.engines.bundle.parsing import ParseError
from latentrt.engines.bundle.weight_map import GraphWeights, graph_record, read_weights, write_weights
from latentrt.engines.errors import BundleError, CheckpointError
from latentrt.engines.spec import Precision
from latentrt.export.graphs import golden
from latentrt.export.graphs.normalised_latents import Affine
from latentrt.export.networks.components import COMPONENTS, Case, input_specs, output_specs
from latentrt.export.sources.parts import ImageAdapter, SharedEncoder, Source, WeightSource
from latentrt.export.work.finished import (
    MARKERS,
    Finished,
    golden_path,
    graph_path,
    parse_marker,
    peak_rss_bytes,
    weights_bytes,
    write_marker,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from latentrt.export.networks.streamed_weights import StoredWeights
    from latentrt.export.networks.weight_places import Places

CASES: tuple[Case, ...] = ("traced", "odd")  # the golden pair's sizes, and others the graph must hold at
Phase = Literal["make", "check", "narrow", "adopt"]
# No phase holds a network's weights: `streamed_weights.py` reads a layer's when it computes, `run.py` runs a graph in
# pieces. A graph is checked in another process than the one that made it, because torch's tracer keeps what it made.
PHASES: Mapping[tuple[Source, Precision], tuple[Phase, ...]] = {
    ("torch", "fp32"): ("make", "check"),
    ("torch", "fp16"): ("make", "narrow"),
    ("onnx", "fp32"): ("adopt",),
    ("onnx", "fp16"): ("adopt",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What one process needs to know.

    row: of the table of components; ControlNets share one
    folder: holds the weights or the graph
    weight_source: how to write that folder first, None if it is there
    root: the staged bundle
    shared: what must have the same weights
    affine: what normalised latents add to half a VAE
    texts: tokens of real prompts, for a text encoder that is shown those
    image_adapters: whose images the network attends to
    skip_layers: the blocks of a transformer that a model row may skip
    """

    component: str
    row: str
    source: Source
    folder: str
    root: str
    precision: Precision
    dimensions: Mapping[str, int]
    scaling_factor: float
    shift: float = 0.0
    weight_source: WeightSource | None = None
    shared: SharedEncoder | None = None
    affine: Affine | None = None
    texts: tuple[tuple[int, ...], ...] = ()
    image_adapters: tuple[ImageAdapter, ...] = ()
    skip_layers: tuple[int, ...] = ()
    phase: Phase = "make"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the phases that finish the component, in order."""
        return PHASES[self.source, self.precision]


def run_job(job: ExportJob) -> Finished:
    """Do one phase of a component's work; the last one leaves its marker. Raises CheckpointError and BundleError."""
    start = time.perf_counter()
    root = Path(job.root)
    work: Mapping[Phase, Callable[[ExportJob], Finished]] = {
        "make": _make,
        "check": _check,
        "narrow": _narrow,
        "adopt": _adopt,
    }
    with disk_errors(root):
        (root / MARKERS).mkdir(exist_ok=True)
        finished = work[job.phase](job)
        finished = dataclasses.replace(
            finished,
            seconds=round(finished.seconds + time.perf_counter() - start, 3),
            peak_rss_bytes=max(finished.peak_rss_bytes, peak_rss_bytes()),
        )
        last = job.phase == job.phases[-1]
        write_marker(root, job.component if last else f"{job.component}.made", finished)
    return finished


def _make(job: ExportJob) -> Finished:
    """Load the network, record both pairs, write its graph in float32: a layer's weights at a time."""
    from latentrt.export.graphs.external_data import save_graph
    from latentrt.export.networks.streamed_weights import StoredWeights
    from latentrt.export.networks.weight_names import NAMED, name_weights

    if job.shared:
        _require_shared(job, job.shared)
    with _loaded(job) as (module, config):
        weights = StoredWeights(module)
        _record_pairs(job, module, weights)
        model, places, kept = _graph(job, module, config, weights)
        if job.component in NAMED:
            write_weights(Path(job.root) / graph_record(job.component), name_weights(model, weights, places))
        files = save_graph(model, _float32_graph(job))
    finished = _finished(job, files if job.precision == "fp32" else [])
    return dataclasses.replace(finished, graph="kept" if kept else "traced")


def _record_pairs(job: ExportJob, module: nn.Module, weights: StoredWeights) -> None:
    """Write both pairs: what torch computes in float32."""
    from latentrt.export.networks import modules

    component = COMPONENTS[job.row]
    gives = output_specs(component, job.dimensions, "fp32")
    for which, path in zip(CASES, _pairs(job), strict=True):
        inputs = golden.make_inputs(
            component,
            job.dimensions,
            which,
            precision=job.precision,
            scaling_factor=job.scaling_factor,
            texts=job.texts,
            shift=job.shift,
        )
        with weights.lent():
            outputs = modules.run(module, inputs, [spec.name for spec in gives])
        golden.require_finite(job.component, outputs)
        golden.save_golden(path, inputs, outputs)


def _graph(
    job: ExportJob, module: nn.Module, config: Mapping[str, Any], weights: StoredWeights
) -> tuple[ir.Model, Places, bool]:
    """Return the graph with its weights, what it holds of them, and whether it was kept from an earlier export."""
    from latentrt.export.graphs import kept_traces

    component = COMPONENTS[job.row]
    takes, gives = (specs(component, job.dimensions, "fp32") for specs in (input_specs, output_specs))
    axes, inputs = component.axes(job.dimensions), golden.widen(golden.load_golden(_pairs(job)[0])[0])
    told = {
        "module": [repr(module), _normed(job), job.scaling_factor, job.shift, msgspec.to_builtins(job.affine)],
        "weights": weights.structure(),
        "tensors": msgspec.to_builtins((*takes, *gives)),
        "sizes": {name: array.shape for name, array in inputs.items()},
        "axes": axes,
    }

    def trace() -> ir.Model:
        import torch

        from latentrt.export.graphs.trace import trace_graph
        from latentrt.export.networks.frames import Framed
        from latentrt.export.networks.windows import trace_windows

        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        if isinstance(module, Framed):
            return trace_windows(module, tensors, takes, gives, axes=axes)
        return trace_graph(module, tensors, takes, gives, axes=axes)

    return kept_traces.graph_of(kept_traces.key_of(config, told), weights, trace)


def _require_shared(job: ExportJob, shared: SharedEncoder) -> None:
    """Raise CheckpointError if the network that is to be shared has other weights in the other checkpoint."""
    from latentrt.export.networks import shared_encoder

    # A LoRA changes the text for both: the checkpoints' own are what must be the same.
    plain = dataclasses.replace(job.weight_source, loras=()) if job.weight_source else None
    with _loaded(dataclasses.replace(job, weight_source=plain)) as (module, _):
        shared_encoder.require_same(job.component, module, shared)


def _float32_graph(job: ExportJob) -> Path:
    """Return where the float32 graph is written: in the bundle, or beside it where a float16 one is made of it."""
    root = Path(job.root)
    if job.precision == "fp32":
        return root / graph_path(job.component)
    return root / MARKERS / f"{job.component}.float32" / "model.onnx"


@contextmanager
def _loaded(job: ExportJob) -> Iterator[tuple[nn.Module, Mapping[str, Any]]]:
    """Load the network and its config; where it has a weight source, its folder is there for the block alone."""
    from latentrt.export.networks import conversion, loading

    load = partial(
        loading.load,
        job.row,
        takes=tuple(tensor.name for tensor in COMPONENTS[job.row].takes(job.dimensions)),
        normed=_normed(job),
        scaling_factor=job.scaling_factor,
        shift=job.shift,
        affine=job.affine,
        image_adapters=job.image_adapters,
        skip_layers=job.skip_layers,
        dtype=None,
    )
    if job.weight_source is None:
        yield load(Path(job.folder)), _config(Path(job.folder))
        return
    with conversion.written(job.weight_source, Path(job.folder)) as folder:
        try:
            module = load(folder)
        except CheckpointError as error:  # the user knows the file, not the folder made of it
            raise CheckpointError(str(error).replace(str(folder), job.weight_source.files[0])) from error
        yield module, _config(folder)


def _config(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _normed(job: ExportJob) -> bool:
    """Tell whether the states of earlier layers of a text encoder have had a norm: SDXL's UNets read them without."""
    return not job.dimensions["pooled_width"]


def _check(job: ExportJob) -> Finished:
    """Compare the graph that was made with the recorded pairs."""
    pairs = [golden.load_golden(path) for path in _pairs(job)]
    error = golden.check_graph(job.component, _float32_graph(job), pairs, precision=job.precision)
    return dataclasses.replace(_made(job), error=error)


def _narrow(job: ExportJob) -> Finished:
    """Make a float16 graph of the float32 one, and compare it with the recorded pairs."""
    from latentrt.export.graphs import half_precision as precision

    made, wide = _made(job), _float32_graph(job)
    narrowed = precision.narrow_graph(
        wide,
        Path(job.root) / graph_path(job.component),
        [golden.load_golden(path) for path in _pairs(job)],
        component=job.component,
        takes=made.inputs,
        gives=made.outputs,
    )
    shutil.rmtree(wide.parent)
    if narrowed.exponents and (record := Path(job.root) / graph_record(job.component)).is_file():
        write_weights(record, read_weights(record, GraphWeights).held_at(narrowed.exponents))
    return dataclasses.replace(
        made,
        files=_records(job, narrowed.files),
        weights_bytes=weights_bytes(narrowed.files[0]),
        error=narrowed.error,
        float32_layers=narrowed.float32_layers,
        largest_activation=narrowed.largest,
    )


def _made(job: ExportJob) -> Finished:
    marker = Path(job.root) / MARKERS / f"{job.component}.made.json"
    try:
        return parse_marker(marker)
    except ParseError as error:
        raise BundleError(f"{marker} {error}; run the command again: it resumes") from None


def _adopt(job: ExportJob) -> Finished:
    """Take over a graph that another exporter made."""
    from latentrt.export.graphs import optimum

    root = Path(job.root)
    files = optimum.adopt_graph(
        COMPONENTS[job.row],
        Path(job.folder),
        root / graph_path(job.component),
        root / golden_path(job.component),
        dimensions=job.dimensions,
        precision=job.precision,
        scaling_factor=job.scaling_factor,
        shift=job.shift,
        affine=job.affine,
        texts=job.texts,
    )
    finished = _finished(job, files)
    _, recorded = golden.load_golden(root / golden_path(job.component))  # without the extra outputs it does not have
    return dataclasses.replace(finished, outputs=tuple(spec for spec in finished.outputs if spec.name in recorded))


def _pairs(job: ExportJob) -> tuple[Path, Path]:
    """Return where the golden pair and the pair at odd sizes lie; only the first is part of the bundle."""
    root = Path(job.root)
    return root / golden_path(job.component), root / MARKERS / f"{job.component}.odd.safetensors"


def _finished(job: ExportJob, files: list[Path]) -> Finished:
    """Describe a component; without files, one whose graph is not there yet."""
    component = COMPONENTS[job.row]
    return Finished(
        component=job.component,
        files=_records(job, files),
        inputs=input_specs(component, job.dimensions, job.precision),
        outputs=output_specs(component, job.dimensions, job.precision),
        weights_bytes=weights_bytes(files[0]) if files else 0,
        error=None,
        seconds=0.0,
        peak_rss_bytes=0,
    )


def _records(job: ExportJob, files: list[Path]) -> dict[str, FileRecord]:
    root = Path(job.root)
    names = [path.relative_to(root).as_posix() for path in files]
    record = graph_record(job.component)
    others = [golden_path(job.component), *([record] if (root / record).is_file() else [])]
    return {name: record_file(root, name) for name in (*names, *others)}
