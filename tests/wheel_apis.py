"""What NVIDIA's wheels offer, read from the wheels themselves: every class with its attributes, and what calls take.

The bindings are small and import where their libraries are not, over a library of empty functions that is compiled
here. They are fetched once, to .cache/wheels/, in the oldest version that we take and in the newest known.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.bundle.staging import claimed

ROOT = Path(__file__).parent.parent
SHELF = ROOT / ".cache" / "wheels"
# What the bindings ask of their libraries when they are imported; none of it is called.
FUNCTIONS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry"),
    *("getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins"),
)
SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> (.*)$", re.MULTILINE)

Api = dict[str, dict[str, Any]]
"""A class by its dotted name, "" for the module -> its attributes: a class's name, the overloads of a call, or None."""

READ = """
import importlib, inspect, json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from tests.wheel_apis import describe
print(json.dumps(describe(importlib.import_module(sys.argv[3]))))
"""


def api_of(wheel: str, module: str) -> Api:
    """Return what a module of a wheel offers. wheel: `name==version`; skips where no such wheel is made for us."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("NVIDIA makes these wheels for Linux on x86_64")
    folder = SHELF / f"{wheel.replace('==', '-')}-{sys.version_info[0]}{sys.version_info[1]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed(folder):
        if not (folder / "api.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _fetch(wheel, folder)
            read = [sys.executable, "-c", READ, str(folder), str(ROOT), module]
            text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
            (folder / "api.json").write_text(text)
    return dict(json.loads((folder / "api.json").read_text()))


def _fetch(wheel: str, folder: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target"]
    subprocess.run([*install, str(folder), wheel], check=True)
    for bindings in folder.glob("tensorrt*_bindings"):
        _compile_nothing(bindings)


def _compile_nothing(bindings: Path) -> None:
    """Lay empty libraries beside bindings, under the names that these ask for."""
    (binary,) = bindings.glob("*.so")
    names = set(re.findall(rb"lib(?:nv|tensorrt)\w+\.so\.\d+", binary.read_bytes()))
    assert names, f"{binary} asks for no library"
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = bindings / "nothing.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(bindings / "nothing.so"), str(source)], check=True)
    for name in names:
        (bindings / name.decode()).symlink_to("nothing.so")


def describe(module: Any) -> Api:
    """Return what a module offers, in plain data."""
    api: Api = {"": {}}
    for name in sorted(set(dir(module)) - {"os", "sys", "ctypes", "warnings"}):
        api[""][name] = _attribute(api, name, getattr(module, name))
    return api


def _attribute(api: Api, name: str, value: Any) -> Any:
    if isinstance(value, type):
        if name not in api:
            api[name] = {}
            for inner in dir(value):
                if not inner.startswith("__") or inner in ("__init__", "__members__"):
                    api[name][inner] = _attribute(api, f"{name}.{inner}", getattr(value, inner))
        return name
    return _overloads(value) if callable(value) else None


def _overloads(value: Any) -> Any:
    """Return the ways to call something: of each its parameters as [name, has a default], and what it gives."""
    import inspect

    found = [
        {"takes": _parameters(taken), "gives": given.rpartition(".")[2]}
        for _, taken, given in SIGNATURE.findall(value.__doc__ or "")
        if not taken.startswith("*args")
    ]
    if found:
        return found
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return []
    return [{"takes": [[one.name, one.default is not one.empty] for one in parameters], "gives": ""}]


def _parameters(text: str) -> list[list[Any]]:
    """Take the parameters of a signature of pybind11 apart; `self` is left out."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = [(part.partition(":")[0].strip(), " = " in part) for part in parts if part.strip()]
    return [[name, default] for name, default in named if name != "self"]


def accepts(overload: dict[str, Any], positional: int, named: set[str]) -> bool:
    """Tell whether something can be called with so many arguments by place, and these by name."""
    takes = overload["takes"]
    rest = takes[positional:]
    return (
        positional <= len(takes)
        and named <= {name for name, _ in rest}
        and all(default or name in named for name, default in rest)
    )
