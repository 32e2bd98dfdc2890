"""Nobody asks a component's name what it is, nor a checkpoint's family what follows from it: both are data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from latentrt.engines.bundle.manifest import Family, Join, Role
from latentrt.engines.bundle.schema_1 import CONTROL_PREFIXES, ROLES
from latentrt.export.networks.components import COMPONENTS
from latentrt.runtime.text.encoders import join_states, joined_length

ROOT = Path(__file__).parent.parent
HISTORY = "engines/bundle/schema_1.py"  # the one place that knows what names meant
# Where names are another's: what LoRA files and learned words call networks, which is what diffusers calls them.
FOREIGN = ("engines/lora/names.py", "runtime/text/textual_inversion.py")
NAMES = {*ROLES, *COMPONENTS, *(f"{start}edges" for start in CONTROL_PREFIXES), *CONTROL_PREFIXES}
TAKES_APART = ("startswith", "removeprefix", "partition", "split", "endswith")


def sources() -> list[Path]:
    return sorted(path for folder in ("export", "engines", "runtime") for path in (ROOT / folder).rglob("*.py"))


def questions(tree: ast.AST) -> Iterator[str]:
    """Yield each place at which a component's name, or a family's, is asked what it means."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], ast.Is | ast.IsNot):
            asked = {word for side in node.comparators for word in words(side)}
            if isinstance(node.ops[0], ast.Eq | ast.NotEq):
                asked |= set(words(node.left))
            subject = called(node.left)
            if (asked & NAMES and subject != "role") or asked & set(get_args(Family)):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKES_APART:
            asked = {word for argument in node.args for word in words(argument)}
            if asked & NAMES or called(node.func.value) == "component":
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.MatchValue) and set(words(node.value)) & (NAMES | set(get_args(Family))):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def words(node: ast.AST) -> list[str]:
    """Return the strings that are written out in an expression, but not those that are keys of something."""
    inner = [node.value] if isinstance(node, ast.Constant) else []
    inner += [item.value for item in getattr(node, "elts", []) if isinstance(item, ast.Constant)]
    return [value for value in inner if isinstance(value, str)]


def called(node: ast.AST) -> str:
    """Return what an expression is called: `component` for `one.spec.component`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_no_module_asks_a_name_what_it_means() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): asked
        for path in sources()
        if (asked := list(questions(ast.parse(path.read_text()))))
    }
    assert found == {}


def test_no_module_of_engines_and_runtime_writes_a_components_name_out() -> None:
    own = NAMES - set(get_args(Role)) | set(CONTROL_PREFIXES)
    found = {
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno}"
        for path in sources()
        if path.relative_to(ROOT).parts[0] != "export"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in own
    }
    assert {place for place in found if place.split(":")[0] not in (HISTORY, *FOREIGN)} == set()


@pytest.mark.parametrize(
    "line",
    [
        'component == "unet"',
        '"refiner" != name',
        'name in ("vae_decoder", "tiny_decoder")',
        "engine.spec.component.startswith(PREFIX)",
        'name.removeprefix("controlnet_")',
        'manifest.family == "sdxl"',
        'family in ("sd1", "sd2")',
    ],
)
def test_the_guard_above_sees_what_it_forbids(line: str) -> None:
    assert list(questions(ast.parse(line)))


@pytest.mark.parametrize("line", ['one.role == "controlnet"', '"unet" in entries', 'configs["unet"] == config'])
def test_the_guard_above_lets_roles_and_keys_be(line: str) -> None:
    assert not list(questions(ast.parse(line)))


def states(tokens: int, width: int) -> np.ndarray:
    return np.full((2, tokens, width), 10 * tokens + width, dtype=np.float32)


def test_encoders_join_by_width_and_by_length_with_zeros_where_one_is_smaller() -> None:
    """Stable Diffusion 3's three: two CLIPs side by side, filled up to the width of the third, which follows them."""
    clip_l, clip_g, t5 = states(4, 2), states(2, 3), states(6, 8)
    joins: list[Join] = ["width", "width", "length"]
    joined = join_states([clip_l, clip_g, t5], joins)
    expected = np.zeros((2, 10, 8), dtype=np.float32)
    expected[:, :4, :2], expected[:, :2, 2:5], expected[:, 4:] = clip_l[0, 0, 0], clip_g[0, 0, 0], t5[0, 0, 0]
    assert np.array_equal(joined, expected)
    assert joined_length([4, 2, 6], joins) == joined.shape[1]


def test_one_encoder_joins_nothing_and_is_given_as_it_is() -> None:
    only = states(4, 2)
    assert join_states([only], ["length"]) is only
    assert joined_length([4], ["length"]) == 4
