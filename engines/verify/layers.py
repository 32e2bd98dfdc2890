"""Which layer of a graph is the first to leave the reference: every tensor compared, by Polygraphy, in its order.

The reference is the canonical graph in float32 on the CPU, fed the recorded inputs. Beside it run the graph as it is
stored, where that is float16, and the graphs that were built for ONNX Runtime. A tensor is compared where both graphs
have one of its name. A compiled TensorRT engine has no tensors left to look at; `polygraphy run` builds one that has.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from latentrt.engines.backends import backend_on
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.bundle.manifest import EngineRecord
from latentrt.engines.compare import largest
from latentrt.engines.errors import BundleError, EngineError
from latentrt.engines.find import serving_engines
from latentrt.engines.graphs import edits as graphs
from latentrt.engines.onnxruntime import keys
from latentrt.engines.onnxruntime.library import Provider
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine, OnnxRuntimeOptions, load
from latentrt.engines.progress import Report, silent
from latentrt.engines.spec import Array, BackendName, EngineSpec, EngineView, Inputs
from latentrt.engines.verify.canonical_graph import Edit, open_canonical
from latentrt.engines.verify.canonical_view import as_canonical
from latentrt.engines.verify.polygraphy import require
from latentrt.engines.verify.references import Arrays, read_golden
from latentrt.engines.verify.tolerances import tolerance
from latentrt.engines.verify.verify import Layer, Row

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

AT_ONCE = 128  # layers whose tensors are in memory together
NAMED = 5  # offenders that are told
LEAST = 1e-12  # the least range that an error is a part of
FLOATS = (np.float16, np.float32)
CHANNELS_LAST = ".last"  # behind the name of a tensor that `graphs.channels_last` laid out so


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A graph to compare. files: the graph and its external data; provider, options: what computes it, and how"""

    spec: EngineSpec
    files: tuple[Path, ...]
    provider: Provider
    options: OnnxRuntimeOptions

    @property
    def component(self) -> str:
        """Return the name of the component that the graph is of."""
        return self.spec.component


def stored(bundle: Bundle, component: str) -> Subject:
    """Return a component's graph as it is stored."""
    told = bundle.manifest.components[component]
    spec = EngineSpec(component=component, inputs=told.inputs, outputs=told.outputs)
    files = tuple(bundle.path(name) for name in told.files)
    return Subject(spec=spec, files=files, provider="cpu", options=OnnxRuntimeOptions())


def built(component: str, directory: Path, record: EngineRecord, provider: Provider, *, device: int = 0) -> Subject:
    """Return a component's graph as it was built."""
    entry = record.entries[component]
    data = [name for name in record.files if name.startswith(f"{entry}.")]
    files = tuple(directory / name for name in (entry, *data))
    options = OnnxRuntimeOptions(tf32=keys.tf32_of(record.key), device=device)
    return Subject(spec=record.specs[component], files=files, provider=provider, options=options)


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """How many layers were compared, their largest error, and the first that left the reference, in order.

    After the first ones nothing is looked at: what follows them is wrong because of them.
    """

    layers: int
    error: float
    offenders: tuple[Layer, ...]


def compare_layers(bundle: Bundle, subject: Subject, limit: float) -> Compared:
    """Compare a graph's tensors with the reference's. Raises EngineError, BundleError and NotInstalledError.

    limit: of the largest difference, as a part of each tensor's largest magnitude
    """
    require()
    reference = graphs.load_graph(bundle.path(bundle.manifest.components[subject.component].graph))
    model = graphs.load_graph(subject.files[0])
    nodes = _makers(model, {name for node in reference.graph.node for name in node.output})
    names, seen, worst = list(nodes), 0, 0.0
    for first in range(0, len(names), AT_ONCE):
        part = {name: nodes[name][1] for name in names[first : first + AT_ONCE]}
        expected, found = _run_both(bundle, subject, part)
        errors, offenders = _compare(expected, found, limit)
        seen, worst = seen + len(errors), max([worst, *errors.values()])
        if offenders:
            layers = [_layer(*nodes[name], found[name].shape, errors[name]) for name in names if name in offenders]
            return Compared(layers=seen, error=worst, offenders=tuple(layers[:NAMED]))
    return Compared(layers=seen, error=worst, offenders=())


def _makers(model: ModelProto, theirs: set[str]) -> dict[str, tuple[NodeProto, str]]:
    """Return, by the reference's name of a tensor, who makes it first, and what it is called there."""
    made: dict[str, tuple[NodeProto, str]] = {}
    for node in model.graph.node:
        for own in node.output:
            name = own if own in theirs else own.removesuffix(CHANNELS_LAST)
            if name in theirs:
                made.setdefault(name, (node, own))
    return made


def _layer(node: NodeProto, tensor: str, shape: tuple[int, ...], error: float) -> Layer:
    return Layer(tensor=tensor, node=node.name, op_type=node.op_type, shape=shape, error=error)


def _compare(expected: Arrays, found: Arrays, limit: float) -> tuple[dict[str, float], set[str]]:
    """Return each tensor's error, and those that differ by more than Polygraphy is told to let pass."""
    if not expected:
        return {}, set()
    comparator, logger = require(), require("polygraphy.logger").G_LOGGER
    ranges = {name: max(largest(array), LEAST) for name, array in expected.items()}
    close = comparator.SimpleCompareFunc(
        atol={name: limit * size for name, size in ranges.items()},
        rtol=0.0,
        check_error_stat="max",
        infinities_compare_equal=True,  # attention's masks
    )
    with logger.verbosity(logger.CRITICAL), np.errstate(all="ignore"):
        verdicts = close(comparator.IterationResult(found), comparator.IterationResult(expected))
    errors = {name: _largest_difference(verdict) / ranges[name] for name, verdict in verdicts.items()}
    return errors, {name for name, verdict in verdicts.items() if not verdict}


def _largest_difference(verdict: Any) -> float:
    """Return what Polygraphy measured: infinity where something is not a number, or the shapes differ."""
    return float(np.nan_to_num(getattr(verdict, "max_absdiff", np.inf), nan=np.inf))


def _run_both(bundle: Bundle, subject: Subject, own: Mapping[str, str]) -> tuple[Arrays, Arrays]:
    """Return the float tensors that both graphs give for the recorded inputs, by the reference's names, in float32.

    own: what the subject calls them
    """
    inputs, _ = read_golden(bundle, subject.component)
    with tempfile.TemporaryDirectory(prefix="latentrt-layers-") as scratch:
        mark = partial(_mark, names=tuple(own))
        with open_canonical(bundle, subject.component, Path(scratch), edit=mark) as reference:
            expected = _floats(reference(inputs), own)
        mark = partial(_mark, names=tuple(own.values()))
        with contextlib.closing(_Recorded(_open(subject, Path(scratch), mark))) as recorded:
            as_canonical(recorded, bundle.manifest.latents)(inputs)
            theirs = _floats(recorded.last, own.values())
    found = {
        name: _channels_first(theirs[other]) if other != name else theirs[other]
        for name, other in own.items()
        if other in theirs
    }
    both = [name for name in own if name in expected and name in found]
    return {name: expected[name] for name in both}, {name: found[name] for name in both}


def _channels_first(array: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim > 2 else array


def _floats(outputs: Mapping[str, Array], names: Iterable[str]) -> Arrays:
    """Return copies of the float tensors among these, in float32."""
    return {name: outputs[name].astype(np.float32) for name in names if outputs[name].dtype in FLOATS}


class _Recorded(EngineView):
    """An engine whose last outputs are kept, of which a view around it may give few."""

    last: dict[str, Array]

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        self.last = self._engine(inputs)
        return self.last


def _open(subject: Subject, scratch: Path, edit: Edit) -> OnnxRuntimeEngine:
    """Open a graph with further outputs, each node as it was built."""
    model = graphs.load_graph(subject.files[0])
    edit(model)
    edited = scratch / subject.files[0].name
    for data in subject.files[1:]:
        graphs.link_data(data, scratch)
    graphs.save_graph(model, edited)
    return load(edited, subject.spec, subject.provider, subject.options).with_every_output()


def _mark(model: ModelProto, *, names: Sequence[str]) -> None:
    """Make tensors of a graph outputs of it, where they are none yet."""
    known = {output.name for output in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.add(name=name)


LAYERED: tuple[Provider, ...] = ("cpu", "cuda")  # the backends whose engines are graphs with tensors to look at


def verify_layers(
    bundle: Bundle, *, backend: BackendName | None = None, device: int = 0, report: Report = silent
) -> Iterator[Row]:
    """Compare, layer by layer, each component's float16 graph and what is built of it with the graph in float32.

    backend: only what was built for this one; device: which of the visible GPUs to run on, from 0
    Raises NotInstalledError where Polygraphy is missing, and EngineError on a backend that compiles layers away.
    """
    require()
    if backend is not None and backend not in LAYERED:
        raise EngineError(
            f"an engine of {backend} has no layers to look at; `latentrt inspect {bundle.root} --polygraphy DIR` "
            "prints the command that builds one that has (polygraphy run --trt)"
        )
    return _verify_layers(bundle, tuple(name for name in LAYERED if backend in (None, name)), device, report)


def _verify_layers(bundle: Bundle, backends: Sequence[Provider], device: int, report: Report) -> Iterator[Row]:
    for component, spec in bundle.manifest.components.items():
        if bundle.manifest.precision != "fp32":
            subject = stored(bundle, component)
            yield _compare_layers(bundle, subject, tolerance(spec, bundle.manifest.precision), report, "as stored")
        for name in backends:
            if backend_on(name, device).unavailable() is not None:
                continue
            for directory, record in serving_engines(bundle, name, device=device):
                subject = built(component, directory, record, name, device=device)
                limit = tolerance(spec, bundle.manifest.precision, record.key.precision)
                yield _compare_layers(bundle, subject, limit, report, name)


def _compare_layers(bundle: Bundle, subject: Subject, limit: float, report: Report, backend: str) -> Row:
    what = f"layers of {subject.component} ({backend})"
    report(what, 0, 1)
    try:
        compared = compare_layers(bundle, subject, limit)
    except (EngineError, BundleError) as error:
        return Row(what=subject.component, backend=backend, ok=False, message=str(error), profile="by layer")
    finally:
        report(what, 1, 1)
    first = next(iter(compared.offenders), None)
    return Row(
        what=subject.component,
        backend=backend,
        ok=first is None,
        message=f"first leaves the float32 graph at {first}" if first else f"{compared.layers} layers agree",
        error=compared.error,
        limit=limit,
        profile="by layer",
        layers=compared.offenders,
    )
