"""Interchange with optimum: adopting graphs that it exported, and laying out `onnx/` so that it opens ours.

Needs no torch: a graph that is there already is its own reference.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.engines.errors import CheckpointError
from latentrt.engines.graphs.edits import link_data
from latentrt.engines.spec import Precision, TensorSpec
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.configs.families import FAMILIES
from latentrt.export.graphs.external_data import DATA_SUFFIX, data_files, read_graph, rename_data
from latentrt.export.graphs.golden import make_inputs, save_golden
from latentrt.export.graphs.hidden_states import join_hidden_states
from latentrt.export.graphs.normalised_latents import Affine, normalise_graph, without_normalising
from latentrt.export.graphs.run import open_session, run_session
from latentrt.export.networks.components import Case, Component, input_specs, output_specs
from latentrt.export.sources.parts import TEXT_ENCODERS
from latentrt.export.sources.tokenizer import UNIGRAM, Vocabulary

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

CASES: tuple[Case, ...] = ("traced", "checked")


def adopt_graph(
    component: Component,
    folder: Path,
    graph: Path,
    golden: Path,
    *,
    dimensions: Mapping[str, int],
    precision: Precision,
    scaling_factor: float,
    shift: float = 0.0,
    affine: Affine | None = None,
    texts: Sequence[Sequence[int]] = (),
) -> list[Path]:
    """Copy a graph that was exported already and record its golden pair with ONNX Runtime.

    affine: what normalised latents add to half a VAE, which such a graph does not hold
    texts: as in `make_inputs`
    Returns the files, the graph first. Raises CheckpointError if names, dtypes or shapes are not those of the
    table.
    """
    source = folder / "model.onnx"
    takes = input_specs(component, dimensions, precision)
    theirs = read_graph(source)
    if dimensions["pooled_width"]:  # SDXL reads states that have had no norm, as optimum gives them
        join_hidden_states(theirs.graph)
    gives = _given(component, theirs, output_specs(component, dimensions, precision))
    data = _take_data(source, graph)
    names = {place: file.name for place, file in data.items()}
    rename_data(theirs, names)
    _write_ours(source, theirs, graph, takes, gives, affine=affine)
    session = _open(source, graph)
    # optimum's UNets are bound to multiples of their own factor: odd sizes are not asked of them
    traced, checked = (
        make_inputs(
            component,
            dimensions,
            which,
            precision=precision,
            scaling_factor=scaling_factor,
            shift=shift,
            texts=texts,
        )
        for which in CASES
    )
    outputs = run_session(session, traced)
    run_session(session, checked)
    save_golden(golden, traced, {spec.name: outputs[spec.name] for spec in gives})
    return [graph, *data.values()]


def _take_data(source: Path, graph: Path) -> dict[str, Path]:
    """Put a graph's external data beside the bundle's; returns the files by the location that the source names.

    Whatever their names were, they have the ecosystem's: one that a graph brings may be that of another file here.
    """
    graph.parent.mkdir(parents=True, exist_ok=True)
    taken = {}
    for number, (location, file) in enumerate(data_files(source).items()):
        name = graph.name + DATA_SUFFIX + (f"_{number}" if number else "")
        taken[location] = graph.with_name(name)
        taken[location].unlink(missing_ok=True)
        link_data(file, graph.parent, name=name)
    return taken


def _open(source: Path, graph: Path) -> object:
    try:
        return open_session(graph)
    except Exception as error:  # ONNX Runtime raises a dozen classes of its own, all straight from Exception
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"ONNX Runtime refused {source}: {first}; export it again with optimum") from error


def _given(component: Component, model: ModelProto, gives: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Leave out the extra outputs that this graph does not have."""
    found = {value.name for value in model.graph.output}
    extra = {tensor.name for tensor in component.outputs if tensor.extra}
    return tuple(spec for spec in gives if spec.name in found or spec.name not in extra)


def _write_ours(
    source: Path,
    model: ModelProto,
    target: Path,
    takes: tuple[TensorSpec, ...],
    gives: tuple[TensorSpec, ...],
    *,
    affine: Affine | None,
) -> None:
    """Write a graph with the names of axes, the inputs and the float32 timesteps that our tables promise.

    source: where the graph comes from, for the errors; affine: as in `adopt_graph`
    """
    import onnx

    _require(source, [value.name for value in model.graph.input], [spec.name for spec in takes], exact=True)
    _require(source, [value.name for value in model.graph.output], [spec.name for spec in gives], exact=False)
    _free_timestep(model)
    take_long_ids(model)
    del model.graph.value_info[:]  # what was inferred before the changes
    for value in list(model.graph.output):
        if value.name not in {spec.name for spec in gives}:  # such as the hidden states of each layer
            model.graph.output.remove(value)
    specs = {spec.name: spec for spec in (*takes, *gives)}
    for value in (*model.graph.input, *model.graph.output):
        _set_shape(source, value, specs[value.name])
    if affine:
        normalise_graph(model.graph, affine)
    onnx.save(model, str(target))


def _require(source: Path, found: list[str], expected: list[str], *, exact: bool) -> None:
    if set(expected) - set(found) or (exact and set(found) - set(expected)):
        raise CheckpointError(
            f"{source}: found the tensors {', '.join(found)}, expected {', '.join(expected)}; "
            "export it again with optimum"
        )


def _set_shape(source: Path, value: Any, spec: TensorSpec) -> None:
    import onnx

    found = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    if found != spec.dtype:
        other = {"float16": "fp16", "float32": "fp32"}.get(found)
        fix = f"export it with --precision {other}" if other else "export it again with optimum"
        raise CheckpointError(f"{source}: {spec.name} is {found}, not {spec.dtype}; {fix}")
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for axis in spec.shape:
        dim = shape.dim.add()
        if isinstance(axis, str):
            dim.dim_param = axis
        else:
            dim.dim_value = axis


def _free_timestep(model: ModelProto) -> None:
    """Make a whole-number scalar timestep a float32 vector with one entry, or one a row.

    The trace turns the scalar into a vector (Unsqueeze or Reshape), expands it to the batch and casts it to float:
    without the first node, and with another type, the rest does what it did.
    """
    import onnx

    graph = model.graph
    found = [value for value in graph.input if value.name == "timestep"]
    if not found:
        return
    tensor = found[0].type.tensor_type
    if len(tensor.shape.dim) == 0:
        _skip_first_reshape(graph)
    tensor.elem_type = onnx.TensorProto.FLOAT


def take_long_ids(model: ModelProto) -> None:
    """Have a text encoder that takes tokens of 32 bits, as older exports do, take 64 as all others."""
    from onnx import TensorProto, helper

    for value in model.graph.input:
        if value.name == "input_ids" and value.type.tensor_type.elem_type == TensorProto.INT32:
            for node in model.graph.node:
                node.input[:] = ["input_ids_32" if name == value.name else name for name in node.input]
            model.graph.node.insert(0, helper.make_node("Cast", [value.name], ["input_ids_32"], to=TensorProto.INT32))
            value.type.tensor_type.elem_type = TensorProto.INT64


def _skip_first_reshape(graph: GraphProto) -> None:
    readers = [node for node in graph.node if "timestep" in node.input]
    for node in readers:
        if node.op_type not in ("Unsqueeze", "Reshape"):
            raise CheckpointError(f"the UNet's timestep feeds {node.op_type}; export it again with optimum 2")
    for node in readers:
        for reader in graph.node:
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = "timestep"
        graph.node.remove(node)


def write_configs(checkpoint: Checkpoint, tokenizers: Mapping[str, Vocabulary], folder: Path) -> list[Path]:
    """Write what optimum's pipelines read beside the graphs, where any opens them. Returns the files."""
    if FAMILIES[checkpoint.family].pipeline is None:
        return []
    graphs = {name: without_normalising(checkpoint.configs[name]) for name in checkpoint.normalising}
    documents = {f"{name}/config.json": dict(config) for name, config in {**checkpoint.configs, **graphs}.items()}
    documents["scheduler/scheduler_config.json"] = dict(checkpoint.scheduler)
    documents["model_index.json"] = _index(checkpoint)
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, tokenizer in tokenizers.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        tokenizer.write_files(folder / name)
    vocabularies = [path for name in tokenizers for path in sorted((folder / name).iterdir())]
    return [*(folder / name for name in documents), *vocabularies]


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    module = "optimum.onnxruntime.modeling_diffusion"
    texts = {name: [module, "ORTTextEncoder"] for name in TEXT_ENCODERS if name in checkpoint.networks}
    kinds = dict.fromkeys(UNIGRAM, "T5TokenizerFast")
    vocabularies = {name: ["transformers", kinds.get(name, "CLIPTokenizer")] for name in checkpoint.tokenizers}
    return {
        "_class_name": FAMILIES[checkpoint.family].pipeline,
        "_diffusers_version": checkpoint.index.get("_diffusers_version", "0.36.0"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        **({"force_zeros_for_empty_prompt": checkpoint.zero_negative} if checkpoint.dimensions["pooled_width"] else {}),
        "scheduler": ["diffusers", checkpoint.schedule.scheduler],
        **texts,
        **vocabularies,
        "unet": [module, "ORTUnet"],
        "vae_decoder": [module, "ORTVaeDecoder"],
        "vae_encoder": [module, "ORTVaeEncoder"],
    }
