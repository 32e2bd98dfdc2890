"""A float16 bundle's denoisers in 8 bits, as far as they stand it, from what they meet when real prompts are drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from latentrt.engines.bundle.files import Bundle, record_file
from latentrt.engines.bundle.manifest import ComponentSpec, Manifest
from latentrt.engines.bundle.quantisation import Quantisation, QuantisedLevel
from latentrt.engines.errors import CheckpointError
from latentrt.engines.graphs import edits
from latentrt.engines.graphs.widen import widen
from latentrt.engines.progress import Report
from latentrt.engines.spec import Array, Quantised
from latentrt.export.graphs.external_data import save_graph, weights_bytes
from latentrt.export.graphs.golden import load_golden
from latentrt.export.graphs.half_precision import MATRIX_WORK
from latentrt.export.graphs.ranges import rounding_error
from latentrt.export.graphs.types import load_typed
from latentrt.export.quantisation.choose import choose_nodes
from latentrt.export.quantisation.levels import find_levels
from latentrt.export.quantisation.measure import Met, Stages
from latentrt.export.quantisation.prompts import Trial, trial_of
from latentrt.export.quantisation.scales import SCHEMES, find_scales, insert_scales

Draw = Callable[..., tuple[Array, Mapping[str, Sequence[Sequence[Met]]]]]
"""(bundle, {seed: prompt}, steps=…, guidance=…) -> pixels, and by denoiser, prompt and stage what it met"""

# Of `noise`, with all that is in 8 bits: 0.013 was 38 dB in pictures of the demo (docs/quantisation.md).
MOST_NOISE = 0.018


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """Prompts drawn in float32: the pixels of those that are held out, and what each denoiser met at all of them."""

    trial: Trial
    pixels: Array
    met: Mapping[str, Sequence[Sequence[Met]]]

    def part(self, denoiser: str, prompts: slice) -> list[Met]:
        """Return what a denoiser met at some of the prompts."""
        return [stage for stages in self.met[denoiser][prompts] for stage in stages]


def quantise(root: Path, manifest: Manifest, to: Quantised, draw: Draw, report: Report) -> Manifest:
    """Rewrite the denoisers of a float16 bundle that is being written. Returns what its manifest then says.

    Raises CheckpointError where a denoiser has no nodes whose names are known, or none that stands 8 bits.
    """
    what = f"drawing prompts for {to} (cpu)"
    report(what, 0, 2)
    drawn = _draw_first(Bundle(root=root, manifest=manifest), draw)
    trial = drawn.trial
    report(what, 1, 2)
    for name in manifest.denoisers:
        manifest = _with(manifest, name, root, _quantise_one(Bundle(root=root, manifest=manifest), name, to, drawn))
    again = dict([*enumerate(trial.prompts)][-trial.held_out :])
    pixels, _ = draw(Bundle(root=root, manifest=manifest), again, steps=trial.steps, guidance=trial.guidance)
    report(what, 2, 2)
    return _with_decibels(manifest, float(np.median(decibels(pixels, drawn.pixels))))


def _draw_first(bundle: Bundle, draw: Draw) -> _Drawn:
    trial = trial_of(bundle.manifest.provenance.checkpoint)
    pixels, met = draw(bundle, dict(enumerate(trial.prompts)), steps=trial.steps, guidance=trial.guidance)
    return _Drawn(trial=trial, pixels=pixels[-trial.held_out :], met=met)


def _quantise_one(bundle: Bundle, name: str, to: Quantised, drawn: _Drawn) -> ComponentSpec:
    """Rewrite one denoiser's graph in place. Returns what the manifest says of it, the decibels left open."""
    spec = bundle.manifest.components[name]
    graph = bundle.path(spec.graph)
    model = load_typed(graph)
    nodes = sum(node.op_type in MATRIX_WORK for node in model.graph)
    with tempfile.TemporaryDirectory(dir=bundle.root, prefix=".quantise-") as scratch:
        last = -drawn.trial.held_out
        shown, held_out = drawn.part(name, slice(0, last)), drawn.part(name, slice(last, None))
        stages = Stages(graph=_widened(graph, Path(scratch)), shown=shown, held_out=held_out)
        count, told = _into_8_bits(model, stages, name, to)
        weights = weights_bytes(model)
        files = _replace(model, graph, Path(scratch))
    return msgspec.structs.replace(
        spec,
        files=tuple(file.relative_to(bundle.root).as_posix() for file in files),
        weights=None,
        weights_bytes=weights,
        error=rounding_error(graph, [load_golden(bundle.path(spec.golden))], component=name),
        quantised=Quantisation(
            to=to,
            nodes=count,
            of=nodes,
            noise=told[-1].noise,
            decibels=0.0,
            prompts=drawn.trial.held_out,
            steps=drawn.trial.steps,
            levels=told,
        ),
    )


def _into_8_bits(
    model: ir.Model, stages: Stages, component: str, to: Quantised
) -> tuple[int, tuple[QuantisedLevel, ...]]:
    """Choose nodes of a float16 graph and put them into 8 bits in place. Returns how many, and what became of them."""
    levels, scheme = find_levels(model), SCHEMES[to]
    names = [node for level in levels for node in level.nodes]
    if not names:
        raise CheckpointError(
            f"{component}: none of its nodes has a name that is known to stand {to}; export it with --precision fp16"
        )
    scales = find_scales(model, names, stages.largest(names), scheme)
    chosen, told = choose_nodes(levels, partial(stages.loss, scales=scales, scheme=scheme), most=MOST_NOISE)
    if not chosen:
        raise CheckpointError(
            f"{component}: nothing of it stands {to}: each block adds noise of more than {MOST_NOISE} of the output; "
            "export it with --precision fp16"
        )
    insert_scales(model, chosen, scales, scheme, stored=True)
    return len(chosen), told


def _widened(graph: Path, folder: Path) -> Path:
    """Write a float16 graph as one that computes the same in float32; return where."""
    model, wide = edits.load_graph(graph), folder / "wide.onnx"
    widen(model, graph.parent, folder / "wide.data")
    edits.save_graph(model, wide)
    return wide


def _replace(model: ir.Model, graph: Path, folder: Path) -> list[Path]:
    """Write a model, whose weights may lie beside the graph, in the graph's place. Returns the graph and its data."""
    written = save_graph(model, folder / graph.name)
    for old in graph.parent.glob(f"{graph.name}*"):
        old.unlink()
    return [file.rename(graph.with_name(file.name)) for file in written]


def _with(manifest: Manifest, name: str, root: Path, spec: ComponentSpec) -> Manifest:
    """Return a manifest with another component of a name; the record of its weights, of which none remains, goes."""
    old = manifest.components[name]
    gone = {*old.files, *([old.weights] if old.weights else [])}
    if old.weights:
        (root / old.weights).unlink()
    files = {path: record for path, record in manifest.files.items() if path not in gone}
    files |= {path: record_file(root, path) for path in spec.files}
    return msgspec.structs.replace(
        manifest, components={**manifest.components, name: spec}, files=dict(sorted(files.items()))
    )


def _with_decibels(manifest: Manifest, found: float) -> Manifest:
    components = {
        name: spec
        if spec.quantised is None
        else msgspec.structs.replace(spec, quantised=msgspec.structs.replace(spec.quantised, decibels=found))
        for name, spec in manifest.components.items()
    }
    return msgspec.structs.replace(manifest, components=components)


def decibels(found: Array, expected: Array) -> Array:
    """Return the PSNR of each picture, (n, height, width, 3) uint8: 10 log10 of 255² over its mean square error."""
    error = np.square(found.astype(np.float64) - expected).reshape(len(found), -1).mean(axis=1)
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, 1e-3)))
