"""Train the demo checkpoint: parts `prepare`, `decoder`, `denoiser` and `save`, each resumable."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import CLIPTokenizer

from latentrt.export.demo.training.dataset import Examples, make_examples, random_scenes
from latentrt.export.demo.training.decoder import make_decoder_state, train_decoder
from latentrt.export.demo.training.denoiser import Schedule, make_state, process_number, train
from latentrt.export.demo.training.saving import save_checkpoint
from latentrt.export.demo.training.tokens import train_tokenizer
from latentrt.export.demo.wording import describe

CHECKPOINT = Path(__file__).parent.parent / "checkpoint"


def prepare(work: Path, count: int) -> None:
    """Make the tokenizer and the examples."""
    work.mkdir(parents=True, exist_ok=True)
    scenes = random_scenes(count, np.random.default_rng(0))
    generator = np.random.default_rng(1)
    tokenizer = train_tokenizer([describe(scene, generator) for scene in scenes[:5000]])
    tokenizer.save_pretrained(work / "tokenizer")
    make_examples(scenes, tokenizer, generator).save(work / "examples.npz")


def train_denoiser(number: int, workers: int, work: Path, schedule: Schedule, save_every: int) -> None:
    """Train the text encoder and the U-Net in this process, one of several."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{work.resolve()}/meeting-{os.getppid()}",
            rank=number,
            world_size=workers,
        )
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    state = make_state(len(tokenizer), tokenizer.eos_token_id, schedule.seed)
    path = work / "denoiser.pt"
    if path.exists():
        state.load(path)
    for losses in train(state, Examples.load(work / "examples.npz"), schedule):
        if process_number() == 0:
            report(state.step, losses, every=50)
            if state.step % save_every == 0 or state.step == schedule.steps:
                state.save(path)


def run_workers(workers: int, work: Path, schedule: Schedule, save_every: int) -> None:
    """Train in as many processes as asked, each with one thread and its own part of every step's batch."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=train_denoiser, args=(number, workers, work, schedule, save_every))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a training process failed: its error is above")


def improve_decoder(work: Path, *, steps: int, batch: int, side: int, save_every: int) -> None:
    """Train the decoder in this process."""
    torch.set_num_threads(1)
    state = make_decoder_state(0)
    path = work / "decoder.pt"
    if path.exists():
        state.load(path)
    for errors in train_decoder(state, steps=steps, batch=batch, side=side):
        report(state.step, errors, every=50)
        if state.step % save_every == 0 or state.step == steps:
            state.save(path)


def save(work: Path, folder: Path) -> None:
    """Write the running averages of the last states as a checkpoint."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    state = make_state(len(tokenizer), tokenizer.eos_token_id, 0)
    state.load(work / "denoiser.pt")
    decoder = make_decoder_state(0)
    decoder.load(work / "decoder.pt")
    save_checkpoint(
        folder,
        tokenizer=tokenizer,
        text_encoder=state.average.text,
        unet=state.average.unet,
        vae=decoder.average,
    )


_sums: dict[str, list[float]] = {}


def report(step: int, losses: dict[str, float], *, every: int) -> None:
    """Print the mean of the last losses now and then."""
    for name, value in losses.items():
        _sums.setdefault(name, []).append(value)
    if step % every == 0:
        means = "  ".join(f"{name} {np.mean(values):.4f}" for name, values in _sums.items())
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} step {step}  {means}\n")
        sys.stdout.flush()
        _sums.clear()


def main() -> None:
    """Run one part of the training."""
    parser = argparse.ArgumentParser(prog="python -m latentrt.export.demo.training.train", description=__doc__)
    parser.add_argument("part", choices=("prepare", "decoder", "denoiser", "save"))
    parser.add_argument("--work", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where `save` writes the checkpoint")
    parser.add_argument("--count", type=int, default=40000, help="pictures that `prepare` draws")
    parser.add_argument("--steps", type=int, default=9000, help="where training ends")
    parser.add_argument("--cool-down", type=int, default=3000, help="last steps of the denoiser")
    parser.add_argument("--batch", type=int, default=32, help="pictures for each worker and step")
    parser.add_argument("--side", type=int, default=64, help="pixels of the crops the decoder learns from")
    parser.add_argument("--workers", type=int, default=1, help="processes of the denoiser, one thread each")
    parser.add_argument("--save-every", type=int, default=100)
    options = parser.parse_args()
    if options.part == "prepare":
        prepare(options.work, options.count)
    if options.part == "decoder":
        improve_decoder(
            options.work,
            steps=options.steps,
            batch=options.batch,
            side=options.side,
            save_every=options.save_every,
        )
    if options.part == "save":
        save(options.work, options.folder)
    if options.part == "denoiser":
        schedule = Schedule(steps=options.steps, cool_down=options.cool_down, batch=options.batch)
        run_workers(options.workers, options.work, schedule, options.save_every)


if __name__ == "__main__":
    main()
