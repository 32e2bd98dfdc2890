"""The harness: loads what is asked for, warms up, lets the variants take turns, and gathers one report."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.find import choose, find_engines
from latentrt.engines.progress import Report as Progress
from latentrt.engines.progress import silent
from latentrt.runtime.bench.cold import cold_starts, measured
from latentrt.runtime.bench.machine import Watch, describe_machine, now
from latentrt.runtime.bench.meters import GpuMeter, open_gpu_meter
from latentrt.runtime.bench.quality import PromptSet, PromptSets, component_errors, prompt_set, score_prompts
from latentrt.runtime.bench.result import (
    PROMPT,
    SCHEMA_VERSION,
    BundleFacts,
    ComponentError,
    Method,
    PromptScore,
    Report,
    Settings,
    Variant,
)
from latentrt.runtime.bench.rounds import RULE, Warmup, take_turns, warm_up
from latentrt.runtime.bench.samples import summarise
from latentrt.runtime.bench.timing import TimedPipeline
from latentrt.runtime.images.write_png import encode_png, parameters
from latentrt.runtime.result import Result
from latentrt.runtime.sampling.make import make_plan

WARMUP_SHARE = 0.5  # of the seconds asked for, all candidates together
Load = Callable[..., TimedPipeline]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: every combination of the first seven, in turns.

    samplers None, sizes (): the checkpoint's own. threads None: the backend's own choice.
    device: which of the visible GPUs to measure on, from 0
    seconds: how long the rounds may take; at least three rounds are measured
    cold: fresh processes for each backend and number of threads
    accuracy: held-out prompts to score for each variant; 0 for none
    golden: whether to replay the golden pairs first
    """

    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (20,)
    samplers: tuple[str | None, ...] = (None,)
    guidances: tuple[float, ...] = (7.5,)
    backends: tuple[str, ...] = ("auto",)
    threads: tuple[int | None, ...] = (None,)
    device: int = 0
    rounds: int = 30
    seconds: float = 120.0
    cold: int = 3
    accuracy: int = 0
    golden: bool = True
    prompt: str = PROMPT
    seed: int = 0

    def variants(self, bundle: Bundle) -> tuple[Settings, ...]:
        """Return every combination, resolved. Raises RequestError on an unknown sampler or a number of steps."""
        schedule, latents = bundle.manifest.schedule, bundle.manifest.latents
        found = (
            Settings(
                backend=choose(backend, bundle, device=self.device).backend,
                threads=threads,
                width=width,
                height=height,
                batch=batch,
                steps=steps,
                sampler=make_plan(sampler, schedule, steps=steps, tokens=latents.tokens((width, height))).sampler,
                guidance=guidance,
            )
            for backend, threads, (width, height), batch, sampler, steps, guidance in itertools.product(
                self.backends,
                self.threads,
                self.sizes or (bundle.manifest.default_size,),
                self.batches,
                self.samplers,
                self.steps,
                self.guidances,
            )
        )
        return tuple(dict.fromkeys(found))  # `--steps 4,4` asks for one

    def reasons(self, bundle: Bundle) -> dict[str, str]:
        """Return why each backend was chosen."""
        choices = [choose(backend, bundle, device=self.device) for backend in self.backends]
        return {choice.backend: choice.reason for choice in choices}


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """One batch, measured. `outside` is the part of the pipeline's seconds that no engine had."""

    seconds: Mapping[str, float]
    stages: tuple[float, ...]
    outside: float
    joules: float | None
    device_bytes: int | None


class Candidate:
    """One variant, ready to draw."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        pipe: TimedPipeline,
        meter: GpuMeter | None,
        asked: Asked,
        fresh: Iterator[int],
    ) -> None:
        self.name = name
        self.settings = settings
        self.pipe = pipe
        self._meter = meter
        self._asked = asked
        self._fresh = fresh

    def draw(self, seed: int) -> Draw:
        """Draw one batch with this seed and tell what it took."""
        self.pipe.stopwatch.reset()
        joules = self._meter.joules() if self._meter else None
        start = time.perf_counter()
        result = self._call(seed)
        drawn = time.perf_counter()
        encode_files(result)
        end = time.perf_counter()
        used = self._meter.joules() if self._meter else None
        total = drawn - start
        return Draw(
            seconds=_by_stage(result, total) | {"encode_image": end - drawn, "end_to_end": end - start},
            stages=tuple(result.step_seconds),
            outside=max(0.0, total - self._in_engines(result)) / total,
            joules=None if joules is None or used is None else used - joules,
            device_bytes=self._meter.used_bytes() if self._meter else None,
        )

    def _in_engines(self, result: Result) -> float:
        """Return the seconds in engines; where a device runs them in a queue, those of its own clock."""
        on_device = sum(result.seconds[name] for name in ("encode", "denoise", "decode"))
        return self.pipe.stopwatch.total or on_device

    def _call(self, seed: int) -> Result:
        return self.pipe(
            f"{self._asked.prompt}, {next(self._fresh)}",  # a pipeline remembers the texts that it has encoded
            n=self.settings.batch,
            steps=self.settings.steps,
            sampler=self.settings.sampler,
            guidance=self.settings.guidance,
            size=(self.settings.width, self.settings.height),
            seed=seed,
        )


def _by_stage(result: Result, total: float) -> dict[str, float]:
    stages = {name: seconds for name, seconds in result.seconds.items() if name not in ("total", "adapt")}
    count = len(result.step_seconds) or result.settings[0].steps
    return {**stages, "step": stages["denoise"] / count, "total": total}


def encode_files(result: Result) -> list[bytes]:
    """Return the pictures as PNG files with their settings, as `latentrt generate` writes them."""
    files = []
    for image, settings, seed in zip(result.images, result.settings, result.seeds, strict=True):
        file = io.BytesIO()
        encode_png(image, file, parameters(settings, seed))
        files.append(file.getvalue())
    return files


def run_bench(
    path: str,
    asked: Asked,
    *,
    command: str = "",
    prompt_sets: PromptSets | None = None,
    load: Load = TimedPipeline.load,
    progress: Progress = silent,
) -> Report:
    """Measure what is asked for. Raises BundleError, EngineError and RequestError as `Pipeline.load` and a call do.

    load: opens each pipeline of the rounds, from the bundle's path, a backend, `threads` and `device`
    """
    bundle, watch = Bundle.open(path), Watch()
    variants = asked.variants(bundle)
    prompts = prompt_set(bundle, prompt_sets or {}) if asked.accuracy else None
    errors = _errors(bundle, variants, asked.device, progress) if asked.golden else ()
    named = list(zip(names(variants), variants, strict=True))
    starts = cold_starts(
        path,
        _first_of_each_load(named),
        device=asked.device,
        count=asked.cold,
        prompt=asked.prompt,
        seed=asked.seed,
        progress=progress,
    )
    measured_variants, rounds = _measure(path, named, asked, prompts, load, progress)
    return Report(
        kind="latentrt bench",
        schema_version=SCHEMA_VERSION,
        created=now(),
        command=command,
        machine=describe_machine(asked.device),
        conditions=watch.conditions(),
        bundle=_facts(bundle),
        method=Method(
            rounds=rounds,
            rounds_asked=asked.rounds,
            seconds_asked=asked.seconds,
            seed=asked.seed,
            warmup_rule=RULE,
            prompt=asked.prompt,
        ),
        variants=measured_variants,
        cold_starts=starts,
        errors=errors,
    )


def names(variants: Sequence[Settings]) -> list[str]:
    """Return a name for each: what differs among them, or for a single one what it is."""
    written = [_written(settings) for settings in variants]
    differing = [key for key in written[0] if len({one[key] for one in written}) > 1]
    keys = differing or ["size", "batch", "steps", "sampler", "guidance"]
    return [", ".join(one[key] for key in keys) for one in written]


def _written(settings: Settings) -> dict[str, str]:
    threads = "default threads" if settings.threads is None else f"{settings.threads} threads"
    return {
        "backend": settings.backend,
        "threads": "1 thread" if settings.threads == 1 else threads,
        "size": f"{settings.width}x{settings.height}",
        "batch": f"batch {settings.batch}",
        "sampler": settings.sampler,
        "steps": "1 step" if settings.steps == 1 else f"{settings.steps} steps",
        "guidance": f"guidance {settings.guidance:g}",
    }


def _errors(
    bundle: Bundle, variants: Sequence[Settings], device: int, progress: Progress
) -> tuple[ComponentError, ...]:
    backends = dict.fromkeys(settings.backend for settings in variants)
    return tuple(error for backend in backends for error in component_errors(bundle, backend, device, progress))


def _first_of_each_load(named: Sequence[tuple[str, Settings]]) -> list[tuple[str, Settings]]:
    loads: dict[tuple[str, int | None], tuple[str, Settings]] = {}
    for name, settings in named:
        loads.setdefault((settings.backend, settings.threads), (name, settings))
    return list(loads.values())


def _measure(
    path: str,
    named: Sequence[tuple[str, Settings]],
    asked: Asked,
    prompts: PromptSet | None,
    load: Load,
    progress: Progress,
) -> tuple[tuple[Variant, ...], int]:
    meter = open_gpu_meter(asked.device)
    before = meter.used_bytes() if meter else 0
    pipes: dict[tuple[str, int | None], TimedPipeline] = {}
    try:
        for backend, threads in dict.fromkeys((s.backend, s.threads) for _, s in named):
            pipes[backend, threads] = load(path, backend, threads=threads, device=asked.device)
        fresh = itertools.count(1)
        candidates = [Candidate(name, s, pipes[s.backend, s.threads], meter, asked, fresh) for name, s in named]
        warmups = _warm_up(candidates, asked, progress)
        draws = _rounds(candidates, asked, progress)
        scores = _scores(candidates, asked, prompts, progress)
        variants = tuple(_variant(c, asked, warmups[c.name], draws[c.name], scores[c.name], before) for c in candidates)
    finally:
        for pipe in pipes.values():
            pipe.close()
    return variants, len(next(iter(draws.values())))


def _warm_up(candidates: Sequence[Candidate], asked: Asked, progress: Progress) -> dict[str, Warmup]:
    warmups, most = {}, WARMUP_SHARE * asked.seconds / len(candidates)
    for done, candidate in enumerate(candidates):
        progress("warm-up", done, len(candidates))
        warmups[candidate.name] = warm_up(_seconds_of(candidate), most_seconds=most)
    progress("warm-up", len(candidates), len(candidates))
    return warmups


def _seconds_of(candidate: Candidate) -> Callable[[], float]:
    return lambda: candidate.draw(0).seconds["end_to_end"]


def _rounds(candidates: Sequence[Candidate], asked: Asked, progress: Progress) -> dict[str, list[Draw]]:
    draws: dict[str, list[Draw]] = {candidate.name: [] for candidate in candidates}
    for round_, candidate in take_turns(candidates, rounds=asked.rounds, most_seconds=asked.seconds, seed=asked.seed):
        progress("rounds", round_, asked.rounds)
        draws[candidate.name].append(candidate.draw(round_))
    progress("rounds", asked.rounds, asked.rounds)
    return draws


def _scores(
    candidates: Sequence[Candidate], asked: Asked, prompts: PromptSet | None, progress: Progress
) -> dict[str, PromptScore | None]:
    """Score each candidate; what differs only in batch or threads draws the same pictures and shares its score."""
    known: dict[Settings, PromptScore] = {}
    scores: dict[str, PromptScore | None] = {}
    for done, candidate in enumerate(candidates):
        default = candidate.pipe.manifest.default_size
        if prompts is None or (candidate.settings.width, candidate.settings.height) != default:
            scores[candidate.name] = None  # the judge knows the demo's own size only
            continue
        progress("held-out prompts", done, len(candidates))
        same = msgspec.structs.replace(candidate.settings, batch=1, threads=None)
        if same not in known:
            known[same] = score_prompts(candidate.pipe, candidate.settings, prompts, asked.accuracy)
        scores[candidate.name] = known[same]
    if prompts is not None:
        progress("held-out prompts", len(candidates), len(candidates))
    return scores


def _variant(
    candidate: Candidate, asked: Asked, warmup: Warmup, draws: Sequence[Draw], score: PromptScore | None, before: int
) -> Variant:
    stages = zip(*(draw.stages for draw in draws), strict=True)
    joules = [draw.joules for draw in draws if draw.joules is not None]
    memory = [draw.device_bytes for draw in draws if draw.device_bytes is not None]
    steps = [1 / draw.seconds["step"] for draw in draws]
    _, record = find_engines(
        candidate.pipe.bundle,
        candidate.pipe.backend,  # type: ignore[arg-type]
        device=asked.device,
    )
    return Variant(
        name=candidate.name,
        settings=candidate.settings,
        backend=candidate.pipe.backend,
        reason=asked.reasons(candidate.pipe.bundle)[candidate.settings.backend],
        engines=record.key.directory,
        warmup=warmup,
        seconds={name: measured([draw.seconds[name] for draw in draws]) for name in draws[0].seconds},
        denoise_stages=tuple(summarise(stage) for stage in stages),
        steps_per_second=measured(steps),
        outside_engines=measured([draw.outside for draw in draws]),
        energy_j=measured(joules) if joules else None,
        device_bytes=max(memory) - before if memory else None,
        prompts=score,
    )


def _facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    return BundleFacts(
        name=bundle.name,
        family=manifest.family,
        precision=manifest.precision,
        checkpoint=manifest.provenance.checkpoint,
        graphs=manifest.graphs_digest(),
        bytes=sum(file.bytes for file in manifest.files.values()),
        quantised={name: spec.quantised for name, spec in manifest.components.items() if spec.quantised},
    )
