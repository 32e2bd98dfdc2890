"""The result of a benchmark: its documents, their JSON, and nothing else. `latentrt bench --schema` prints it.

Seconds, bytes and joules everywhere; shares lie between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from latentrt.engines.bundle.files import atomic_write, disk_errors
from latentrt.engines.bundle.parsing import ParseError, parse, read_document
from latentrt.engines.bundle.quantisation import Quantisation
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Document
from latentrt.runtime.bench.machine import Conditions, Machine
from latentrt.runtime.bench.rounds import Warmup
from latentrt.runtime.bench.samples import Summary

SCHEMA_VERSION = 1

PROMPT = "a large red circle on a striped blue background"  # the one that is drawn where none is named


class Measured(Document, frozen=True, kw_only=True):
    """A figure that was measured once in each round: the summary, and every measurement in the order of rounds."""

    summary: Summary
    samples: tuple[float, ...]


class Settings(Document, frozen=True, kw_only=True):
    """What one variant draws. Two results are compared where these are equal."""

    backend: str
    threads: int | None
    width: int
    height: int
    batch: int
    steps: int
    sampler: str
    guidance: float


class PromptScore(Document, frozen=True, kw_only=True):
    """How many of the demo's held-out prompts were drawn right: shape, colour and background.

    low, high: 95 % confidence interval of the share
    """

    prompts: int
    right: int
    share: float
    low: float
    high: float


class Variant(Document, frozen=True, kw_only=True):
    """One way to draw, measured.

    backend, reason: what ran, and why it was chosen
    seconds: by stage. tokenize, encode, denoise, decode as the pipeline tells them; step is denoise over the number of
        stages; encode_image is compressing the pictures as PNG; total is from the prompt to pixels; end_to_end has
        the PNG too. All of them are of a whole batch.
    denoise_stages: each denoise stage by itself, in the order of the stages; empty if the device runs them in
        one queue and the host cannot tell
    steps_per_second: denoise stages of the whole batch a second
    outside_engines: part of `total` that the host spent outside all engines; where a device runs them in a queue, the
        part outside of the device's own clock, which starts before the text encoder and stops after the VAE
    energy_j: joules of a batch, from NVML's counter of the whole GPU; null where NVML offers none
    device_bytes: most GPU memory in use after any round over what was in use before loading; null without a GPU
    prompts: null where the bundle is not the demo's or none were asked for
    """

    name: str
    settings: Settings
    backend: str
    reason: str
    engines: str
    warmup: Warmup
    seconds: Mapping[str, Measured]
    denoise_stages: tuple[Summary, ...]
    steps_per_second: Measured
    outside_engines: Measured
    energy_j: Measured | None
    device_bytes: int | None
    prompts: PromptScore | None


class ColdStart(Document, frozen=True, kw_only=True):
    """A fresh process that draws one picture and another, with the files in the system's cache.

    seconds: interpreter until Python runs our first line; import; load until the engines are ready; first, the first
        picture; second, the next one; total is all before the second
    peak_rss_bytes: the most memory resident, at the end; loaded_rss_bytes: before the first picture
    """

    name: str
    settings: Settings
    seconds: Mapping[str, Measured]
    loaded_rss_bytes: Measured
    peak_rss_bytes: Measured


class ComponentError(Document, frozen=True, kw_only=True):
    """The largest difference of a component's outputs from those recorded in fp32, over their largest magnitude."""

    backend: str
    component: str
    error: float
    limit: float


class BundleFacts(Document, frozen=True, kw_only=True):
    """What was measured.

    graphs is the SHA-256 over the canonical graphs and weights; quantised, by component, what computes in 8 bits
    """

    name: str
    family: str
    precision: str
    checkpoint: str
    graphs: str
    bytes: int
    quantised: Mapping[str, Quantisation] = msgspec.field(default_factory=dict)


class Method(Document, frozen=True, kw_only=True):
    """How it was measured. rounds is what was reached, of rounds_asked; the seed orders the candidates.

    prompt: of every picture, each time followed by another number, so that its text is encoded again; the empty
        negative prompt is the same each time, and remembered
    """

    rounds: int
    rounds_asked: int
    seconds_asked: float
    seed: int
    warmup_rule: str
    prompt: str


class Report(Document, frozen=True, kw_only=True):
    """One run of `latentrt bench`."""

    kind: Literal["latentrt bench"]
    schema_version: int
    created: str
    command: str
    machine: Machine
    conditions: Conditions
    bundle: BundleFacts
    method: Method
    variants: tuple[Variant, ...]
    cold_starts: tuple[ColdStart, ...]
    errors: tuple[ComponentError, ...]


def to_json(report: Report) -> str:
    """Write a report as JSON."""
    return json.dumps(msgspec.to_builtins(report), indent=1, allow_nan=False) + "\n"


def write_report(report: Report, path: Path) -> None:
    """Write a report in one step: a killed run leaves the old file or none. Raises BundleError."""
    write_text(to_json(report), path)


def write_text(text: str, path: Path) -> None:
    """Write a text file in one step, with its folder. Raises BundleError."""
    with disk_errors(path), atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read a report strictly. Raises RequestError with the path of what is wrong in it."""
    try:
        document = read_document(path, strict=True)
    except ParseError as error:
        raise RequestError(f"{path} {error}; name a file that --json wrote") from None
    if not isinstance(document, dict) or document.get("kind") != "latentrt bench":
        raise RequestError(f"{path} is not a result of `latentrt bench`; name a file that --json wrote")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise RequestError(
            f"{path} has schema version {document.get('schema_version')}, this latentrt reads {SCHEMA_VERSION}; "
            "measure again"
        )
    try:
        return parse(Report, document)
    except ParseError as error:
        raise RequestError(f"{path} {error}; measure again") from None
