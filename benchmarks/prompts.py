"""What encoding a prompt costs: new ones, remembered ones, and a whole batch of remembered ones.

python benchmarks/prompts.py BUNDLE
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.open import open_engines
from latentrt.runtime.bench.machine import describe
from latentrt.runtime.text.encoder import TextEncoder
from latentrt.runtime.text.tokenizer import Prompt, PromptTokenizer

TEXT = "a large red circle on a striped blue background, highly detailed, sharp focus"
WEIGHTED = "a large (red:1.3) circle on a [striped] (blue:0.6) background, highly detailed, sharp focus"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prompts.json"))
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    spec = bundle.manifest.tokenizers["tokenizer"]
    tokenizer = PromptTokenizer(bundle.path(spec.file), spec)
    opened = open_engines(bundle, arguments.backend, components=("text_encoder",))
    engine = opened.engines["text_encoder"]
    text = TextEncoder(tokenizer, engine, engine.spec)
    seconds = {name: measure(work, arguments.rounds) for name, work in cases(text, tokenizer).items()}
    print(f"{'prompt':<52}{'median µs':>12}{'least µs':>12}")
    for name, (median, least) in seconds.items():
        print(f"{name:<52}{median * 1e6:>12.1f}{least * 1e6:>12.1f}")
    result = {"machine": describe(), "backend": opened.choice.backend, "seconds": seconds}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def cases(text: TextEncoder, tokenizer: PromptTokenizer) -> dict[str, Callable[[int], object]]:
    """Return what is measured; each is told a number that it has not seen before."""
    known = Prompt(text=TEXT)
    batch = [known, Prompt(text="")] * 4
    text(batch)
    return {
        "tokens of a new prompt": lambda number: tokenizer.chunks(Prompt(text=f"{TEXT} {number}")),
        "a new prompt": lambda number: text.encode([Prompt(text=f"{TEXT} {number}")]),
        "a new prompt with three weights": lambda number: text.encode(
            [Prompt(text=f"{WEIGHTED} {number}", syntax="weighted")]
        ),
        "a remembered prompt": lambda _: text.encode([known]),
        "eight rows of remembered prompts, as one array": lambda _: text(batch),
    }


def measure(work: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Return the median and the least seconds of a call, the first one left out."""
    samples = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        work(number)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:]), min(samples[1:])


if __name__ == "__main__":
    main()
