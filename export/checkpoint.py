"""Open a checkpoint and say what it is: its family, its networks, its sizes, its schedule. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentrt.engines.bundle import hash_file
from latentrt.engines.errors import CheckpointError
from latentrt.engines.manifest import Family, LatentSpec, TrainingSchedule
from latentrt.export.families import ACTIVATIONS, OTHER_DENOISERS, OTHER_UNETS, name_pipeline
from latentrt.export.hub import download
from latentrt.export.schedule import training_schedule
from latentrt.export.weights import PICKLES, find_weights

Source = Literal["torch", "onnx"]

DEMO = Path(__file__).parent / "demo" / "checkpoint"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# The folder that a network's weights or graph are in, for each layout.
FOLDERS: Mapping[Source, Mapping[str, str]] = {
    "torch": {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"},
    "onnx": {name: name for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be exported.

    source: `torch` for safetensors in diffusers' layout, `onnx` for graphs in optimum's
    configs: the parsed config.json of each network
    files: the files that the export reads, relative to root
    dimensions: the sizes that the tables of shapes refer to by name
    """

    name: str
    root: Path
    source: Source
    family: Family
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    files: tuple[str, ...]
    schedule: TrainingSchedule
    latents: LatentSpec
    default_size: tuple[int, int]
    dimensions: Mapping[str, int]

    def folder(self, component: str) -> Path:
        """Return the directory that holds a network."""
        return self.root / FOLDERS[self.source][component]

    def hashes(self) -> dict[str, str]:
        """Hash every file that the export reads."""
        return {name: hash_file(self.root / name) for name in self.files}


def open_checkpoint(name: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read all of it but the weights.

    name: a directory in diffusers' or optimum's layout, a hub id, or `demo`
    revision: the branch, tag or commit of a hub id
    Raises CheckpointError.
    """
    root = locate(name, revision=revision)
    index = _read_json(root / "model_index.json")
    source = _source(root)
    _refuse_other_denoisers(name, index)
    _refuse_other_unets(root)
    _require_folders(root, source)
    configs = {component: _read_json(root / folder / "config.json") for component, folder in FOLDERS[source].items()}
    family = _family(root, configs)
    scheduler = root / "scheduler" / "scheduler_config.json"
    latents = _latents(configs, source, root)
    unet = configs["unet"]
    sample = _need(unet, "sample_size", int, root / "unet" / "config.json", default=64)
    return Checkpoint(
        name=name,
        root=root,
        source=source,
        family=family,
        index=index,
        configs=configs,
        scheduler=_read_json(scheduler),
        files=_files(root, source),
        schedule=training_schedule(_read_json(scheduler), where=str(scheduler)),
        latents=latents,
        default_size=(sample * latents.factor, sample * latents.factor),
        dimensions=_dimensions(configs, latents),
    )


def locate(name: str, *, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint, downloading a hub id's files. Raises CheckpointError."""
    if name == "demo":
        if not (DEMO / "model_index.json").is_file():
            raise CheckpointError(f"the demo checkpoint is missing at {DEMO}; install latentrt again")
        return DEMO
    path = Path(name).expanduser()
    if path.is_file():
        raise CheckpointError(_why_no_file(path))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"'{path}' is not a checkpoint: it holds no model_index.json; "
                "give a directory in diffusers' or optimum's layout"
            )
        return path
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return download(name, revision=revision)
    raise CheckpointError(
        f"there is no checkpoint at '{name}'; give a directory, a hub id such as user/model, or 'demo'"
    )


def _why_no_file(path: Path) -> str:
    if path.suffix in PICKLES:
        return (
            f"'{path}' is a pickle, which can run any code when it is opened; "
            "convert it to safetensors in diffusers' layout"
        )
    return f"'{path}' is a single file, which is not supported yet; convert it to a directory in diffusers' layout"


def _source(root: Path) -> Source:
    return "onnx" if (root / "unet" / "model.onnx").is_file() else "torch"


def _refuse_other_denoisers(name: str, index: Mapping[str, Any]) -> None:
    entries = {role: entry[-1] for role, entry in index.items() if isinstance(entry, list) and entry and entry[-1]}
    other = next((OTHER_DENOISERS[kind] for kind in entries.values() if kind in OTHER_DENOISERS), None)
    if other is None and "unet" not in entries:
        other = name_pipeline(str(index.get("_class_name")))
    if other:
        raise CheckpointError(
            f"'{name}' was recognised as {other}, which is not supported yet; expected Stable Diffusion 1.x or 2.x"
        )


def _require_folders(root: Path, source: Source) -> None:
    needed = (*dict.fromkeys(FOLDERS[source].values()), "scheduler", "tokenizer")
    for folder in needed:
        if not (root / folder).is_dir():
            raise CheckpointError(f"'{root}' is incomplete: it holds no {folder}/; download the whole checkpoint")


def _refuse_other_unets(root: Path) -> None:
    if not (root / "unet" / "config.json").is_file():
        return
    unet = _read_json(root / "unet" / "config.json")
    for key, value, meaning in OTHER_UNETS:
        if unet.get(key) is not None and value in (None, unet[key]):
            raise CheckpointError(
                f"'{root}' was recognised as {meaning} (unet/config.json says {key}: {unet[key]}), "
                "which is not supported yet; expected Stable Diffusion 1.x or 2.x"
            )


def _family(root: Path, configs: Mapping[str, Mapping[str, Any]]) -> Family:
    unet = configs["unet"]
    text = configs["text_encoder"]
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS or "CLIPTextModel" not in text.get("architectures", ["CLIPTextModel"]):
        raise CheckpointError(
            f"{root}/text_encoder/config.json: found {text.get('architectures')} with hidden_act '{activation}', "
            f"expected CLIPTextModel with one of {', '.join(ACTIVATIONS)}; this family is not supported"
        )
    width = text.get("hidden_size", 512)
    if unet.get("cross_attention_dim") not in (width, [width]):
        raise CheckpointError(
            f"{root}: the text encoder is {width} wide but the UNet's cross_attention_dim is "
            f"{unet.get('cross_attention_dim')}; they are not of one checkpoint"
        )
    return ACTIVATIONS[activation]


def _latents(configs: Mapping[str, Mapping[str, Any]], source: Source, root: Path) -> LatentSpec:
    where = root / FOLDERS[source]["vae_decoder"] / "config.json"
    vae, unet = configs["vae_decoder"], configs["unet"]
    channels = _need(vae, "latent_channels", int, where, default=4)
    if (unet.get("in_channels", 4), unet.get("out_channels", 4)) != (channels, channels):
        raise CheckpointError(
            f"{root}: the UNet takes {unet.get('in_channels')} channels and gives {unet.get('out_channels')} where the "
            f"VAE has {channels} latent channels; inpainting and other conditioned UNets are not supported yet"
        )
    levels = _need(vae, "block_out_channels", list, where)
    scaling = float(_need(vae, "scaling_factor", (int, float), where, default=0.18215))
    return LatentSpec(channels=channels, factor=2 ** (len(levels) - 1), scaling_factor=scaling)


def _dimensions(configs: Mapping[str, Mapping[str, Any]], latents: LatentSpec) -> dict[str, int]:
    text, vae, unet = configs["text_encoder"], configs["vae_decoder"], configs["unet"]
    vocabulary = text.get("vocab_size", 49408)
    # SD 1.x's configs say 2 for the end token, where CLIP means the largest id
    return {
        "latent_channels": latents.channels,
        "latent_parameters": 2 * latents.channels,
        "picture_channels": vae.get("out_channels", 3),
        "text_width": text.get("hidden_size", 512),
        "context": text.get("max_position_embeddings", 77),
        "vocabulary": vocabulary,
        "end_token": vocabulary - 1 if text.get("eos_token_id", 2) == 2 else text["eos_token_id"],
        "factor": latents.factor,
        "unet_factor": 2 ** (len(unet["block_out_channels"]) - 1),
    }


def _files(root: Path, source: Source) -> tuple[str, ...]:
    """Name every file that the export reads, checking the weights. Raises CheckpointError."""
    fixed = ["model_index.json", "scheduler/scheduler_config.json"]
    fixed += [path.relative_to(root).as_posix() for path in sorted((root / "tokenizer").iterdir()) if path.is_file()]
    for folder in dict.fromkeys(FOLDERS[source].values()):
        fixed.append(f"{folder}/config.json")
        weights = graph_files(root / folder) if source == "onnx" else find_weights(root / folder).paths
        fixed += [f"{folder}/{path.name}" for path in weights]
    return tuple(fixed)


def graph_files(folder: Path) -> list[Path]:
    """Return model.onnx and its external data. Raises CheckpointError."""
    if not (folder / "model.onnx").is_file():
        raise CheckpointError(f"{folder} holds no model.onnx; export the checkpoint again with optimum")
    return [folder / "model.onnx", *sorted(path for path in folder.glob("model.onnx*data") if path.is_file())]


def _need(config: Mapping[str, Any], key: str, kind: Any, where: Path, *, default: Any = None) -> Any:
    value = config.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{where} $.{key}: found {value!r}; this checkpoint is not supported")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the whole checkpoint")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return document
