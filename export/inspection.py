"""What lies at a path before anything is exported: read from JSON and safetensors headers alone, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.parsing import ParseError, read_document
from latentrt.engines.bundle.safetensors_header import PICKLES, StoredTensor, TensorFile, read_header, weights_format
from latentrt.engines.errors import CheckpointError
from latentrt.engines.lora.file import read_lora
from latentrt.export.additions.controlnet_files import DIFFERENCE
from latentrt.export.additions.controlnets import CLASSES
from latentrt.export.additions.t2i_adapters import KIND as ADAPTER_KIND
from latentrt.export.checkpoint import DEMO, Checkpoint, open_checkpoint
from latentrt.export.configs.defaults import per_level
from latentrt.export.configs.families import (
    BASES,
    CONTROLNET,
    FAMILIES,
    INPUTS,
    LABELS,
    LORA,
    SUPPORTED,
    TRANSFORMER,
    name_pipeline,
    option_for,
)
from latentrt.export.sources.diffusers_folder import graph_files
from latentrt.export.sources.hub import find_cached
from latentrt.export.sources.parts import TEXT_ENCODERS, denoiser_of
from latentrt.export.sources.places import HUB_ID, find_place
from latentrt.export.sources.recognise_file import SingleFile, name_other, recognise
from latentrt.export.sources.weight_files import find_weights, has_safetensors

# What shapes cannot tell, for the reader who chooses steps and guidance.
DISTILLED = (
    "whether it was distilled to few steps (LCM, Turbo, Lightning, Hyper) cannot be told from the weights: "
    "its author's page names the steps and the guidance"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network's weights.

    parameters: their number, None if it is a graph, which is not opened
    dtypes: the share of the bytes that each type has, largest first
    """

    name: str
    kind: str
    parameters: int | None
    bytes: int
    dtypes: Mapping[str, float]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a path holds.

    layout: how it is stored, in words
    model: what it was recognised as, empty if it was not
    prediction: what the denoiser predicts and how that is known, None if there is no denoiser
    notes: what cannot be told, or should be known
    problem: why it cannot be exported as it is and what fixes that, None if it can
    """

    path: str
    layout: str
    model: str
    networks: tuple[Network, ...]
    prediction: str | None = None
    picture: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    problem: str | None = None


def inspect_checkpoint(name: str, *, revision: str | None = None) -> Inspection:
    """Say what a path that is not a bundle holds, or a hub id that was fetched before, or `demo`.

    Raises CheckpointError if there is nothing, or where a file is damaged.
    """
    path = DEMO if name == "demo" else find_place(name, revision=revision)
    if not path.exists() and HUB_ID.fullmatch(name):
        path = find_cached(name, revision=revision) or path
    if not path.exists():
        raise CheckpointError(
            f"there is no bundle at '{name}', nor a checkpoint; give a bundle, a directory, a safetensors file, "
            "or a hub id that was fetched before"
        )
    if path.is_dir():
        return _inspect_folder(path)
    kind = weights_format(path)
    if kind == "pickle":
        problem = "a pickle can run any code when it is opened, so it was not; look for a safetensors file of the same"
        return Inspection(path=str(path), layout="a pickle", model="", networks=(), problem=problem)
    if kind is None:
        raise CheckpointError(f"'{path}' is neither a directory nor a safetensors file; give a checkpoint or a bundle")
    return _inspect_file(read_header(path))


def _inspect_file(file: TensorFile) -> Inspection:
    single = recognise(file)
    if single is None:
        return _inspect_part(file)
    networks = {name: (name, tensors.values(), (file.path.name,)) for name, tensors in single.networks().items()}
    return Inspection(
        path=str(file.path),
        layout="a checkpoint in one safetensors file",
        model=single.label,
        networks=tuple(_network(name, *row) for name, row in networks.items()),
        prediction=f"{single.prediction or 'unknown'} ({single.reason})",
        notes=(DISTILLED, *_title(file), *_strangers(single), *_absent(single)),
        problem=_problem(file.path),
    )


def _title(file: TensorFile) -> list[str]:
    title = file.metadata.get("modelspec.title")
    return [f"its metadata call it '{title}'"] if title else []


def _strangers(single: SingleFile) -> list[str]:
    names = ", ".join(single.strangers[:3]) + (", …" if len(single.strangers) > 3 else "")
    return [f"it holds tensors of no network that is known here: {names}"] if names else []


def _absent(single: SingleFile) -> list[str]:
    networks = single.networks()
    absent = [] if set(networks) & set(TEXT_ENCODERS) else ["text encoder"]
    return [f"it holds no {name}" for name in (*absent, *(() if "vae" in networks else ("VAE",)))]


def _inspect_part(file: TensorFile) -> Inspection:
    """Describe a file that is not a whole checkpoint of a Stable Diffusion."""
    name, denoiser = name_other(file)
    keys = ", ".join(sorted(file.tensors)[:3])
    if name == CONTROLNET:
        problem = _addition(CONTROLNET, file.path, _base_of(file))
    elif denoiser:
        problem = f"{name} was recognised by its keys and is not supported; expected {SUPPORTED}"
    elif name:
        problem = f"a {name} is a part or an addition, not a checkpoint; give the checkpoint that it belongs to"
        problem += f", and this with {option_for(name)}" if option_for(name) else ""
    else:
        problem = f"it is nothing that is known here: {len(file.tensors)} tensors, the first named {keys}"
    changes = _changes(file) if name == LORA else []
    if name == CONTROLNET and DIFFERENCE in file.tensors:
        changes = ["its weights are differences to a UNet's: those of the checkpoint that it is added to"]
    network = _network(name or "unknown", name, file.tensors.values(), (file.path.name,))
    known = ("ss_base_model_version", "ss_network_dim", "ss_network_alpha", "modelspec.architecture", "modelspec.title")
    notes = (*changes, *(f"its metadata say {key}: {file.metadata[key]}" for key in known if key in file.metadata))
    return Inspection(
        path=str(file.path),
        layout="one safetensors file",
        model=name,
        networks=(network,),
        notes=notes,
        problem=problem,
    )


def _base_of(file: TensorFile) -> str | None:
    """Return what a ControlNet in a file was made for, by the width of the text that it attends to."""
    widths = (stored.shape[-1] for key, stored in file.tensors.items() if key.endswith(".attn2.to_k.weight"))
    base = BASES.get(next(widths, 0))
    return base.label if base else None


def _addition(kind: str, path: Path, base: str | None) -> str:
    """Say what becomes of a ControlNet or an adapter. base: what it was made for, where that is known"""
    option = "--controlnet" if kind == CONTROLNET else "--adapter"
    return (
        f"a {kind} is a part or an addition, not a checkpoint; add it to "
        + (f"one of {base}" if base else "its own")
        + f" with: latentrt export CHECKPOINT BUNDLE {option} NAME={path}"
    )


def _changes(file: TensorFile) -> list[str]:
    """Say how many modules a LoRA changes, and by what rank; or why it cannot be read."""
    try:
        lora = read_lora(file.path)
    except CheckpointError as error:
        return [str(error)]
    sentences = []
    for part, targets in lora.modules.items():
        kinds: dict[str, set[int]] = {}
        for target in targets:
            kinds.setdefault(lora.kind_name(part, target), set()).update({lora.rank(part, target) or 0} - {0})
        changed = " and ".join(_ranked(kind, sorted(ranks)) for kind, ranks in kinds.items())
        sentences.append(f"it changes {len(targets)} of the {part}'s parameters, by {changed}")
    sentences += ["it is added to a checkpoint with: latentrt export CHECKPOINT BUNDLE --lora FILE:SCALE"]
    return [*sentences, "it is added to one call with: latentrt generate BUNDLE PROMPT --lora FILE:SCALE"]


def _ranked(kind: str, ranks: Sequence[int]) -> str:
    if not ranks:
        return kind
    return f"{kind} of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")


def _inspect_folder(root: Path) -> Inspection:
    index = _json(root / "model_index.json")
    if not index:
        return _inspect_lone_folder(root)
    denoiser = root / denoiser_of(index)
    onnx = (denoiser / "model.onnx").is_file() and not has_safetensors(denoiser)
    networks, faults = _folder_networks(root, index)
    scheduler = _json(root / "scheduler" / "scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon") if scheduler else None
    try:
        checkpoint = open_checkpoint(str(root))
        problem, model = None, ", ".join([LABELS[checkpoint.family], *_additions(checkpoint)])
        picture, prediction = checkpoint.default_size, checkpoint.schedule.prediction_type
    except CheckpointError as error:
        problem, model, picture = str(error), name_pipeline(str(index.get("_class_name"))), None
    return Inspection(
        path=str(root),
        layout="a directory in the layout of " + ("optimum (ONNX graphs)" if onnx else "diffusers"),
        model=model,
        networks=tuple(networks),
        prediction=f"{prediction} ({scheduler.get('_class_name')})" if prediction else None,
        picture=picture,
        notes=tuple(fault for fault in faults if fault != problem),
        problem=problem,
    )


def _additions(checkpoint: Checkpoint) -> list[str]:
    """Name what a denoiser takes beyond its family's, and what its checkpoint is without."""
    dimensions, channels = checkpoint.dimensions, checkpoint.latents.channels
    takes = dimensions["unet_channels"]
    more = [INPUTS.get(takes - channels + 4, f"with {takes} input channels")] if takes != channels else []
    absent = [text for text in FAMILIES[checkpoint.family].held(checkpoint.networks) if text.component is None]
    return (
        more + (["for latent consistency"] if dimensions["guidance_width"] else []) + (["without T5"] if absent else [])
    )


def _folder_networks(root: Path, index: Mapping[str, Any]) -> tuple[list[Network], list[str]]:
    """Measure every network that the index names; returns them, and a sentence for each that is not whole."""
    networks: list[Network] = []
    faults: list[str] = []
    for name, entry in index.items():
        kind = entry[-1] if isinstance(entry, list) and entry else None
        if kind is None:
            continue
        folder = root / name
        if not folder.is_dir():
            faults.append(f"model_index.json names {name} ({kind}), and there is no {name}/")
        elif measure := _measure(folder):
            try:
                networks.append(measure(name, str(kind), folder))
            except CheckpointError as error:
                faults.append(str(error))
    return networks, faults


def _measure(folder: Path) -> Callable[[str, str, Path], Network] | None:
    """Return how a folder's network is measured, by its weights rather than by its graph; None if it has neither."""
    if (folder / "model.onnx").is_file() and not has_safetensors(folder):
        return _graph
    return _folder_network if _holds_weights(folder) else None


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir()) or any(folder.glob("*.index.*"))


def _folder_network(name: str, kind: str, folder: Path) -> Network:
    found = find_weights(folder)
    tensors = [stored for shard in found.shards for stored in shard.tensors.values()]
    return _network(name, kind, tensors, tuple(f"{folder.name}/{path.name}" for path in found.paths))


def _graph(name: str, kind: str, folder: Path) -> Network:
    files = graph_files(folder)
    size = sum(path.stat().st_size for path in files)
    names = tuple(f"{folder.name}/{path.name}" for path in files)
    return Network(name=name, kind=kind, parameters=None, bytes=size, dtypes={}, files=names)


def _inspect_lone_folder(root: Path) -> Inspection:
    """Describe a folder that is not a whole checkpoint, perhaps one network of it."""
    config = _json(root / "config.json")
    kind = str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    networks = (_folder_network(kind, kind, root),) if kind and _holds_weights(root) else ()
    files = sorted(path.name for path in root.iterdir() if path.suffix == ".safetensors")
    problem = "it holds no model_index.json: give a directory in diffusers' or optimum's layout"
    if kind in CLASSES:
        problem = _addition(CONTROLNET, root, _controlled(config))
    elif kind == ADAPTER_KIND:
        problem = _addition("T2I-Adapter", root, None)
    elif kind:
        problem = f"it is one network ({kind}), not a checkpoint; give the directory that it is a part of"
    elif files:
        problem += f", or the file itself: {', '.join(files[:3])}"
    return Inspection(path=str(root), layout="a directory", model=kind, networks=networks, problem=problem)


def _controlled(config: Mapping[str, Any]) -> str | None:
    """Return what a ControlNet's config was made for: those of transformers attend to text in another way."""
    if "joint_attention_dim" in config:
        return TRANSFORMER.label
    base = BASES.get(max(per_level(config.get("cross_attention_dim", 1280), 1)))
    return base.label if base else None


def _network(name: str, kind: str, tensors: Iterable[StoredTensor], files: tuple[str, ...]) -> Network:
    tensors = list(tensors)
    total = sum(stored.end - stored.start for stored in tensors)
    shares: dict[str, float] = {}
    for stored in tensors:
        shares[stored.dtype] = shares.get(stored.dtype, 0.0) + (stored.end - stored.start) / max(total, 1)
    return Network(
        name=name,
        kind=kind,
        parameters=sum(stored.size for stored in tensors),
        bytes=total,
        dtypes={dtype: round(share, 4) for dtype, share in sorted(shares.items(), key=lambda row: -row[1])},
        files=files,
    )


def _problem(path: Path) -> str | None:
    try:
        open_checkpoint(str(path))
    except CheckpointError as error:
        return str(error)
    return None


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object, an empty one where the file is absent or something else."""
    try:
        document = read_document(path, strict=False)
    except ParseError:
        return {}
    return document if isinstance(document, dict) else {}
