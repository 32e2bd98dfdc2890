"""What the service costs those who install it, and that it costs nothing to those who only draw."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
WEB = (
    "starlette",
    "uvicorn",
    "h11",
    "anyio",
    "sse_starlette",
    "python_multipart",
    "prometheus_client",
    "opentelemetry",
)


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the names of all distributions that requirements install here."""
    found: set[str] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name == "latentrt":
            left += [(Requirement(one), "") for own in requirement.extras for one in extras(own)]
        elif name not in found:
            found.add(name)
            further = [Requirement(text) for text in metadata.requires(name) or ()]
            left += [(one, own) for one in further for own in ("", *requirement.extras)]
    return found


def extras(name: str) -> list[str]:
    return list(PROJECT["optional-dependencies"][name])


def megabytes(name: str) -> float:
    places = [Path(str(file.locate())) for file in metadata.files(name) or ()]
    return sum(place.stat().st_size for place in places if place.is_file()) / 1e6


def test_the_service_adds_at_most_ten_megabytes(capsys: pytest.CaptureFixture[str]) -> None:
    """Acceptance 20."""
    drawing = closure([*PROJECT["dependencies"], *extras("cpu")])
    serving = closure([*PROJECT["dependencies"], *extras("cpu"), *extras("serve")])
    added = {name: megabytes(name) for name in serving - drawing}
    assert {"starlette", "uvicorn", "prometheus-client"} <= set(added)
    with capsys.disabled():
        print(f"\nlatentrt[serve] adds {sum(added.values()):.1f} MB: {', '.join(sorted(added))}")
    assert sum(added.values()) <= 10


@pytest.mark.parametrize(
    "module", ["latentrt.runtime.pipeline", "latentrt.runtime.batching.batcher", "latentrt.__main__"]
)
def test_drawing_imports_no_web_library(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {WEB!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_serving_imports_no_tracing_unless_it_is_asked_for() -> None:
    code = "import sys, latentrt.runtime.serve.server; print('opentelemetry' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
