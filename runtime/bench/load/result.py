"""The result of a load: its documents and their JSON. `latentrt bench-serve --schema` prints what they are.

Seconds everywhere; rates are requests a second; shares lie between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from latentrt.engines.bundle.parsing import ParseError, decode, parse, read_content
from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Document
from latentrt.runtime.bench.load.arrivals import Share
from latentrt.runtime.bench.load.figures import Run
from latentrt.runtime.bench.load.search import Bound
from latentrt.runtime.bench.load.simulator.replica import Times
from latentrt.runtime.bench.machine import Conditions, Machine

KIND = "latentrt bench-serve"
SCHEMA_VERSION = 1


class Goodput(Document, frozen=True, kw_only=True):
    """The highest rate of one seed's requests at which 95 % of them were in time, null where it was not looked for.

    bound: `found`, or that it is `at least` or `at most` the rate, where no tried rate failed or none passed
    runs: every rate that was tried, in that order
    """

    seed: int
    rate: float | None
    bound: Bound | None
    runs: tuple[Run, ...]


class Spread(Document, frozen=True, kw_only=True):
    """The median over seeds, with the lowest and the highest.

    confidence: that the true median lies between those two: 1 - 2 / 2**seeds, whatever the distribution
    """

    median: float
    lowest: float
    highest: float
    confidence: float


class Serving(Document, frozen=True, kw_only=True):
    """One way of serving: `continuous`, `one` at a time, `static` batches, or the server at a `url`.

    goodput: over the seeds; better: how many times that of this way `continuous` reaches, seed by seed
    predicted: what the simulator says of the same requests, seed by seed; prediction: as a part of what was found
    """

    name: str
    seeds: tuple[Goodput, ...]
    goodput: Spread | None
    better: Spread | None
    predicted: tuple[float, ...] = ()
    prediction: Spread | None = None


class Method(Document, frozen=True, kw_only=True):
    """How it was measured.

    cv: of the gaps between requests, 1 for a Poisson process; requests: in each run
    multiple: of a request's own time, within which it must be answered; most, waiting: pictures together, in the line
    skips_idle: time in which there was nothing to draw was left out
    """

    target: str
    mix: tuple[Share, ...]
    trace: str | None
    cv: float
    requests: int
    first_seed: int
    multiple: float
    most: int
    waiting: int
    skips_idle: bool


class Report(Document, frozen=True, kw_only=True):
    """One run of `latentrt bench-serve`. alone_s: a request's own time by itself, by kind"""

    kind: Literal["latentrt bench-serve"]
    schema_version: int
    created: str
    command: str
    machine: Machine
    conditions: Conditions
    method: Method
    alone_s: Mapping[str, float]
    times: Times | None
    servings: tuple[Serving, ...]


def document_text(document: Document) -> str:
    """Write a document as JSON."""
    return json.dumps(msgspec.to_builtins(document), indent=1, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read a report strictly. Raises RequestError with the path of what is wrong in it."""
    try:
        document = decode(read_content(path), strict=True)
        if not isinstance(document, dict) or document.get("kind") != KIND:
            raise ParseError("is not a result of `latentrt bench-serve`")
        if document.get("schema_version") != SCHEMA_VERSION:
            raise ParseError(f"has schema version {document.get('schema_version')}, not {SCHEMA_VERSION}")
        return parse(Report, document)
    except ParseError as error:
        raise RequestError(f"{path} {error}; name a file that --json of this version wrote") from None


def read_times(path: Path) -> Times:
    """Read the times of a machine's parts: of a report, or by themselves. Raises RequestError."""
    try:
        document = decode(read_content(path), strict=True)
        if isinstance(document, dict) and "times" in document:
            document = document["times"]
        return parse(Times, document)
    except ParseError as error:
        raise RequestError(f"times: {path} {error}; name a result of --simulate, or what its `times` holds") from None
