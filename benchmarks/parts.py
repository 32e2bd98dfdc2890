"""Run parts one after another, each in a process of its own with a time of its own; no part can take the others down.

A part is a command that writes its figures as JSON to the file named by its last argument. What it had written when
it crashed, hung or was cut off still counts. The whole result is saved after every part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LAST_LINES = 30  # of a part's output, kept where it did not go well


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command with its budget.

    most_s: it is stopped after this; least_s: it is not begun with less left
    needs: parts that must have gone well before
    missing: why it cannot run here at all, or None
    """

    name: str
    command: tuple[str, ...]
    most_s: float
    least_s: float = 1.0
    needs: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(slots=True)
class Outcomes:
    """What became of each part so far, by name: status (ok, failed, cut off, skipped), seconds, why, figures."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ok(self, name: str) -> bool:
        return self.parts.get(name, {}).get("status") == "ok"

    def figures(self, name: str) -> Mapping[str, Any]:
        return dict(self.parts.get(name, {}).get("figures") or {})


def run_parts(
    parts: Sequence[Part],
    *,
    seconds: float,
    folder: Path,
    save: Callable[[Outcomes], None],
    say: Callable[[str], None],
    before: Outcomes | None = None,
) -> Outcomes:
    """Run the parts within so many seconds; `save` is called after each.

    before: what an earlier run gave, which is kept: what went well there is not run again
    """
    outcomes, end = Outcomes(parts=dict(before.parts) if before else {}), time.monotonic() + seconds
    for part in (part for part in parts if not outcomes.ok(part.name)):
        left = end - time.monotonic()
        why = part.missing or _blocked(part, outcomes) or (f"{left:.0f} s left" if left < part.least_s else None)
        if why is None:
            outcomes.parts[part.name] = run_part(part, min(part.most_s, left), folder)
        else:
            outcomes.parts[part.name] = {
                "status": "skipped",
                "seconds": 0.0,
                "why": why,
                "last_lines": [],
                "figures": None,
            }
        one = outcomes.parts[part.name]
        say(f"{part.name}: {one['status']}, {one['seconds']:.1f} s{'; ' + one['why'] if one['why'] else ''}")
        save(outcomes)
    return outcomes


def _blocked(part: Part, outcomes: Outcomes) -> str | None:
    missed = [name for name in part.needs if not outcomes.ok(name)]
    return f"needs {', '.join(missed)}" if missed else None


def run_part(part: Part, seconds: float, folder: Path) -> dict[str, Any]:
    """Run one part. Returns its status, seconds, the reason if it went wrong, and its figures as far as they came."""
    result = folder / f"part-{time.monotonic_ns()}.json"
    log = result.with_suffix(".log")
    start = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*part.command, str(result)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    status = "ok" if code == 0 else "cut off" if code is None else "failed"
    last = [] if code == 0 else _last_lines(log)
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 2),
        "why": None if code == 0 else _why(code, seconds, last),
        "last_lines": last,
        "figures": _figures(result),
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what the part started, its own children too: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_lines(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]


def _why(code: int | None, seconds: float, lines: list[str]) -> str:
    if code is None:
        return f"stopped after its {seconds:.0f} s"
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{ended}: " + " | ".join(lines[-1:] if code == 2 else lines[-3:])


def _figures(result: Path) -> Any:
    try:
        return json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(figures: Mapping[str, Any], result: Path) -> None:
    """Write a part's figures, in one step: a part calls it as often as it has more."""
    beside = result.with_suffix(".writing")
    beside.write_text(json.dumps(figures), encoding="utf-8")
    beside.replace(result)
