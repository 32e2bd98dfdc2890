"""A user's program has the whole public API, and runs. What type checkers say of it: `make lint`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import latentrt
from latentrt import Batcher, Cancellation, Pipeline, Result, Step, Stream, errors
from tests import user_program

PROGRAM = Path(user_program.__file__)
INNER = {  # public among our own modules, and no user's
    *("loaded", "waking", "leave", "draft_beside"),
    "hold",  # of a batcher: the service's, while it changes models
    "engines",
}


def said() -> set[str]:
    """Return every name, attribute and keyword of the program."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(PROGRAM.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                found.add(name)
    return found


def methods(kind: Any) -> set[str]:
    fields = getattr(kind, "__struct_fields__", ())
    own = {name for base in kind.__mro__ if base.__module__.startswith("latentrt") for name in vars(base)}
    return {name for name in {*own, *fields} if not name.startswith("_")} - INNER


def test_the_program_uses_every_public_name() -> None:
    assert set(latentrt.__all__) - said() == set()
    assert set(errors.__all__) - said() == set()


@pytest.mark.parametrize("kind", [Pipeline, Batcher, Cancellation, Stream, Step, Result])
def test_the_program_uses_every_public_method(kind: Any) -> None:
    assert methods(kind) - said() == set()


def test_the_program_imports_nothing_else_of_latentrt() -> None:
    imports = [node for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {str(node.module) for node in imports if str(node.module).startswith("latentrt")} == {"latentrt"}


def test_the_program_runs(demo_bundle: Path, tmp_path: Path) -> None:
    assert user_program.main(demo_bundle, tmp_path) == 10
    assert len(list(tmp_path.glob("*.png"))) == 3
