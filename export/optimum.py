"""Interchange with optimum: adopting graphs that it exported, and laying out `onnx/` so that it opens ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError
from latentrt.engines.graphs import link_data, load_graph
from latentrt.engines.manifest import ComponentSpec
from latentrt.engines.spec import Precision, TensorSpec
from latentrt.export.checkpoint import Checkpoint, graph_files
from latentrt.export.components import EXPORTED, Component
from latentrt.export.golden import open_graph, run_graph, specs, write_golden
from latentrt.export.tokenizer import ClipFiles, write_clip_files

TOKENIZER_CLASSES = ["transformers", "CLIPTokenizer"]


def adopt_graph(
    checkpoint: Checkpoint, part: Component, staged: Path, precision: Precision
) -> tuple[ComponentSpec, float]:
    """Copy a graph that was exported already, and record its golden pair with ONNX Runtime: no torch is needed."""
    graph, golden = f"onnx/{part.name}/model.onnx", f"golden/{part.name}.safetensors"
    sources = graph_files(checkpoint.folder(part.name))
    (staged / graph).parent.mkdir(parents=True)
    for source in sources[1:]:
        link_data(source, (staged / graph).parent)
    _copy_graph(sources[0], staged / graph)
    session = open_graph(staged / graph)
    takes, gives = specs(session)
    plan = part.plan(checkpoint.configs[part.name])
    _check_names(sources[0], part, takes, gives, precision)
    inputs = part.record(checkpoint.configs[part.name], EXPORTED)
    if any(spec.name == "timestep" and not spec.shape for spec in takes):
        inputs["timestep"] = inputs["timestep"][0]
    outputs = run_graph(session, inputs)
    write_golden(
        (inputs, {name: outputs[name].astype("float32") for name in plan.outputs if name in outputs}), staged / golden
    )
    files = (graph, *(f"onnx/{part.name}/{source.name}" for source in sources[1:]))
    weights = sum(source.stat().st_size for source in sources)
    return ComponentSpec(files=files, golden=golden, inputs=takes, outputs=gives, weights_bytes=weights), 0.0


def _copy_graph(source: Path, target: Path) -> None:
    """Copy a graph; a whole-number timestep becomes float32, so that the fractions of Karras' steps are not lost."""
    import onnx

    model = load_graph(source)
    steps = [value for value in model.graph.input if value.name == "timestep"]
    if not steps or steps[0].type.tensor_type.elem_type != onnx.TensorProto.INT64:
        shutil.copyfile(source, target)
        return
    steps[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]  # what was inferred for whole numbers
    onnx.save(model, str(target))
    try:
        open_graph(target)
    except CheckpointError:  # a node in it wants whole numbers: keep the graph as it was
        shutil.copyfile(source, target)


def _check_names(
    source: Path, part: Component, takes: tuple[TensorSpec, ...], gives: tuple[TensorSpec, ...], precision: Precision
) -> None:
    expected = {"text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"}
    names = [spec.name for spec in gives]
    if part.name in expected and expected[part.name] not in names:
        raise CheckpointError(
            f"{source} gives {', '.join(names)}, expected {expected[part.name]}; export it again with optimum 2"
        )
    dtype = {"fp16": "float16", "fp32": "float32"}[precision]
    floats = {spec.dtype for spec in (*takes, *gives) if spec.name not in ("timestep", "input_ids")}
    if floats != {dtype}:
        found = "fp16" if floats == {"float16"} else "fp32"
        raise CheckpointError(f"{source} computes in {', '.join(sorted(floats))}; export it with --precision {found}")


def write_configs(checkpoint: Checkpoint, clip: ClipFiles, folder: Path) -> None:
    """Write what optimum's pipelines read beside the graphs: configs, scheduler, tokenizer, model_index.json."""
    for name, config in checkpoint.configs.items():
        _write_json(folder / name / "config.json", dict(config))
    _write_json(folder / "scheduler" / "scheduler_config.json", dict(checkpoint.scheduler))
    write_clip_files(clip, folder / "tokenizer")
    _write_json(folder / "model_index.json", _index(checkpoint))


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": checkpoint.index.get("_diffusers_version", "0.36.0"),
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": checkpoint.index["scheduler"],
        "text_encoder": ["optimum.onnxruntime.modeling_diffusion", "ORTModelTextEncoder"],
        "tokenizer": TOKENIZER_CLASSES,
        "unet": ["optimum.onnxruntime.modeling_diffusion", "ORTModelUnet"],
        "vae_decoder": ["optimum.onnxruntime.modeling_diffusion", "ORTModelVaeDecoder"],
        "vae_encoder": ["optimum.onnxruntime.modeling_diffusion", "ORTModelVaeEncoder"],
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
