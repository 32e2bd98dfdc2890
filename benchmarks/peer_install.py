"""Environments of peers.py: made once, with a wheel of what has to be compiled, and measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer_tables import ENVIRONMENTS, ROOT, PeerError

INSTALL_S, IMPORT_S = 7200.0, 600.0


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
    say(f"{environment}: installing")
    run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_S)
    if wanted.compiled is not None:
        pip += ["--find-links", str(build_wheel(wanted.compiled, cache, python))]
    for packages in wanted.installs:
        run([*pip, *packages], INSTALL_S)
    done.write_text(json.dumps(wanted.installs))
    return python


def build_wheel(pinned: str, cache: Path, python: Path) -> Path:
    """Compile a package once, as its own build says to. Returns the folder with its wheel. Raises PeerError."""
    wheels = cache / "wheels"
    name, _, version = pinned.replace("-", "_").partition("==")
    if not any(wheels.glob(f"{name}-{version}-*.whl")):
        say(f"{pinned}: compiling")
        command = [str(python), "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
        start = time.perf_counter()
        run([*command, "--wheel-dir", str(wheels), pinned], INSTALL_S)
        say(f"{pinned}: compiled in {time.perf_counter() - start:.0f} s")
    return wheels


def measure_install(environment: str, python: Path, cache: Path, imports: int) -> dict[str, Any]:
    """Return the bytes of an environment beside an empty one's, and the seconds of importing what a user imports."""
    folder = cache / "environments" / environment
    figures = folder / "figures.json"
    if not figures.is_file():
        figures.write_text(json.dumps({"install_bytes": _bytes(folder) - _empty_bytes(cache)}))
    seconds = [import_seconds(python, ENVIRONMENTS[environment].imports) for _ in range(imports + 1 if imports else 0)][
        1:
    ]
    return json.loads(figures.read_text()) | {"import_s": statistics.median(seconds) if seconds else None}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _empty_bytes(cache: Path) -> int:
    """Return the bytes of an environment with nothing but pip in it."""
    folder = cache / "environments" / "empty"
    if not (folder / "complete").is_file():
        run([sys.executable, "-m", "venv", "--clear", str(folder)], INSTALL_S)
        (folder / "complete").touch()
    return _bytes(folder)


def import_seconds(python: Path, code: str) -> float:
    """Return the seconds that a fresh interpreter takes to run the code and end."""
    start = time.perf_counter()
    run([str(python), "-c", code], IMPORT_S)
    return time.perf_counter() - start


def own_environment() -> dict[str, str]:
    """Return the environment variables without those that would bring this Python's packages to another."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def run(command: Sequence[str], most_s: float) -> None:
    """Run a command to its end, from the repository's root. Raises PeerError with its last words."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=own_environment(),
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


def say(line: str) -> None:
    """Tell whoever waits what is being done."""
    print(line, file=sys.stderr, flush=True)
