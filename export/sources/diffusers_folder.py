"""Take apart a directory in diffusers' layout, or one of optimum's: its documents, its weights, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.parsing import ParseError, read_document
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.defaults import complete
from latentrt.export.configs.families import (
    DENOISER_CLASSES,
    OTHER_FORMATS,
    OTHER_NETWORKS,
    OTHER_UNETS,
    SUPPORTED,
    name_pipeline,
)
from latentrt.export.graphs.external_data import data_files
from latentrt.export.sources.parts import (
    CLASSES,
    FURTHER,
    PARTS,
    TEXT_ENCODERS,
    Part,
    Parts,
    Source,
    WeightSource,
    denoiser_of,
    folders,
    further_networks,
)
from latentrt.export.sources.weight_files import find_pickles, find_weights, has_safetensors, is_pickle

VAE, TINY = "AutoencoderKL", "AutoencoderTiny"  # diffusers' classes


def open_folder(root: Path, *, allow_pickle: bool = False, without: Collection[str] = ()) -> Parts:
    """Take apart a directory with a model_index.json.

    without: text encoders to leave where they are
    Raises CheckpointError if it is incomplete, damaged or another model.
    """
    index = read_json(root / "model_index.json")
    _refuse_other_networks(root, index)
    denoiser = denoiser_of(_roles(index))
    source = source_of(root, {path.name for path in root.glob(f"{denoiser}/*")}, folder=denoiser)
    _refuse_other_unets(root)
    further = set(FURTHER.get(_class_of(index, denoiser), ()))
    networks = folders(source, (_roles(index) - set(further_networks()) | further) - set(without))
    tokenizers = [tokenizer for name, tokenizer in TEXT_ENCODERS.items() if name in networks]
    _require_folders(root, (*dict.fromkeys(networks.values()), "scheduler", *tokenizers))
    parts = {name: CLASSES.get(_class_of(index, folder), PARTS[name]) for name, folder in networks.items()}
    return Parts(
        root=root,
        source=source,
        index=index,
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        configs={component: read_config(part, root / networks[component]) for component, part in parts.items()},
        networks={
            component: open_network(part, root / networks[component], allow_pickle=allow_pickle)
            for component, part in parts.items()
        },
        tokenizers={name: root / name for name in tokenizers},
        files=_files(root, source, (networks.values(), tokenizers), allow_pickle=allow_pickle),
    )


def source_of(where: object, files: Collection[str], *, folder: str = "unet") -> Source:
    """Return what a directory is read as: graphs only where there are no weights, of which anything can be made.

    files: the names of its denoiser's files; folder: which these are in
    Raises CheckpointError if none of them is in a form that is read.
    """
    if any(name.endswith(".safetensors") for name in files):
        return "torch"
    if "model.onnx" in files and "config.json" not in files:
        raise CheckpointError(
            f"'{where}' was recognised as graphs that diffusers exported (OnnxStableDiffusionPipeline): they come "
            "without the configs that say what they are, and their VAE encoder draws at random; "
            "give the checkpoint that they were made from, or let optimum export it"
        )
    if "model.onnx" in files:
        return "onnx"
    other = next((name for name in OTHER_FORMATS if name in files), None)
    if other and not any(map(is_pickle, files)):
        raise CheckpointError(
            f"'{where}' was recognised as {OTHER_FORMATS[other]} ({folder}/{other}), which is not read; "
            "give the checkpoint that it was made from, with its safetensors"
        )
    return "torch"


def _roles(index: Mapping[str, Any]) -> set[str]:
    """Return what a checkpoint has, by its model_index.json: an absent part stands there as a pair of nulls."""
    return {role for role, entry in index.items() if isinstance(entry, list) and entry and entry[-1]}


def _class_of(index: Mapping[str, Any], role: str) -> str:
    """Return the class of a network, by model_index.json; empty where that does not name it."""
    entry = index.get(role)
    return str(entry[-1]) if isinstance(entry, list) and entry else ""


def read_configs(root: Path, networks: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Read the config.json of every network. networks: the folder of each. Raises CheckpointError."""
    return {component: read_config(PARTS[component], root / folder) for component, folder in networks.items()}


def read_config(part: Part, folder: Path) -> dict[str, Any]:
    """Read a network's config.json and put defaults in place of what it leaves out. Raises CheckpointError."""
    path = folder / "config.json"
    return complete(part, read_json(path), where=str(path))


def _refuse_other_networks(root: Path, index: Mapping[str, Any]) -> None:
    there = _roles(index)
    entries = {role: _class_of(index, role) for role in index if role in there}
    other = next((OTHER_NETWORKS[kind] for kind in entries.values() if kind in OTHER_NETWORKS), None)
    denoiser = denoiser_of(entries)
    if other is None and entries.get(denoiser) not in DENOISER_CLASSES.get(denoiser, entries.values()):
        other = name_pipeline(str(index.get("_class_name")))
    if other:
        raise CheckpointError(f"'{root}' was recognised as {other}, which is not supported yet; expected {SUPPORTED}")


def _refuse_other_unets(root: Path) -> None:
    if not (root / "unet" / "config.json").is_file():
        return
    refuse_other_unet(root, read_json(root / "unet" / "config.json"))


def refuse_other_unet(root: Path, unet: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a UNet's config is that of a kind that is not supported. root: where it is."""
    for key, known, meaning in OTHER_UNETS:
        if unet.get(key) is not None and unet[key] != known:
            raise CheckpointError(
                f"'{root}' was recognised as {meaning} (unet/config.json says {key}: {unet[key]}), "
                f"which is not supported yet; expected {SUPPORTED}"
            )


def _require_folders(root: Path, needed: Iterable[str]) -> None:
    for folder in needed:
        if not (root / folder).is_dir():
            raise CheckpointError(f"'{root}' is incomplete: it holds no {folder}/; download the whole checkpoint")


def _files(
    root: Path, source: Source, parts: tuple[Iterable[str], Iterable[str]], *, allow_pickle: bool
) -> dict[str, Path]:
    """Name every file that the export reads, checking the weights. Raises CheckpointError.

    parts: the folders of the networks, and those of the tokenizers
    """
    networks, tokenizers = parts
    found = [root / "model_index.json", root / "scheduler" / "scheduler_config.json"]
    found += [path for name in tokenizers for path in sorted((root / name).iterdir()) if path.is_file()]
    for name in dict.fromkeys(networks):
        folder = root / name
        graphs = source == "onnx"
        weights = graph_files(folder) if graphs else network_files(folder, allow_pickle=allow_pickle)
        found += [folder / "config.json", *weights]
    return {path.relative_to(root).as_posix(): path for path in found}


def open_network(part: Part, folder: Path, *, allow_pickle: bool) -> Path | WeightSource:
    """Return a network's folder, or how to write another with safetensors where it may and does hold pickles."""
    if not allow_pickle or has_safetensors(folder) or not find_pickles(folder):
        return folder
    config = json.dumps(read_json(folder / "config.json"))
    files = tuple(str(path.absolute()) for path in find_pickles(folder))
    return WeightSource(part=part, config=config, files=files, layout="diffusers")


def to_weight_source(part: Part, network: Path | WeightSource) -> WeightSource:
    """Return how to write a network again, if its folder cannot be loaded as it is."""
    if isinstance(network, WeightSource):
        return network
    files = tuple(str(shard.path.absolute()) for shard in find_weights(network).shards)
    return WeightSource(
        part=part, config=json.dumps(read_json(network / "config.json")), files=files, layout="diffusers"
    )


def refuse_other_vae(where: Path, vae: Mapping[str, Any], expected: str = VAE) -> None:
    """Raise CheckpointError if a VAE's config is that of another class than is expected. where: its file or folder"""
    kind = vae.get("_class_name", expected)
    if kind == TINY:
        raise CheckpointError(
            f"'{where}' is a tiny VAE ({TINY}), which is used next to a full-size VAE, not instead of it; "
            "give that with --vae and this one with --tiny-vae DIRECTORY"
        )
    if kind != expected:
        raise CheckpointError(f"'{where}' was recognised as {kind}, which is not supported; expected {expected}")


def network_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """Return the files with a network's weights. Raises CheckpointError."""
    if allow_pickle and not has_safetensors(folder) and find_pickles(folder):
        return find_pickles(folder)
    return find_weights(folder).paths


def graph_files(folder: Path) -> list[Path]:
    """Return model.onnx and its external data. Raises CheckpointError."""
    if not (folder / "model.onnx").is_file():
        raise CheckpointError(f"{folder} holds no model.onnx; export the checkpoint again with optimum")
    return [folder / "model.onnx", *data_files(folder / "model.onnx").values()]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the whole checkpoint")
    try:
        document = read_document(path, strict=False)
    except ParseError as error:
        raise CheckpointError(f"{path} {error}; download it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return document
