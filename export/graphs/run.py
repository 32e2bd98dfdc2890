"""Run graphs in ONNX Runtime on the CPU, sparing with memory: whole, or a piece at a time.

ONNX Runtime maps weights into memory and a run touches them all. A graph that is checked once needs no layer twice:
it is cut where enough weights have come together, each piece has a session of its own, and what crosses a cut are
the few values that are still needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Arrays = dict[str, Array]

# Weights of a piece. Half of it costs as many sessions more and saves nothing beside the libraries' 500 MB.
PIECE_BYTES = 128 << 20
LARGEST_IR = 10  # of onnx's format; what is made here needs none of the later ones


def open_session(graph: Path) -> object:
    """Open a whole graph."""
    return _session(str(graph), _options())


def run_session(session: object, inputs: Mapping[str, Array]) -> Arrays:
    """Run a session that `open_session` gave."""
    names = [output.name for output in session.get_outputs()]  # type: ignore[attr-defined]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))  # type: ignore[attr-defined]


def run_in_pieces(graph: Path, cases: Sequence[Mapping[str, Array]], *, optimise: bool = True) -> list[Arrays]:
    """Return the outputs of a graph for the inputs of each case, computed on the CPU.

    graph: its nodes in order, none with a graph inside it; its weights inside it or in files beside it
    optimise: False runs it node for node as it stands
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    values = [dict(case) for case in cases]
    for nodes, gives, needed in _cut(model.graph):
        piece = _piece(model, nodes, gives, values[0])
        session = _open(piece, graph.parent, optimise=optimise)
        for place, known in enumerate(values):
            takes = {each.name: known[each.name] for each in piece.graph.input}
            known |= run_session(session, takes)
            values[place] = {name: array for name, array in known.items() if name in needed}
        del session  # its weights are mapped until it is gone
    return [{output.name: known[output.name] for output in model.graph.output} for known in values]


def _cut(graph: GraphProto) -> Iterator[tuple[list[NodeProto], list[str], set[str]]]:
    """Yield the nodes of each piece, what it must give, and all values that are needed after it."""
    sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input if name}
    last_use |= {output.name: len(graph.node) for output in graph.output}
    for start, stop in _bounds([[sizes.get(name, 0) for name in node.input] for node in graph.node]):
        nodes = list(graph.node[start:stop])
        needed = {name for name, place in last_use.items() if place >= stop}
        yield nodes, [name for node in nodes for name in node.output if name in needed], needed


def _bounds(sizes: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield where pieces begin and end: before the node whose weights would make a piece too large."""
    start = held = 0
    for place, weights in enumerate(sizes):
        if held and held + sum(weights) > PIECE_BYTES:
            yield start, place
            start, held = place, 0
        held += sum(weights)
    yield start, len(sizes)


def _piece(
    model: ModelProto, nodes: Sequence[NodeProto], gives: Sequence[str], known: Mapping[str, Array]
) -> ModelProto:
    """Make a model of some nodes. Its inputs have the types of the values that are known by then."""
    from onnx import ValueInfoProto, helper

    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    inputs = sorted(read - made - {tensor.name for tensor in weights})
    return helper.make_model(
        helper.make_graph(
            nodes,
            "piece",
            [helper.make_tensor_value_info(name, _element_type(known[name]), None) for name in inputs],
            [ValueInfoProto(name=name) for name in gives],  # ONNX Runtime infers their types
            weights,
        ),
        opset_imports=model.opset_import,
        ir_version=min(model.ir_version, LARGEST_IR),
    )


def _element_type(array: Array) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)


def _open(piece: ModelProto, folder: Path, *, optimise: bool) -> object:
    """Open a piece whose weights lie in files in a folder."""
    options = _options(optimise=optimise)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return _session(piece.SerializeToString(), options)


def _session(model: str | bytes, options: Any) -> object:
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _options(*, optimise: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if optimise else levels.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are a second copy
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # Q and DQ are run as they stand
    return options


def _bytes(tensor: object) -> int:
    from onnx import TensorProto, helper

    assert isinstance(tensor, TensorProto)
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
