"""What keeps the project tidy: one arrow between the folders, no torch in a service, a wheel that holds everything."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("export", "engines", "runtime")
TRAINING = ROOT / "export/demo/training"  # of the demo checkpoint: in no wheel
FURTHER_FILES = ("export/demo/checkpoint", "runtime/serve/page/static")  # folders of what is no code and travels
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "optimum")
# What only some callers of a pipeline need, or who opens a bundle: imported where it is used.
LATER = (
    *("onnxruntime", "tensorrt", "cuda", "tokenizers", "safetensors", "cachetools", "PIL", "click", "rich", "fsspec"),
    *("asyncio", "concurrent.futures", "dataclasses", "difflib", "hashlib", "numpy.random", "numpy.typing", "random"),
    *("secrets", "shutil", "subprocess", "tempfile", "latentrt.engines.build", "latentrt.engines.lora.file"),
    *("latentrt.engines.onnxruntime", "latentrt.engines.tensorrt", "latentrt.engines.verify"),
    *("latentrt.runtime.images.preview", "latentrt.runtime.images.read"),
)
# What only building and exporting need, or writing pictures to files.
BUILDING = ("latentrt.engines.graphs", "latentrt.engines.onnxruntime.build", "tempfile", "shutil", "PIL")
LIGHT = ("latentrt", "latentrt.runtime", "latentrt.runtime.pipeline", "latentrt.runtime.cli", "latentrt.engines.cli")

# Importing any of these raises, as on a machine that does not have them.
FORBID = f"""
import importlib.abc, sys
class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Wall())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" else ("latentrt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_what_a_service_loads_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_importing_the_pipeline_imports_nothing_that_only_some_of_its_callers_need() -> None:
    code = f"import sys, latentrt.runtime.pipeline; print([m for m in {LATER!r} if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_what_a_service_loads_has_no_dataclasses() -> None:
    """Each takes as long to make as fifty structs: 75 were a third of the time of importing the pipeline."""
    having = [path for path in sources("engines", "runtime") if "@dataclass" in path.read_text()]
    assert having == []


def test_a_picture_is_drawn_where_torch_cannot_be_imported(sd1_bundle: Path) -> None:
    code = f"""{FORBID}
from latentrt.runtime.pipeline import Pipeline
with Pipeline.load({str(sd1_bundle)!r}, "cpu") as pipe:
    print(pipe("a red circle", steps=2, seed=0, negative_prompt="blue").pixels.shape)
"""
    result = run(code)
    assert result.stdout.strip() == "(1, 32, 32, 3)", result.stderr


def test_drawing_imports_nothing_that_only_builds(sd1_bundle: Path) -> None:
    code = f"""
import sys
from latentrt.runtime.pipeline import Pipeline
with Pipeline.load({str(sd1_bundle)!r}, "cpu", threads=1) as pipe:
    pipe("a red circle", steps=1, seed=0)
print([m for m in {BUILDING!r} if m in sys.modules])
"""
    assert run(code).stdout.strip() == "[]"


def test_the_wall_of_the_test_above_holds() -> None:
    assert "torch is not here" in run(FORBID + "import torch").stderr


def test_only_the_command_line_prints() -> None:
    printing = []
    for path in sources(*FOLDERS):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.append(path.relative_to(ROOT).as_posix())
    assert [path for path in printing if not path.startswith("export/demo/")] == []


def test_one_confined_process_opens_pickles_and_nothing_else_does() -> None:
    opening = re.compile(r"\b(torch|pickle|joblib|dill|cloudpickle)\.loads?\(|allow_pickle=True\b|\bUnpickler\b")
    travelling = [path for path in sources(*FOLDERS) if TRAINING not in path.parents]
    having = [path for path in travelling if opening.search(path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in having] == ["export/work/unpickling.py"]


def test_the_arrow_between_the_folders_holds() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_wheel_holds_every_module_but_the_demos_training_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    travelling = [path for path in sources(*FOLDERS) if TRAINING not in path.parents]
    expected = {f"latentrt/{path.relative_to(ROOT).as_posix()}" for path in travelling}
    expected |= {f"latentrt/{path.name}" for path in (ROOT / "src/latentrt").iterdir() if path.is_file()}
    expected |= {
        f"latentrt/{path.relative_to(ROOT).as_posix()}"
        for folder in FURTHER_FILES
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert expected == {name for name in names if ".dist-info/" not in name}
    assert [path for path in travelling if "demo.training" in path.read_text()] == []


# --- nothing dead: a test, or a script of benchmarks/, keeps nothing alive but what is listed here with a reason ---

FRONT_DOORS = {  # modules that are run, or imported by whoever uses this
    "latentrt.runtime.ray_app": "serve run",
    "latentrt.export.demo.training.train": "python -m",
    "latentrt.export.demo.training.evaluate": "python -m",
}
PUBLIC = {
    "latentrt.runtime.bench.machine.describe": "every script of benchmarks/ records its machine with it",
    "latentrt.runtime.draw.step.Step.draft": "for a caller's on_step",
    "latentrt.runtime.pipeline.Pipeline.remove_embedding": "for a caller",
    "latentrt.runtime.triton.model.TritonPythonModel.initialize": "Triton calls it",
    "latentrt.runtime.triton.model.TritonPythonModel.execute": "Triton calls it",
    "latentrt.engines.tensorrt.engines.TensorRTSession.scratch_bytes": "for a caller who plans a device's memory",
}
CALLED_BY_LIBRARIES = {  # they call their own methods
    *("click.Group", "click.Command", "click.ParamType", "nn.Module", "uvicorn.Server", "MultiPartParser", "Collector"),
    "H11Protocol",
}


def said(tree: ast.AST) -> set[str]:
    """Return every name that code reads, imports or takes from something; of a text what may name code, in parts."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= set(node.module.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) == 1:
            found |= set(node.value.split("."))
    return found


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Give each function, class and constant of a module, and each method, as `Class.method`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (name for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)):
            yield name.id, node
        if isinstance(node, ast.ClassDef) and not {ast.unparse(base).split("[")[0] for base in node.bases} & (
            CALLED_BY_LIBRARIES
        ):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))


def unused() -> set[str]:
    trees = {module_of(path): ast.parse(path.read_text()) for path in sources(*FOLDERS, "src/latentrt")}
    words = {module: Counter(word for node in tree.body for word in said(node)) for module, tree in trees.items()}
    found = set()
    for module, tree in trees.items():
        room = module.rpartition(".")[2]
        users = {other for other in trees if other == module or room in words[other]}
        for name, node in definitions(tree):
            word = name.rpartition(".")[2]
            inside = word in said(node) if "." not in name else False
            wanted = trees if "." in name else users  # a method is called on an object, whoever made that
            count = sum(words[other][word] for other in wanted) - inside
            if count <= 0 and not word.startswith("__"):
                found.add(f"{module}.{name}")
    return found


def test_every_function_class_and_constant_is_used_by_what_travels() -> None:
    assert unused() == set(PUBLIC)


def test_every_module_is_imported_by_another_or_is_a_front_door() -> None:
    trees = {module_of(path): ast.parse(path.read_text()) for path in sources(*FOLDERS, "src/latentrt")}
    imported = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                imported.add(node.value)  # a command, a backend: by name where it is used
    rooms = {module_of(path) for path in sources(*FOLDERS, "src/latentrt") if path.name.startswith("__")}
    assert set(trees) - imported - rooms == set(FRONT_DOORS)


# --- the house in rooms ---

LONGEST_CHAIN = 13  # files, each imported by the one before where it is loaded
LARGEST_ROOM = 13  # files, without __init__.py


def imported(path: Path, known: set[str]) -> set[str]:
    """Return the project's modules that a file imports when it is loaded itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module}
    return (found & known) - {module_of(path)}


def test_import_chains_are_short_and_run_in_no_circle(capsys: pytest.CaptureFixture[str]) -> None:
    files = {module_of(path): path for path in sources(*FOLDERS)}
    graph = {module: imported(path, set(files)) for module, path in files.items()}
    longest: dict[str, tuple[str, ...]] = {}
    for module in graphlib.TopologicalSorter(graph).static_order():  # raises where there is a circle
        longest[module] = (module, *max((longest[used] for used in graph[module]), key=len, default=()))
    chain = max(longest.values(), key=len)
    with capsys.disabled():
        print(f"\nthe longest import chain: {len(chain)} files: {' > '.join(chain)}")
    assert len(chain) <= LONGEST_CHAIN


def test_a_room_holds_about_a_dozen_files(capsys: pytest.CaptureFixture[str]) -> None:
    rooms = Counter(path.parent.relative_to(ROOT) for path in sources(*FOLDERS) if path.name != "__init__.py")
    room, files = rooms.most_common(1)[0]
    with capsys.disabled():
        print(f"\nthe largest folder: {room} with {files} files")
    assert files <= LARGEST_ROOM


@pytest.mark.parametrize("room", sorted({path.parent for path in sources(*FOLDERS)}), ids=lambda room: room.name)
def test_a_room_says_what_belongs_there(room: Path) -> None:
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
