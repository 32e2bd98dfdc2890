"""Text encoders that a single file lacks, where they lie: in files of their own, or in a checkpoint's directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentrt.engines.bundle.safetensors_header import TensorFile
from latentrt.engines.errors import CheckpointError
from latentrt.export.configs.published import CONFIGS
from latentrt.export.options import CheckpointOptions
from latentrt.export.sources.diffusers_folder import network_files, open_network, read_config, read_json
from latentrt.export.sources.parts import CLIPS, PARTS, TEXT_ENCODERS, Parts, WeightSource
from latentrt.export.sources.places import absent, find_place
from latentrt.export.sources.recognise_file import TEXTS
from latentrt.export.sources.single_file import read_weights_header, require_numbers

T5_KEY = "encoder.block.0.layer.0.SelfAttention.q.weight"
CLIP_KEYS = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A text encoder. network: its folder, None where `files` are all there is; root: the directory that it is in"""

    files: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    network: Path | WeightSource | None = None
    root: Path | None = None


def find_text_encoders(options: CheckpointOptions) -> dict[str, Found]:
    """Find the text encoders that options name, by component. Raises CheckpointError if a path holds none."""
    found: dict[str, Found] = {}
    for name in options.text_encoders:
        path = find_place(name)
        if path.is_dir():
            given = dict(_in_folder(path, allow_pickle=options.allow_pickle))
        elif path.is_file():
            given = dict(_in_file(read_weights_header(path, allow_pickle=options.allow_pickle), options))
        else:
            raise CheckpointError(f"--text-encoder '{name}' {absent(name)}; give a safetensors file or a directory")
        if not given:
            raise CheckpointError(
                f"--text-encoder '{name}' holds none of SD 3's text encoders (CLIP L, CLIP G, T5); "
                "`latentrt inspect` says what it holds"
            )
        found |= given
    return found


def with_their_tokenizers(options: CheckpointOptions, found: Mapping[str, Found]) -> CheckpointOptions:
    """Return options that name the tokenizers beside text encoders, where no other is named."""
    root = next((one.root for one in found.values() if one.root and (one.root / "tokenizer").is_dir()), None)
    return options if options.tokenizer or root is None else replace(options, tokenizer=str(root))


def put_text_encoders(parts: Parts, found: Mapping[str, Found]) -> Parts:
    """Put text encoders in the places of a checkpoint's own, those that the export has."""
    mine = {component: one for component, one in found.items() if component in parts.networks}
    configs = {component: one.config or parts.configs[component] for component, one in mine.items()}
    networks = {
        component: one.network
        or WeightSource(
            part=PARTS[component],
            config=json.dumps(dict(configs[component])),
            files=tuple(str(file.absolute()) for file in one.files),
            layout="original",
        )
        for component, one in mine.items()
    }
    files = {f"{component}/{file.name}": file for component, one in mine.items() for file in one.files}
    return replace(
        parts,
        configs={**parts.configs, **configs},
        networks={**parts.networks, **networks},
        files={**parts.files, **files},
    )


def _in_file(file: TensorFile, options: CheckpointOptions) -> Iterator[tuple[str, Found]]:
    whole = [name for name, starts in TEXTS.items() if any(key.startswith(starts) for key in file.tensors)]
    for component in whole or _bare(file, options):
        require_numbers(file)
        yield component, Found(files=(file.path,))


def _bare(file: TensorFile, options: CheckpointOptions) -> list[str]:
    """Return which text encoder a file of one is: CLIPs are told apart by their widths."""
    if T5_KEY in file.tensors:
        return ["text_encoder_3"]
    width = next((file.tensors[key].shape[-1] for key in CLIP_KEYS if key in file.tensors), None)
    return [name for name in CLIPS if _width(name, options) == width][:1]


def _width(component: str, options: CheckpointOptions) -> Any:
    path = find_place(options.config) / component / "config.json" if options.config else None
    config = read_json(path) if path and path.is_file() else CONFIGS["sd3"][component]
    return config.get("hidden_size")


def _in_folder(root: Path, *, allow_pickle: bool) -> Iterator[tuple[str, Found]]:
    for component in TEXT_ENCODERS:
        folder = root / component
        if (folder / "config.json").is_file():
            found = Found(
                files=(folder / "config.json", *network_files(folder, allow_pickle=allow_pickle)),
                config=read_config(PARTS[component], folder),
                network=open_network(PARTS[component], folder, allow_pickle=allow_pickle),
                root=root,
            )
            yield component, found
