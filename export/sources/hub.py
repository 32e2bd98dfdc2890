"""Fetch a checkpoint's files from the hub: only what the export reads, never a pickle."""

from __future__ import annotations

import glob
import logging
import socket
import ssl
import sys
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentrt.engines.errors import CheckpointError, NotInstalledError
from latentrt.export import INSTALL
from latentrt.export.graphs.external_data import locations
from latentrt.export.sources.diffusers_folder import source_of
from latentrt.export.sources.parts import TEXT_ENCODERS, denoiser_of, further_networks
from latentrt.export.sources.weight_files import STEMS, choose_variant, variant_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FOLDERS = (
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "unet",
    "transformer",
    "vae",
    "vae_decoder",
    "vae_encoder",
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
)
_log = logging.getLogger(__name__)
READ = (".json", ".txt", ".safetensors", ".onnx")
ANSWERS_S = 10.0  # how long the hub may take to name the files of what was fetched before
UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
# Each HTTP library of the hub's client has its own kinds of network failure; httpx2 and httpcore2 are meant too.
NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3")


def download(name: str, *, revision: str | None, without: Collection[str] = ()) -> Path:
    """Fetch a repository of the hub into its cache and return it. Raises CheckpointError and NotInstalledError.

    without: text encoders that are not fetched
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise NotInstalledError(
            f"'{name}' is not a directory here, and fetching it from the hub needs huggingface_hub", install=INSTALL
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, a line each; how it ends is said below
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        wanted = choose_files(_listed(HfApi(), name, revision), name, without=without)
        root = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        if data := graph_data(root, wanted):
            snapshot_download(name, revision=revision, allow_patterns=data)
        return root
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None  # as older clients have it
        if status is None or status >= 500:
            return _cached(name, revision, f"it answered {status}" if status else type(error).__name__)
        raise CheckpointError(
            f"'{name}' is not a directory here, and the hub refused it ({status}); check the name, "
            "the revision and your access token"
        ) from None
    except OfflineModeIsEnabled:
        return _cached(name, revision, "HF_HUB_OFFLINE is set", logging.INFO)
    except Exception as error:
        away = isinstance(error, (LocalEntryNotFoundError, *UNREACHABLE))
        if away or type(error).__module__.startswith(NETWORK_LIBRARIES):
            return _cached(name, revision, type(error).__name__)
        if isinstance(error, OSError):
            raise CheckpointError(f"'{name}' could not be put into the hub's cache: {error}") from error
        raise


def _listed(hub: HfApi, name: str, revision: str | None) -> list[str]:
    """Return the names of a repository's files. Where nothing was fetched before, the client tries six times."""
    if find_cached(name, revision=revision) is None:
        return list(hub.list_repo_files(name, revision=revision))
    return [file.rfilename for file in hub.model_info(name, revision=revision, timeout=ANSWERS_S).siblings or []]


def choose_files(files: Collection[str], where: str = "the repository", *, without: Collection[str] = ()) -> list[str]:
    """Pick what the export reads from a repository's list of files: configs, and one variant of the weights, or graphs.

    without: text encoders to leave there, with their tokenizers
    What lies beside a graph is not known before it is read: `graph_data`. Raises CheckpointError if the denoiser is in
    no form that is read.
    """
    denoiser = denoiser_of({file.partition("/")[0] for file in files})
    inside_it = {PurePosixPath(file).name for file in files if file.startswith(f"{denoiser}/")}
    source = source_of(where, inside_it, folder=denoiser)
    left = tuple(f"{folder}/" for name in without for folder in (name, TEXT_ENCODERS[name]))
    reads = any(file.startswith(tuple(f"{name}/" for name in TEXT_ENCODERS)) for file in files)
    folders = FOLDERS if reads else (*FOLDERS, *further_networks())  # what reads no text reads an image
    known = [file for file in files if _is_ours(PurePosixPath(file), folders) and not file.startswith(left)]
    weights = [file for file in known if file.endswith(".safetensors") or ".safetensors.index" in file]
    others = [file for file in known if file not in weights and not file.endswith(".onnx")]
    chosen = []
    for folder in folders:
        inside = {file: variant_of(file.split("/")[1]) for file in weights if _holds_network(file, folder)}
        wanted = choose_variant(inside.values(), where=f"{folder}/ of the repository") if inside else None
        chosen += [file for file, variant in inside.items() if variant == wanted]
    graphs = [file for file in known if file.endswith("/model.onnx")]
    return [*others, *(graphs if source == "onnx" else chosen)]


def graph_data(root: Path, files: Iterable[str]) -> list[str]:
    """Return the external data of the graphs among files that were fetched, as patterns for the hub's client."""
    graphs = [PurePosixPath(file) for file in files if file.endswith(".onnx")]
    return [glob.escape(str(graph.parent / place)) for graph in graphs for place in locations(root / graph)]


def _holds_network(file: str, folder: str) -> bool:
    return file.startswith(tuple(f"{folder}/{stem}{end}" for stem in STEMS for end in ".-"))


def _is_ours(path: PurePosixPath, folders: Collection[str]) -> bool:
    if len(path.parts) == 1:
        return path.name == "model_index.json"
    return len(path.parts) == 2 and path.parts[0] in folders and path.suffix in READ


def find_cached(name: str, *, revision: str | None) -> Path | None:
    """Return the directory of what an earlier run fetched, None if there is nothing.

    That is a choice of the repository's files, which its client takes for a broken download if it is asked for all.
    Whoever reads the directory refuses it where something is missing.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    except (ImportError, OSError, ValueError):
        return None


def _cached(name: str, revision: str | None, why: str, level: int = logging.WARNING) -> Path:
    """Fall back on what an earlier run fetched, and say so: the hub may hold a newer one."""
    found = find_cached(name, revision=revision)
    if found is None:
        raise CheckpointError(
            f"there is no directory '{name}', and the hub could not be reached for it ({why}); "
            "check the path, or the network"
        )
    words = "the hub could not be reached for '%s' (%s): taking what was fetched before, revision %s"
    _log.log(level, words, name, why, found.name)
    return found
