"""Every call of TensorRT, its lean runtime, TensorRT-RTX and cuda-bindings is one that the real wheels take.

Our code is read, not run: each attribute of an object of theirs must be there, and take the arguments it is given, in
the oldest wheel that we take and in the newest known. The stand-ins' names are held against the same wheels.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import host_tensorrt
from tests.wheel_apis import Api, accepts, api_of

ROOT = Path(__file__).parent.parent
WHEELS = {
    "tensorrt 10.14": ("tensorrt-cu13-bindings==10.14.1.48.post1", "tensorrt_bindings"),
    "tensorrt 11.4": ("tensorrt-cu13-bindings==11.4.0.106", "tensorrt_bindings"),
    "lean 10.14": ("tensorrt-lean-cu13-bindings==10.14.1.48.post1", "tensorrt_lean_bindings"),
    "lean 11.4": ("tensorrt-lean-cu13-bindings==11.4.0.106", "tensorrt_lean_bindings"),
    "rtx 1.4": ("tensorrt-rtx-cu13-bindings==1.4.0.76", "tensorrt_rtx_bindings"),
    "rtx 1.7": ("tensorrt-rtx-cu13-bindings==1.7.1.116", "tensorrt_rtx_bindings"),
}
CUDA = ("cuda-bindings==12.9.1", "cuda-bindings==13.5.0")

MODULE = ""
# What our files call objects of theirs, and their class. A name that is missing here is found by the last test.
OBJECTS: dict[str, dict[str, str]] = {
    "logger": {"library": MODULE},
    "library": {"library": MODULE},
    "execution": {
        "library": MODULE,
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "program.engine": "ICudaEngine",
        "config": "IRuntimeConfig",
        "self._cache": "IRuntimeCache",
        "self._context": "IExecutionContext",
    },
    "engines": {"program.library": MODULE, "refitter": "Refitter"},
    "compile": {
        "library": MODULE,
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "e": "ParserError",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "layer": "ILayer",
        "layer.attention": "IAttention",
        "cache": "ITimingCache",
        "config.get_timing_cache()": "ITimingCache",
    },
}
RUNS, BUILDS = ("logger", "execution", "engines"), ("compile",)
USED_BY = {name: RUNS if name.startswith("lean") else (*RUNS, *BUILDS) for name in WHEELS}
# What is asked for where TensorRT-RTX alone has it, behind a look whether it is there.
RTX_ALONE = {
    ("ICudaEngine", "create_runtime_config"),
    ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "serialize"),
    ("IRuntimeCache", "deserialize"),
    (MODULE, "ComputeCapability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
}
# A layer is handed out as the base class, and is made what it is (compile._let_attention_decompose).
ADDED = {("ILayer", "attention")}


@pytest.fixture(params=WHEELS)
def wheel(request: pytest.FixtureRequest) -> tuple[str, Api]:
    return request.param, api_of(*WHEELS[request.param])


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / "engines" / "tensorrt" / f"{name}.py").read_text())


class Reader:
    """Tells the class of what an expression of one of our files is, as far as it is one of theirs."""

    def __init__(self, api: Api, objects: dict[str, str]) -> None:
        self.api, self.objects = api, objects

    def kind(self, node: ast.AST) -> str | None:
        named = self.objects.get(ast.unparse(node))
        if named is not None:
            return named
        if isinstance(node, ast.Attribute):
            found = self.attribute(node)
            return found if isinstance(found, str) else None
        return None

    def attribute(self, node: ast.Attribute) -> Any:
        """Return what an attribute is in the wheel, or MISSING; OTHER where it is not one of theirs."""
        of = self.kind(node.value)
        return OTHER if of is None else self.api.get(of, {}).get(node.attr, MISSING)

    def complaints(self, tree: ast.Module, *, rtx: bool) -> Iterator[str]:
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            found, of = self.attribute(node), self.kind(node.value)
            where = f"line {node.lineno}: {ast.unparse(node)}"
            if found is MISSING:
                known = (
                    (of, node.attr) in ADDED or node.attr.startswith("__") or (not rtx and (of, node.attr) in RTX_ALONE)
                )
                if not known:
                    yield f"{where}: {of or 'the module'} has none"
            elif id(node) in calls and node.attr != "__init__" and found not in (OTHER, None, []):
                overloads = self.api[found].get("__init__") if isinstance(found, str) else found
                if not fits(overloads, calls[id(node)]):
                    yield f"{where}: takes {overloads}"


MISSING, OTHER = object(), object()


def fits(overloads: Any, call: ast.Call) -> bool:
    if not overloads or any(isinstance(one, ast.Starred) for one in call.args):
        return True
    named = {str(keyword.arg) for keyword in call.keywords}
    return any(accepts(overload, len(call.args), named) for overload in overloads)


def test_every_call_is_one_that_the_wheel_takes(wheel: tuple[str, Api]) -> None:
    name, api = wheel
    complaints = {
        file: found
        for file in USED_BY[name]
        if (found := list(Reader(api, OBJECTS[file]).complaints(tree(file), rtx=name.startswith("rtx"))))
    }
    assert complaints == {}


@pytest.mark.parametrize(
    "line",
    [
        "library.Runtime(logger, 1)",
        "library.Runtimes(logger)",
        "runtime.deserialize_cuda_engine()",
        "engine.get_tensor_profile_shape(name)",
        "self._context.set_device_memory(address)",
        "self._context.execute_async_v3(stream_handle=1, wait=True)",
        "library.TensorIOMode.BOTH",
        "library.ExecutionContextAllocationStrategy.USER",
    ],
)
def test_the_check_above_sees_what_no_wheel_takes(line: str, wheel: tuple[str, Api]) -> None:
    assert list(Reader(wheel[1], OBJECTS["execution"]).complaints(ast.parse(line), rtx=False))


def test_flags_that_are_named_are_there(wheel: tuple[str, Api]) -> None:
    """The builder's are set by name: `_configure` asks for one of TensorRT-RTX's only where there is one."""
    name, api = wheel
    (configure,) = (node for node in tree("compile").body if getattr(node, "name", "") == "_configure")
    named = {node.value for node in ast.walk(configure) if isinstance(node, ast.Constant) and str(node.value).isupper()}
    assert {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "REQUIRE_USER_ALLOCATION"} <= named
    of_rtx, of_tensorrt = {"REQUIRE_USER_ALLOCATION"}, {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    needed = named - {"SM"} - (of_tensorrt if name.startswith("rtx") else of_rtx)
    assert name.startswith("lean") or needed <= set(api["BuilderFlag"])


def test_what_is_asked_for_by_a_string_is_there(wheel: tuple[str, Api]) -> None:
    """`getattr` with the names of what only some libraries have."""
    name, api = wheel
    asked = {
        node.args[1].value
        for file in OBJECTS
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if isinstance(node.args[1], ast.Constant)
    } - {"REQUIRE_USER_ALLOCATION", "__members__"}
    assert asked == {"DynamicShapesKernelSpecializationStrategy", "is_stream_capturable", "ComputeCapability"}
    for attribute in asked:
        there = attribute in api[MODULE] or attribute in api["IExecutionContext"]
        assert there == name.startswith("rtx"), attribute


def methods(body: ast.ClassDef) -> dict[str, int]:
    """Return the methods of a class by name, with how many arguments each takes at least."""
    return {
        node.name: len(node.args.args) - 1 - len(node.args.defaults)
        for node in body.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_what_our_subclasses_override_is_what_the_library_calls(wheel: tuple[str, Api]) -> None:
    name, api = wheel
    for file in USED_BY[name]:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ClassDef) and node.bases and ast.unparse(node.bases[0]).startswith("library."):
                base = node.bases[0].attr  # type: ignore[attr-defined]
                for method, takes in methods(node).items():
                    assert any(len(one["takes"]) == takes for one in api[base][method] or ()), f"{base}.{method}"


STAND_INS = {
    "ILogger": "ILogger",
    "Runtime": "Runtime",
    "Engine": "ICudaEngine",
    "Refitter": "Refitter",
    "Config": "IRuntimeConfig",
    "RuntimeCache": "IRuntimeCache",
    "Context": "IExecutionContext",
    "CapturableContext": "IExecutionContext",
}
HELPERS = {"Runtime.fails", "Engine.weigh", "Context.name"}  # what the stand-ins have for themselves
ENUMS = {
    "DataType": host_tensorrt.DataType,
    "TensorIOMode": host_tensorrt.TensorIOMode,
    "ExecutionContextAllocationStrategy": host_tensorrt.Strategy,
    "ILogger.Severity": host_tensorrt.ILogger.Severity,
    "DynamicShapesKernelSpecializationStrategy": host_tensorrt.Kernels,
}


def test_a_stand_in_has_no_method_that_the_real_class_lacks(wheel: tuple[str, Api]) -> None:
    name, api = wheel
    stand_ins = ast.parse(Path(host_tensorrt.__file__).read_text())
    for node in stand_ins.body:
        if not isinstance(node, ast.ClassDef):
            continue
        real = STAND_INS[node.name]
        for method, takes in methods(node).items():
            of_rtx = (real, method) in RTX_ALONE or method == "is_stream_capturable"
            if f"{node.name}.{method}" in HELPERS or (of_rtx and not name.startswith("rtx")):
                continue
            assert any(accepts(one, takes, set()) for one in api[real].get(method) or ()), (
                f"{node.name}.{method} with {takes} arguments: {real} has {api[real].get(method)}"
            )


def test_a_stand_ins_enumerations_have_the_real_members(wheel: tuple[str, Api]) -> None:
    name, api = wheel
    for enumeration, members in ENUMS.items():
        if name.startswith("rtx") or enumeration != "DynamicShapesKernelSpecializationStrategy":
            assert set(members.__members__) <= set(api[enumeration]), enumeration


def own_names(trees: list[ast.Module]) -> set[str]:
    """Return the names of what our own classes have."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    stored = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    fields = (node.target for node in nodes if isinstance(node, ast.AnnAssign))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return defined | {node.attr for node in stored if ast.unparse(node.value) == "self"} | set(map(ast.unparse, fields))


def test_no_object_of_theirs_is_missing_in_the_table() -> None:
    """What has an attribute that only theirs have must be one of `OBJECTS`, whatever it is called."""
    api = api_of(*WHEELS["rtx 1.7"])
    trees = {path.stem: tree(path.stem) for path in (ROOT / "engines" / "tensorrt").glob("*.py")}
    theirs = {attribute for name in api if name and "." not in name for attribute in api[name] if "_" in attribute}
    theirs -= own_names(list(trees.values())) | {"__init__"}
    unknown = [
        f"{file}.py:{node.lineno}: {ast.unparse(node)}"
        for file, parsed in trees.items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Attribute) and node.attr in theirs
        if Reader(api, OBJECTS.get(file, {})).kind(node.value) is None
    ]
    assert unknown == []
    assert {"infer_shapes", "set_tensor_address", "build_serialized_network", "set_named_weights"} <= theirs


# --- cuda-bindings ---


def cuda_uses() -> Iterator[tuple[str, ast.Call | None]]:
    """Yield each name of CUDA's runtime that the seam uses, with the call that it is given its arguments in."""
    for path in sorted((ROOT / "engines" / "cuda").glob("*.py")):
        parsed = ast.parse(path.read_text())
        calls = {id(node.func): node for node in ast.walk(parsed) if isinstance(node, ast.Call)}
        for node in ast.walk(parsed):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                if isinstance(name, str) and name.startswith("cuda") and name.isalnum() and "." not in name:
                    inner = ast.Call(func=node.func, args=node.args[1:], keywords=node.keywords)
                    yield name, inner if isinstance(node.func, ast.Attribute) and node.func.attr == "_call" else None
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
                yield node.attr, calls.get(id(node))


@pytest.mark.parametrize("version", CUDA)
def test_every_call_of_cuda_is_one_that_its_bindings_take(version: str) -> None:
    api = api_of(version, "cuda.bindings.runtime")
    members = {name for kind in api.values() for name in kind}
    used = list(cuda_uses())
    assert len({name for name, _ in used}) > 30
    for name, call in used:
        assert name in members, name
        overloads = api[MODULE].get(name)
        if call is not None and isinstance(overloads, list):
            assert fits(overloads, call), f"{name} takes {overloads}, given {ast.unparse(call)}"


def test_the_real_bindings_are_what_the_seam_was_checked_against() -> None:
    """The newest that the check knows is the one that is installed here."""
    import importlib.metadata

    assert f"cuda-bindings=={importlib.metadata.version('cuda-bindings')}" in CUDA
