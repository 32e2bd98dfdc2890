"""README.md and docs/: their commands and Python run, their links lead somewhere, and they name everything there is.

A command runs if it draws from, checks or measures a bundle that is here. Others are parsed: exports, which other
tests make, what compiles for TensorRT, what listens on every address, and what names a file of the reader's own, `./…`,
that is neither here nor written by it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from latentrt.__main__ import COMMANDS, cli, find_command
from latentrt.engines import errors
from latentrt.runtime.request import Request
from latentrt.runtime.result import Result
from latentrt.runtime.sampling.catalogue import SAMPLERS
from latentrt.runtime.sampling.make import TIMESTEP_SPACINGS
from latentrt.runtime.sampling.spacings import SPACINGS
from tests.conftest import Controlled, Make, MakeControlled
from tests.lora_files import kohya, make_factors, save

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [
    ROOT / name
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "export/demo/README.md")
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(r"(?<![\w./-])(?:export|engines|runtime|tests|benchmarks|docs|src)/[\w./*-]*[\w/]")
EXTRA = re.compile(r"(?:latentrt|whl|\.)\[([\w-]+)\]")
HERE = {
    "demo/shapes",
    "my-sd15",
    "my-looks",
    "./my-video",
    "./my-svd",
    "./harbour.png",
    "./my-sd3",
    "./trace.jsonl",
}
WRITTEN = {"./engines", "./circle.mp4", "./boat.mp4", "./lake.webp", "./harbour.mp4", "./harbour.webp"}


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path, program: str) -> list[list[str]]:
    """Return the lines of a page that call a program: the words after it."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == program]


@pytest.fixture(scope="module")
def desk(
    demo_bundle: Path,
    controlled: MakeControlled,
    shown: Callable[[str], Controlled],
    motion: Controlled,
    svd: tuple[Path, Path],
    made: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with what the pages speak of: the demo's bundle, tiny ones of other kinds, pictures, LoRAs."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(demo_bundle, desk / "demo" / "shapes")
    edged = controlled("sd1", "")
    (desk / "my-sd15").symlink_to(edged.bundle)
    (desk / "my-video").symlink_to(motion.bundle)
    (desk / "my-svd").symlink_to(svd[1])
    (desk / "my-sd3").symlink_to(made("sd3", "")[1])
    (desk / "my-looks").symlink_to(shown("sd1").bundle)
    grey = Image.fromarray(np.tile(np.arange(0, 256, 2, dtype=np.uint8)[:, None], (128, 3)).reshape(128, 128, 3))
    for name in ("star", "edges", "depth", "harbour"):
        grey.resize((128, 128) if name == "star" else (32, 32)).save(desk / f"{name}.png")
    (desk / "trace.jsonl").write_text('{"at_s": 0.0, "steps": 2}\n{"at_s": 0.1, "steps": 1}\n')
    for seed, name in enumerate(("style", "person")):
        save(desk / f"{name}.safetensors", kohya(make_factors(edged.checkpoint, seed=seed)))
    (desk / "loras").mkdir()
    shutil.copy(desk / "style.safetensors", desk / "loras")
    return desk


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    names: dict[str, Any] = {"__name__": page.name}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)


def runs_here(words: list[str]) -> bool:
    """Tell whether a command is cheap and has all that it needs on the desk."""
    own = any("./" in word and word not in HERE | WRITTEN for word in words)
    compiles = "tensorrt-rtx" in words
    bundle = next((word for word in words[1:] if "/" in word or word.startswith("my-")), None)
    outside = "0.0.0.0" in words
    return words[0] != "export" and not (own or compiles or outside) and (bundle is None or bundle in HERE)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "latentrt")], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_from_top_to_bottom(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    for words in commands(page, "latentrt"):
        if not runs_here(words):
            command = find_command(words[0])
            assert command is not None
            command.make_context(words[0], words[1:])  # raises on an option or an argument that there is not
            continue
        if words[0] == "serve":
            serves(words)
            continue
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (words, done.output)


def serves(words: list[str]) -> None:
    """Run a service until it is ready, on any port that is free, and have it end."""
    command = [sys.executable, "-m", "latentrt", *words, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
        assert service.stdout is not None
        ready = service.stdout.readline()
        service.terminate()
        assert (json.loads(ready)["pid"], service.wait(120)) == (service.pid, 0)


def test_the_pages_run_commands_of_every_kind_that_can_run() -> None:
    ran = {words[0] for page in PAGES for words in commands(page, "latentrt") if runs_here(words)}
    assert ran == set(COMMANDS) - {"export"}


def test_other_commands_of_the_pages_exist() -> None:
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in [*PAGES, *OTHERS]:
        assert {words[0] for words in commands(page, "make")} <= set(targets)
        assert {words[1] for code in code_in(page) if (words := code.split())[0] == "make" and words[1:]} <= set(
            targets
        )
        scripts = re.findall(r"(?:python|pytest) ((?:benchmarks|tests)/\w+\.py)", page.read_text())
        assert [script for script in scripts if not (ROOT / script).is_file()] == []


# --- what they lead to ---


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    text = BLOCK.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[tuple[Path, str]]:
    for page in [*PAGES, *OTHERS]:
        for link in LINK.findall(BLOCK.sub("", page.read_text())):
            if "://" not in link:
                yield page, link


@pytest.mark.parametrize(("page", "link"), list(links()), ids=str)
def test_a_link_leads_to_a_file_and_a_heading(page: Path, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    named = {path for code in CODE.findall(BLOCK.sub("", page.read_text())) for path in REPOSITORY_PATH.findall(code)}
    assert [path for path in sorted(named) if not any(ROOT.glob(path))] == []


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {link.partition("#")[0] for page, link in links() if page.name == "README.md"}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked


# --- what they must name ---


def code_in(page: Path | str) -> set[str]:
    return set(CODE.findall((ROOT / page).read_text()))


def test_the_api_page_names_every_field_and_every_error() -> None:
    named = code_in("docs/api.md")
    fields = {name for kind in (Request, Result) for name in kind.__struct_fields__}
    assert fields - named == set()
    assert {*TIMESTEP_SPACINGS, *SPACINGS} - named == set()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LatentrtError)
    ]
    assert {kind.__name__ for kind in kinds} - named == set()


def options_of(command: str) -> set[str]:
    found = find_command(command)
    assert found is not None
    return {name for option in found.params if isinstance(option, click.Option) for name in option.opts} | {
        name for option in found.params for name in option.secondary_opts
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_page_has_every_option_and_no_other(command: str) -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    (section,) = re.findall(rf"^## latentrt {command}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", " ".join(CODE.findall(BLOCK.sub("", section)))))
    known = options_of(command)
    shared = (
        options_of("generate") if command in ("animate", "video") else set()
    )  # "most options of `generate` work here too"
    assert named - known <= {"--help"}
    assert known - named - shared <= {"--json", "--refit", "-o"}


def test_the_pages_name_every_extra_and_no_other() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]) - {"dev"}
    for page in PAGES:
        named = set(EXTRA.findall(page.read_text()))
        assert named <= extras, page.name
        if page.name in ("README.md", "engines.md"):
            assert named == extras, page.name


def test_the_readme_counts_the_samplers() -> None:
    assert f"({len(SAMPLERS)} of them)" in (ROOT / "README.md").read_text()


def test_the_architecture_page_has_every_room() -> None:
    rooms = {
        path.parent.relative_to(ROOT).as_posix() + "/"
        for folder in ("export", "engines", "runtime")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert rooms - code_in("docs/architecture.md") == set()


def test_a_prompts_life_goes_through_every_module_that_is_named(demo_bundle: Path) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    (section,) = re.findall(r"^## The life of a prompt\n(.*?)^In a batcher", page, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("12345678")
    code = f"""
import sys
from latentrt import Pipeline
with Pipeline.load({str(demo_bundle)!r}, "cpu") as pipe:
    pipe("a red circle", steps=1, seed=7)
print(*(name for name in sys.modules if name.startswith("latentrt.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    named = {path.removesuffix(".py").replace("/", ".") for path in CODE.findall(section) if path.endswith(".py")}
    assert {f"latentrt.{module}" for module in named - {"tests.test_pages"}} - set(done.stdout.split()) == set()


def test_what_the_readme_calls_linux_only_is_not_loaded_by_drawing(demo_bundle: Path) -> None:
    code = f"""
import sys
from latentrt.runtime.pipeline import Pipeline
with Pipeline.load({str(demo_bundle)!r}, "cpu") as pipe:
    pipe("a red circle", steps=1, seed=0)
print([name for name in ("fcntl", "resource") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
