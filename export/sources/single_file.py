"""Put a checkpoint together from a single file and what it lacks: configs and a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.safetensors_header import TensorFile, read_header, weights_format
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.defaults import complete
from latentrt.export.configs.families import FAMILIES, OPTIONAL_TEXT, SUPPORTED, option_for
from latentrt.export.configs.published import CONFIGS, VOCABULARIES, sample_size
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.diffusers_folder import read_configs, read_json, refuse_other_unet
from latentrt.export.sources.markers import read_changes
from latentrt.export.sources.parts import CLIPS, PARTS, TEXT_ENCODERS, Parts, WeightSource, folders
from latentrt.export.sources.pickles import read_pickle_header
from latentrt.export.sources.places import find_place
from latentrt.export.sources.recognise_file import SingleFile, name_other, recognise

NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SCALED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|absmax|quant_map)$")
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """What a single file does not hold: the configs of its networks, its scheduler's and its pipeline's."""

    configs: Configs
    scheduler: Mapping[str, Any]
    index: Mapping[str, Any]


def open_file(path: Path, options: CheckpointOptions, *, beside: Collection[str] = ()) -> Parts:
    """Take apart a checkpoint in one file. Raises CheckpointError, which names every option that is missing.

    beside: the text encoders that are given elsewhere, and are put in later
    """
    file = read_weights_header(path, allow_pickle=options.allow_pickle)
    single = recognise(file)
    if single is None:
        raise CheckpointError(_not_whole(file))
    if single.oddity:
        raise CheckpointError(
            f"'{path}' was recognised as {single.label}, which is not supported; expected {SUPPORTED}"
        )
    if beside and not (single.family and FAMILIES[single.family].separate):
        raise CheckpointError(f"--text-encoder is for Stable Diffusion 3, and '{path}' is {single.label}; omit it")
    require_numbers(file)
    held = single.networks().keys() | set(beside)
    networks = folders("torch", held - set(() if options.t5 else OPTIONAL_TEXT))
    documents = _as_told(
        single,
        _given(options.config, single.denoiser, networks) if options.config else _published(single, networks, options),
    )
    tokenizers = _find_tokenizers(networks, options)
    _require(single, options, tokenizers, held=held)
    padding = FAMILIES[single.family].padding if single.family and not options.config else {}
    return Parts(
        root=path,
        source="torch",
        index=documents.index,
        scheduler=documents.scheduler,
        configs=documents.configs,
        networks={name: _weight_source(name, path, config) for name, config in documents.configs.items()},
        tokenizers=tokenizers,
        special_tokens={name: {"pad_token": padding[name]} for name in tokenizers if name in padding},
        files={path.name: path, **_config_files(options, networks), **_tokenizer_files(tokenizers)},
    )


def _as_told(single: SingleFile, documents: Documents) -> Documents:
    """Return the configs with what the file itself says. Raises CheckpointError if that cannot be right."""
    changes = read_changes(single.file, single.markers)
    predicts = {"prediction_type": single.prediction} if single.says_prediction else {}
    takes = {"in_channels": single.input_channels}
    guided = {"time_cond_proj_dim": single.guidance_width} if single.guidance_width else {}
    further = {single.denoiser: takes | guided, **dict.fromkeys(("vae_decoder", "vae_encoder"), changes.vae)}
    return replace(
        documents,
        configs={name: {**config, **further.get(name, {})} for name, config in documents.configs.items()},
        scheduler={**changes.schedule(documents.scheduler), **predicts},
    )


def read_weights_header(path: Path, *, allow_pickle: bool) -> TensorFile:
    """Read what a file of weights holds. Raises CheckpointError."""
    kind = weights_format(path)
    if kind == "pickle" and allow_pickle:
        return read_pickle_header(path)
    if kind == "pickle":
        raise CheckpointError(
            f"'{path}' is a pickle, which can run any code when it is opened; "
            "convert it to safetensors, or pass --allow-pickle"
        )
    if kind is None:
        raise CheckpointError(f"'{path}' is not a safetensors file; give a checkpoint's file or directory")
    return read_header(path)


def require_numbers(file: TensorFile) -> None:
    """Raise CheckpointError where weights are no plain numbers: quantised ones with scales beside them are not read."""
    for key, stored in file.tensors.items():
        odd = stored.dtype not in NUMBERS and len(stored.shape) > 1 and not key.endswith("position_ids")
        if odd or SCALED.search(key):
            raise CheckpointError(
                f"'{file.path}' holds quantised weights with scales of their own ('{key}', {stored.dtype}), which are "
                "not read; give the file in fp16, bf16 or plain fp8"
            )


def _not_whole(file: TensorFile) -> str:
    path = file.path
    name, denoiser = name_other(file)
    if denoiser:
        return f"'{path}' was recognised as {name}, which is not supported; expected {SUPPORTED}"
    if name:
        option = option_for(name)
        return (
            f"'{path}' was recognised as {name}, which is not a whole checkpoint; give the one that it belongs to"
            + (f", and this with {option}" if option else "")
        )
    return f"'{path}' is not a checkpoint that is known here; `latentrt inspect` says what it holds"


def _given(name: str, denoiser: str, networks: Mapping[str, str]) -> Documents:
    root = find_place(name)
    if not (root / denoiser / "config.json").is_file():
        raise CheckpointError(
            f"--config '{name}' holds no {denoiser}/config.json; give a directory in diffusers' layout"
        )
    configs = read_configs(root, networks)
    refuse_other_unet(root, configs[denoiser])
    return Documents(
        configs=configs,
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        index=read_json(root / "model_index.json"),
    )


def _published(single: SingleFile, networks: Mapping[str, str], options: CheckpointOptions) -> Documents:
    if single.family is None or single.blocks is None:
        raise CheckpointError(
            f"'{single.file.path}' was recognised as {single.label}, which is not supported from a single file; "
            f"where its networks are those of {SUPPORTED}, pass --config DIRECTORY with its configs"
        )
    published = CONFIGS[single.family]
    prediction = options.prediction_type or single.prediction
    own = {"sample_size": sample_size(single.family, prediction or "epsilon"), **single.blocks}
    known = {**published, single.denoiser: {**published[single.denoiser], **own}}
    configs = {name: known[folder] for name, folder in networks.items() if folder in known}
    where = f"{single.label}'s published config"
    try:
        completed = {name: complete(PARTS[name], config, where=where) for name, config in configs.items()}
    except CheckpointError as error:  # what its weights' shapes say is none of theirs
        raise CheckpointError(
            f"'{single.file.path}' has networks of other sizes than published ones; pass --config DIRECTORY with its "
            f"configs ({error})"
        ) from None
    return Documents(
        configs=completed,
        scheduler={**published["scheduler"], "prediction_type": prediction},
        index=published["index"],
    )


def _require(
    single: SingleFile, options: CheckpointOptions, tokenizers: Mapping[str, Path], *, held: Collection[str]
) -> None:
    """Refuse what lacks something, saying all of it at once."""
    expected = FAMILIES[single.family].networks if single.family else ()
    absent = [name for name in expected if name not in held]
    separate = FAMILIES[single.family].separate if single.family else {}
    if (absent and not separate) or not (separate or set(held) & set(TEXT_ENCODERS)):
        raise CheckpointError(
            f"'{single.file.path}' ({single.label}) holds no {' and no '.join(absent or ['text_encoder'])}; "
            "look for a file with the whole checkpoint"
        )
    needs = [f"--text-encoder FILE with {separate[name]}, because it holds none" for name in absent]
    if "vae" not in held and options.vae is None:
        needs.append("--vae PATH, because it holds no VAE")
    if single.prediction is None and options.prediction_type is None and options.config is None:
        needs.append(f"--prediction-type epsilon or v_prediction, because {single.reason}")
    if single.strangers and options.config is None:
        needs.append(
            f"--config DIRECTORY with all its configs, because {len(single.strangers)} of its tensors belong to no "
            f"network and are not known here ({', '.join(single.strangers[:3])}), so they may change what it draws"
        )
    if any(TEXT_ENCODERS[encoder] not in tokenizers for encoder in CLIPS if encoder in held):
        needs.append("--tokenizer DIRECTORY with CLIP's vocab.json and merges.txt, because a single file holds none")
    for encoder in OPTIONAL_TEXT if options.t5 else ():
        if encoder in held and TEXT_ENCODERS[encoder] not in tokenizers:
            needs.append(f"--tokenizer DIRECTORY with T5's {TEXT_ENCODERS[encoder]}/tokenizer.json, or --no-t5")
    if needs:
        raise CheckpointError(f"'{single.file.path}' ({single.label}) needs {'; and '.join(needs)}")


def _find_tokenizers(networks: Mapping[str, str], options: CheckpointOptions) -> dict[str, Path]:
    """Return the folder with each text encoder's vocabulary: what was named, that of --config, or the hub's cache.

    One vocabulary serves both encoders where there is no second. Empty if there is none at all.
    """
    found = {}
    for encoder, name in TEXT_ENCODERS.items():
        folder = _find_tokenizer(name, options) if encoder in networks else None
        if folder:
            found[name] = folder
    return found


def _find_tokenizer(name: str, options: CheckpointOptions) -> Path | None:
    if name in (TEXT_ENCODERS[encoder] for encoder in OPTIONAL_TEXT):  # no other vocabulary serves it
        given = [find_place(root) / name for root in (options.tokenizer, options.config) if root]
        return next((folder for folder in given if _holds_vocabulary(folder)), None)
    if options.tokenizer:
        root = find_place(options.tokenizer)
        for folder in (root, root / name, root / "tokenizer", root / "onnx" / name, root / "onnx" / "tokenizer"):
            if _holds_vocabulary(folder):
                return folder
        raise CheckpointError(
            f"--tokenizer '{options.tokenizer}' holds neither vocab.json with merges.txt nor tokenizer.json; "
            "give a tokenizer's directory, or a checkpoint's or a bundle's"
        )
    beside = find_place(options.config) / name if options.config else None
    return beside if beside and _holds_vocabulary(beside) else _cached_tokenizer()


def _holds_vocabulary(folder: Path) -> bool:
    return (
        all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) or (folder / "tokenizer.json").is_file()
    )


def _cached_tokenizer() -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository, folder in VOCABULARIES:
        found = try_to_load_from_cache(repository, f"{folder}vocab.json")
        if isinstance(found, str) and _holds_vocabulary(Path(found).parent):
            return Path(found).parent
    return None


def _config_files(options: CheckpointOptions, networks: Mapping[str, str]) -> dict[str, Path]:
    if options.config is None:
        return {}
    names = [f"{folder}/config.json" for folder in dict.fromkeys(networks.values())]
    names += ["scheduler/scheduler_config.json", "model_index.json"]
    return {f"config/{name}": find_place(options.config) / name for name in names}


def _tokenizer_files(tokenizers: Mapping[str, Path]) -> dict[str, Path]:
    return {
        f"{name}/{path.name}": path
        for name, folder in tokenizers.items()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _weight_source(component: str, path: Path, config: Mapping[str, Any]) -> WeightSource:
    text = json.dumps(dict(config))
    return WeightSource(part=PARTS[component], config=text, files=(str(path.absolute()),), layout="original")
