"""What latentrt is made of: a wheel that is the same whenever it is built, and licences that are told as they are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

from tests.licences import FOR_GPUS, PAGE, extras, installed, rows

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| ([\w.-]+) \| (.+) \| (.+) \|$", re.MULTILINE)
MADE_OF = ("src", "export", "engines", "runtime", "pyproject.toml", "README.md", "LICENSE")


def test_the_page_of_licences_says_what_installed_packages_say() -> None:
    """Row by row for what we ask for. What that brings changes with its versions, but not to a new licence."""
    on_page = {name: (text, by) for name, text, by in ROW.findall(PAGE.read_text()) if name != "package"}
    found = rows()
    named = {canonicalize_name(requirement.name) for texts in extras().values() for requirement in texts} - {"latentrt"}
    assert {name: on_page[name] for name in named} == {name: found[name] for name in named}
    assert {text for text, _ in found.values()} - {text for text, _ in on_page.values()} == set()


def test_every_requirement_is_installed_or_known_to_be_for_gpus() -> None:
    named = {canonicalize_name(requirement.name) for texts in extras().values() for requirement in texts} - {"latentrt"}
    assert {name for name in named if installed(name) is None} <= set(FOR_GPUS) <= named


def test_two_builds_at_other_times_and_places_give_the_same_wheel(tmp_path: Path) -> None:
    digests = set()
    for number in (1, 2):
        place = tmp_path / f"clone-{number}"
        place.mkdir()
        for name in MADE_OF:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, place / name, **({"symlinks": True} if source.is_dir() else {}))  # type: ignore[operator]
        for path in place.rglob("*.py"):
            os.utime(path, (number * 1e9, number * 1e9))
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place / "dist")]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
        (wheel,) = (place / "dist").glob("*.whl")
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1
