"""Our speed beside other libraries': same machine, same weights, same run, as ratios.

    python benchmarks/peers.py tiny|middle|sd15|demo [--batch 1] [--steps 8] [--threads 2] [--seconds 300]
        [--peers latentrt,diffusers,openvino] [--cache .cache/peers] [--output benchmarks/results]

Each peer lives in an environment of its own, made once below --cache, and in a process of its own. The peers take
turns in random order; a ratio is the median over the rounds of each round's own ratio, with its 95 % interval.
Everything computes in fp32, with Euler and classifier-free guidance. A peer that cannot be installed, or cannot run
the model, is in the table with the reason. Sizes of installation and times of import are measured too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from paired import paired_ratio

from latentrt.engines.progress import terminal_report
from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.machine import Watch, describe, now
from latentrt.runtime.bench.report.text import milliseconds
from latentrt.runtime.bench.rounds import take_turns, warm_up

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("peer_worker.py")
PROMPT = "a large red circle on a striped blue background"
GUIDANCE = 5.0
LOAD_S, DRAW_S, INSTALL_S = 1800.0, 900.0, 3600.0
TORCH = "torch==2.13.0"  # named first: from there the resolver keeps the build for CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What pip installs into one environment, in these calls, one after another.

    imports: what a user imports
    fresh: what is installed again each time, without what it needs: our own code changes
    """

    installs: tuple[tuple[str, ...], ...]
    imports: str = ""
    fresh: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to draw. convert: another environment and the command that prepares the model once."""

    title: str
    environment: str
    convert: str | None = None


def _onnxruntime() -> str:
    """Return the pinned ONNX Runtime: engines are kept for the version they were built with."""
    return f"onnxruntime=={importlib.metadata.version('onnxruntime')}"


ENVIRONMENTS = {
    "latentrt": Environment(
        installs=((str(ROOT), _onnxruntime()),),
        imports="import latentrt.runtime.pipeline, onnxruntime",
        fresh=str(ROOT),
    ),
    "diffusers": Environment(
        installs=((TORCH,), ("diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0")),
        imports="from diffusers import StableDiffusionPipeline",
    ),
    # Pinned, or pip walks back through versions for minutes.
    "optimum": Environment(
        installs=(
            (TORCH,),
            (
                "transformers==4.57.6",
                "diffusers==0.39.0",
                "huggingface_hub==0.36.2",
                "optimum-onnx==0.1.0",
                _onnxruntime(),
            ),
        ),
        imports="from optimum.onnxruntime import ORTStableDiffusionPipeline",
    ),
    "openvino": Environment(installs=(("openvino-genai==2026.4.1.0",),), imports="import openvino_genai"),
    "openvino-convert": Environment(
        installs=((TORCH,), ("optimum-intel[openvino]==2.2.0", "diffusers", "openvino-genai==2026.4.1.0")),
    ),
    "sdcpp": Environment(installs=(("stable-diffusion-cpp-python==0.4.7",),), imports="import stable_diffusion_cpp"),
}
PEERS = {
    "latentrt": Peer(title="latentrt", environment="latentrt"),
    "plain": Peer(title="ONNX Runtime, plain loop", environment="latentrt"),
    "diffusers": Peer(title="diffusers, eager", environment="diffusers"),
    "diffusers-compiled": Peer(title="diffusers, torch.compile", environment="diffusers"),
    "optimum": Peer(title="optimum-onnx", environment="optimum"),
    "openvino": Peer(title="OpenVINO GenAI", environment="openvino", convert="openvino-convert"),
    "sdcpp": Peer(title="stable-diffusion.cpp", environment="sdcpp"),
}


class PeerError(Exception):
    """Why a peer is not in the comparison."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, or a shape of random_checkpoint.py.")
    parser.add_argument("--size", default=None, help="256x256. Default: the checkpoint's own.")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=300.0, help="For the rounds of all peers.")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--imports", type=int, default=5, help="Fresh interpreters for each import time.")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    names = list(dict.fromkeys(["latentrt", *arguments.peers.split(",")]))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer '{unknown[0]}'; choose of {', '.join(PEERS)}")
    document = compare(arguments, names)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"peers-{arguments.model}-batch{arguments.batch}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    file.with_suffix(".md").write_text(document["table"])
    print(f"\n{document['table']}\n{file}")


def compare(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Install, load and measure. Returns the whole result."""
    cache = arguments.cache.absolute()
    job = make_job(arguments, cache)
    missing: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    installs = {}
    watch = Watch()  # a process that ended counts as ours: so from before the first one to after the last one
    try:
        for name in names:
            try:
                installs[name] = prepare(name, job, cache, arguments.imports)
                workers[name] = Worker(name, job, cache)
                warm_up(workers[name].seconds, most_seconds=arguments.seconds / 8)
            except PeerError as error:
                missing[name] = str(error)
                _say(f"{name}: left out: {error}")
        drawn = take_rounds(workers, arguments, missing)
    finally:
        for worker in workers.values():
            worker.close()
    conditions = watch.conditions()
    results = {name: summarise_peer(name, workers[name], drawn) for name in drawn}
    document = {
        "kind": "latentrt peers",
        "created": now(),
        "command": f"python benchmarks/peers.py {' '.join(sys.argv[1:])}",
        "machine": describe(),
        "conditions": {name: getattr(conditions, name) for name in ("load_before", "others_share", "stolen_share")},
        "job": {key: value for key, value in job.items() if key not in ("checkpoint", "bundle", "cache")},
        "model": arguments.model,
        "peers": results,
        "installs": installs,
        "missing": missing,
    }
    return document | {"table": format_table(document)}


def make_job(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Make the checkpoint and our bundle of it, once, and say what every peer shall draw."""
    from random_checkpoint import DEMO, save_random

    from latentrt.engines.bundle.files import Bundle
    from latentrt.export.export import export_checkpoint

    folder = cache / "models" / arguments.model
    checkpoint, bundle = DEMO if arguments.model == "demo" else folder / "checkpoint", folder / "bundle"
    if not (checkpoint / "vae" / "config.json").is_file():
        save_random(arguments.model, checkpoint)
    with terminal_report() as report:
        export_checkpoint(str(checkpoint), bundle, precision="fp32", report=report)
    width, height = Bundle.open(bundle).manifest.default_size
    if arguments.size:
        width, height = map(int, arguments.size.split("x"))
    return {
        "checkpoint": str(checkpoint),
        "bundle": str(bundle),
        "cache": str(folder),
        "prompt": PROMPT,
        "steps": arguments.steps,
        "guidance": GUIDANCE,
        "width": width,
        "height": height,
        "batch": arguments.batch,
        "threads": arguments.threads,
    }


def prepare(name: str, job: Mapping[str, Any], cache: Path, imports: int) -> dict[str, Any]:
    """Install a peer, convert the model for it, and measure the installation. Raises PeerError."""
    peer = PEERS[name]
    python = install(peer.environment, cache)
    if peer.convert is not None and not (Path(job["cache"]) / peer.convert).is_file():
        convert(name, install(peer.convert, cache), job)
    folder = cache / "environments" / peer.environment
    figures = folder / "figures.json"
    if not figures.is_file():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        figures.write_text(json.dumps({"install_bytes": size - empty_bytes(cache)}))
    seconds = [import_seconds(python, ENVIRONMENTS[peer.environment].imports) for _ in range(imports + 1)][1:]
    return json.loads(figures.read_text()) | {"import_s": statistics.median(seconds) if seconds else None}


def install(environment: str, cache: Path) -> Path:
    """Make an environment once. Returns its Python. Raises PeerError with pip's last words."""
    folder = cache / "environments" / environment
    python, done = folder / "bin" / "python", folder / "complete"
    wanted = ENVIRONMENTS[environment]
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if done.is_file() and done.read_text() == json.dumps(wanted.installs):
        if wanted.fresh is not None:
            run([*pip, "--force-reinstall", "--no-deps", wanted.fresh], INSTALL_S)
        return python
    _say(f"{environment}: installing")
    run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_S)
    for packages in wanted.installs:
        run([*pip, *packages], INSTALL_S)
    done.write_text(json.dumps(wanted.installs))
    return python


def empty_bytes(cache: Path) -> int:
    """Return the bytes of an environment with nothing but pip in it."""
    folder = cache / "environments" / "empty"
    if not (folder / "complete").is_file():
        run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_S)
        (folder / "complete").touch()
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def convert(name: str, python: Path, job: Mapping[str, Any]) -> None:
    """Turn the checkpoint into what OpenVINO reads, in fp32. Raises PeerError."""
    _say(f"{name}: converting")
    target = Path(job["cache"]) / "openvino"
    tool = python.with_name("optimum-cli")
    asked = ["--model", job["checkpoint"], "--task", "text-to-image", "--weight-format", "fp32"]
    run([str(tool), "export", "openvino", *asked, str(target)], LOAD_S)
    (Path(job["cache"]) / str(PEERS[name].convert)).touch()


def run(command: Sequence[str], most_s: float) -> None:
    """Run a command to its end. Raises PeerError with its last words."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=most_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"`{Path(command[0]).name} {command[1]} …` took more than {most_s:.0f} s") from None
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise PeerError(f"`{Path(command[0]).name} {' '.join(command[1:4])} …` failed: {' | '.join(lines[-2:])[:300]}")


def import_seconds(python: Path, code: str) -> float:
    """Return the seconds that a fresh interpreter takes to run the code and end."""
    start = time.perf_counter()
    run([str(python), "-c", code], LOAD_S)
    return time.perf_counter() - start


class Worker:
    """A peer's process: `draw` asks it for one batch."""

    def __init__(self, name: str, job: Mapping[str, Any], cache: Path) -> None:
        self.name = name
        self.log = cache / f"{name}.log"
        self.peak_rss_bytes: int | None = None
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        python = cache / "environments" / PEERS[name].environment / "bin" / "python"
        _say(f"{name}: loading")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), str(WORKER), name, json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job["threads"])},
            )
        self.load_s = float(self._answer(LOAD_S)["load_s"])

    def draw(self) -> tuple[float | None, list[float]]:
        """Return the seconds of a batch, None if there are steps alone, and those of its steps."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"draw\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        told = self._answer(DRAW_S)
        self.peak_rss_bytes = told["peak_rss_bytes"]
        return told["seconds"], told["steps"]

    def seconds(self) -> float:
        """Draw, and return the seconds of the batch, or of its steps."""
        seconds, steps = self.draw()
        return sum(steps) if seconds is None else seconds

    def _answer(self, most_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], most_s)
        if not ready:
            self.close()
            raise PeerError(f"no answer within {most_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise PeerError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended with code {self._process.poll()}: {' | '.join(lines[-2:])[:300]}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not sent any more
                    pipe.close()


Drawn = dict[str, list[tuple[float | None, float | None]]]  # by peer, by round: seconds of the batch, of a step


def take_rounds(workers: Mapping[str, Worker], arguments: argparse.Namespace, missing: dict[str, str]) -> Drawn:
    """Let the peers take turns. One that fails on the way is left out of all rounds."""
    drawn: Drawn = {name: [] for name in workers}
    for round_, name in take_turns(list(workers), rounds=arguments.rounds, most_seconds=arguments.seconds, seed=0):
        if name in missing:
            continue
        try:
            seconds, steps = workers[name].draw()
        except PeerError as error:
            missing[name] = f"in round {round_ + 1}: {error}"
            continue
        drawn[name].append((seconds, statistics.median(steps) if steps else None))
    return {name: rounds for name, rounds in drawn.items() if name not in missing}


def summarise_peer(name: str, worker: Worker, drawn: Drawn) -> dict[str, Any]:
    """Return a peer's figures, and its ratios to ours: above 1 it takes longer."""
    figures: dict[str, Any] = {"load_s": worker.load_s, "peak_rss_bytes": worker.peak_rss_bytes}
    for index, kind in enumerate(("batch", "step")):
        theirs, ours = ([one[index] for one in drawn[which]] for which in (name, "latentrt"))
        known = None not in theirs and None not in ours
        one = measured([float(value) for value in theirs if value is not None]) if known else None
        ratio = paired_ratio(ours, theirs) if known else None  # type: ignore[arg-type]
        figures[kind] = None if one is None else {"summary": _plain(one.summary), "samples": one.samples}
        figures[f"{kind}_ratio"] = None if ratio is None else _plain(ratio)
    return figures


def _plain(record: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(record)
    return plain


def format_table(document: Mapping[str, Any]) -> str:
    """Return the result as Markdown: a row for each peer, those left out too."""
    head = ["", "batch ms", "times ours", "step ms", "times ours", "peak MiB", "installs MB", "imports s"]
    lines = [head, ["---"] * len(head)]
    for name, one in document["peers"].items():
        cells = [PEERS[name].title]
        for kind in ("batch", "step"):
            cells += _cells(one[kind], one[f"{kind}_ratio"])
        installs = document["installs"][name]
        memory, seconds = one["peak_rss_bytes"], installs["import_s"]
        cells.append("" if memory is None else f"{memory / 2**20:.0f}")
        cells += [f"{installs['install_bytes'] / 1e6:.0f}", "" if seconds is None else f"{seconds:.2f}"]
        lines.append(cells)
    lines += [
        [PEERS[n].title, f"left out: {why}".replace("|", "/"), *[""] * 6] for n, why in document["missing"].items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(figures: Mapping[str, Any] | None, ratio: Mapping[str, Any] | None) -> list[str]:
    if figures is None or ratio is None:
        return ["", ""]
    between = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return [milliseconds(figures["summary"]["p50"]), f"{ratio['estimate']:.2f}{between}"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
