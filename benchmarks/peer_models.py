"""What every peer draws: a checkpoint of random weights, our bundle of it, and what other libraries need made of it."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peer_install import install, run, say
from peer_tables import MODELS, Model
from random_checkpoint import DEMO, save_random

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.progress import terminal_report
from latentrt.export.export import export_checkpoint
from latentrt.export.options import CheckpointOptions

PROMPT = "a large red circle on a striped blue background"
CONVERTER = Path(__file__).with_name("peer_convert.py")
CONVERT_S = 3600.0
# OpenCLIP's wheel (1.5 MB) holds the vocabulary that every published SD 1.x and 2.x has; read, not installed.
VOCABULARY, MERGES = "open_clip_torch==3.3.0", 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
Job = dict[str, Any]


def make_job(arguments: argparse.Namespace, cache: Path) -> Job:
    """Make the checkpoint and our bundle of it, once, and say what every peer shall draw. Raises PeerError."""
    model, folder = MODELS.get(arguments.model, Model()), cache / "models" / arguments.model
    checkpoint = DEMO if arguments.model == "demo" else make_checkpoint(arguments.model, folder / "checkpoint", cache)
    bundle, tiny = folder / "bundle", make_tiny_vae(folder / "tiny") if model.tiny else None
    with terminal_report() as report:
        options = CheckpointOptions(tiny_vae=tiny)
        export_checkpoint(str(checkpoint), bundle, precision="fp32", options=options, report=report)
    width, height = Bundle.open(bundle).manifest.default_size
    if arguments.size:
        width, height = map(int, arguments.size.split("x"))
    steps = model.steps if arguments.steps is None else arguments.steps
    return {
        "checkpoint": str(checkpoint),
        "bundle": str(bundle),
        "cache": str(folder),
        "tiny": tiny,
        "prompt": PROMPT,
        "steps": steps,
        "guidance": model.guidance,
        "sigmas": trailing_sigmas(checkpoint, steps) if model.published else None,
        "width": width,
        "height": height,
        "batch": arguments.batch,
        "threads": arguments.threads,
    }


def make_checkpoint(name: str, checkpoint: Path, cache: Path) -> Path:
    """Write a checkpoint of random weights, once. Returns its folder. Raises PeerError."""
    if not (checkpoint / "vae" / "config.json").is_file():
        save_random(name, checkpoint)
    prefix_keys(checkpoint / "text_encoder" / "model.safetensors")
    if MODELS.get(name, Model()).published and not (checkpoint / "published").is_file():
        patch(checkpoint / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
        text_encoder = checkpoint / "text_encoder" / "config.json"
        patch(text_encoder, bos_token_id=MERGES + 512, eos_token_id=MERGES + 513)
        # SD 2.x fills a text up with its vocabulary's first word, and SD 1.x with the end
        wide = json.loads(text_encoder.read_text())["hidden_size"] == 1024
        write_vocabulary(checkpoint / "tokenizer", cache / "wheels", pad="!" if wide else END)
        (checkpoint / "published").touch()
    return checkpoint


def prefix_keys(file: Path) -> None:
    """Give a text encoder's tensors the names that published files have, once.

    transformers 5 leaves out a prefix without which its version 4 draws weights of its own, and stable-diffusion.cpp
    finds none.
    """
    with file.open("rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        if any(name.startswith("text_model.") for name in header):
            return
        named = {name if name == "__metadata__" else f"text_model.{name}": one for name, one in header.items()}
        text = json.dumps(named).encode()
        beside = file.with_suffix(".beside")
        with beside.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new, 1 << 24)
    beside.replace(file)


def patch(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file, by a new file in its place."""
    changed = json.loads(file.read_text()) | changes
    file.unlink()
    file.write_text(json.dumps(changed, indent=1))


def write_vocabulary(folder: Path, wheels: Path, *, pad: str) -> None:
    """Put CLIP's published vocabulary, from OpenCLIP's wheel, in a tokenizer's place. Raises PeerError."""
    if not any(wheels.glob("open_clip_torch-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(wheels), VOCABULARY]
        run(command, CONVERT_S)
    with zipfile.ZipFile(next(wheels.glob("open_clip_torch-*.whl"))) as wheel:
        lines = gzip.decompress(wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    merges, letters = lines[1 : 1 + MERGES], _byte_letters()
    entries = [*letters, *(f"{one}</w>" for one in letters), *(one.replace(" ", "") for one in merges), START, END]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{one}\n" for one in merges))
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_letters() -> list[str]:
    """Return a printable letter for each byte in the vocabulary's order: those that are their own first."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, own), *(chr(256 + number) for number in range(256 - len(own)))]


def make_tiny_vae(folder: Path) -> str:
    """Write an AutoencoderTiny of TAESD's size with random weights, once. Returns its folder."""
    if not (folder / "config.json").is_file():
        import torch
        from diffusers import AutoencoderTiny

        torch.manual_seed(0)
        network = AutoencoderTiny()
        for parameter in network.parameters():
            parameter.data *= 1.5  # random weights as they come give a flat picture
        network.save_pretrained(folder)
    return str(folder)


def trailing_sigmas(checkpoint: Path, steps: int) -> list[float]:
    """Return the noise before each step and after the last one, as diffusers spaces them when told "trailing"."""
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    count, (first, last) = config["num_train_timesteps"], (config[f"beta_{end}"] ** 0.5 for end in ("start", "end"))
    kept, product = [], 1.0
    for number in range(count):
        product *= 1 - (first + (last - first) * number / (count - 1)) ** 2
        kept.append(product)
    times = [round(count - number * count / steps) - 1 for number in range(steps)]
    return [*(math.sqrt((1 - kept[at]) / kept[at]) for at in times), 0.0]


def convert(what: str, job: Mapping[str, Any], cache: Path) -> None:
    """Make of the checkpoint what a peer reads, once. Raises PeerError."""
    folder = Path(job["cache"])
    if not (folder / what / "complete").is_file():
        say(f"{what}: converting")
        shutil.rmtree(folder / what, ignore_errors=True)
        CONVERSIONS[what](install("openvino-convert", cache), job, folder)
        (folder / what / "complete").touch()


def _openvino(python: Path, job: Mapping[str, Any], folder: Path) -> None:
    """Turn the checkpoint into what OpenVINO reads, in fp32, with the tiny decoder in the full one's place."""
    tool, target = python.with_name("optimum-cli"), str(folder / "openvino")
    asked = ["--model", job["checkpoint"], "--task", "text-to-image", "--weight-format", "fp32"]
    run([str(python), str(tool), "export", "openvino", *asked, target], CONVERT_S)
    if job["tiny"]:
        run([str(python), str(CONVERTER), "tiny", job["tiny"], target], CONVERT_S)


def _openvino_int8(python: Path, _: Mapping[str, Any], folder: Path) -> None:
    """Compress the weights that OpenVINO reads to int8, as its own exporter does when told `--weight-format int8`."""
    run([str(python), str(CONVERTER), "int8", str(folder / "openvino"), str(folder / "openvino-int8")], CONVERT_S)


CONVERSIONS: Mapping[str, Callable[[Path, Mapping[str, Any], Path], None]] = {
    "openvino": _openvino,
    "openvino-int8": _openvino_int8,
}
