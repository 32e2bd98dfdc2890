"""Every file of a bundle is altered: bits flip, ends are cut off, bytes are added, files go. It is refused, or draws
the picture that it drew before.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import LatentrtError
from latentrt.engines.verify.verify import verify
from latentrt.runtime.pipeline import Pipeline

FAMILIES = ("sd1", "sd2", "sdxl", "sd3")
MOST = 10_000  # in the long form, of all families
WAYS = ("flip", "flip", "flip", "cut", "grow", "empty", "zeros", "remove", "another")
ASKED: dict[str, Any] = {"prompt": "a red circle", "steps": 1, "seed": 3}


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """An alteration that was neither refused nor harmless."""

    family: str
    number: int
    file: str
    way: str
    what: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of alterations, in all and by family.

    refused: when the bundle is loaded or draws; harmless: it draws the same picture
    verify_refused: those that `verify` names, which reads files that drawing does not
    """

    counts: dict[str, int]
    families: dict[str, dict[str, int]]
    found: list[Found]


def bundles(work: Path) -> dict[str, Path]:
    """Return a tiny bundle of each family, made once for a folder."""
    from tests.sd3 import make_sd3
    from tests.tiny import save_tiny

    from latentrt.export.export import export_checkpoint

    found = {}
    for family in FAMILIES:
        checkpoint, bundle = work / f"{family}-checkpoint", work / f"{family}-bundle"
        if not (checkpoint / "model_index.json").is_file():
            make_sd3(checkpoint) if family == "sd3" else save_tiny(checkpoint, family=family)
        if not bundle.exists():
            export_checkpoint(str(checkpoint), bundle, precision="fp32")
        found[family] = bundle
    return found


def alter(file: Path, way: str, chance: random.Random, others: list[Path]) -> None:
    """Change a file in one way."""
    data = bytearray(file.read_bytes())
    if way == "flip" and data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif way == "cut":
        del data[chance.randrange(len(data) + 1) :]
    elif way == "grow":
        data += chance.randbytes(chance.choice((1, 8, 5000)))
    elif way == "empty":
        data.clear()
    elif way == "zeros" and data:
        first = chance.randrange(len(data))
        last = min(len(data), first + chance.choice((1, 512, 4096)))
        data[first:last] = bytes(last - first)
    elif way == "another":
        data = bytearray(chance.choice(others).read_bytes())
    file.unlink()
    if way != "remove":
        file.write_bytes(data)


class Altered:
    """One family's bundle: what it draws, and what becomes of it when a file of it is altered."""

    def __init__(self, family: str, source: Path, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source, root)
        self.family, self.source, self.root = family, source, root
        self.files = sorted(path for path in root.rglob("*") if path.is_file())
        self.counts = dict.fromkeys(("tried", "refused", "harmless", "verify_refused"), 0)
        self.expected = self._draw()
        assert all(row.ok for row in verify(Bundle.open(root), backend="cpu"))

    def _draw(self) -> Any:
        with Pipeline.load(self.root, "cpu", threads=1) as pipe:
            return pipe(**ASKED).pixels

    def attack(self, number: int, seed: int) -> Iterator[Found]:
        """Alter one file, use the bundle, and put the file back. Yield what is wrong."""
        chance = random.Random(f"{seed} {self.family} {number}")
        file, way = self.files[number % len(self.files)], chance.choice(WAYS)
        name = file.relative_to(self.root).as_posix()
        alter(file, way, chance, self.files)
        self.counts["tried"] += 1
        try:
            for what in (*self._load_and_draw(), *self._verify()):
                yield Found(family=self.family, number=number, file=name, way=way, what=what)
        finally:
            shutil.copyfile(self.source / name, file)

    def _load_and_draw(self) -> Iterator[str]:
        try:
            same = np.array_equal(self._draw(), self.expected)
        except LatentrtError as error:
            self.counts["refused"] += 1
            if not str(error).isprintable():
                yield f"not one line: {error!r}"
        except BaseException as error:
            yield f"{type(error).__name__}: {error}"
        else:
            self.counts["harmless"] += same
            if not same:
                yield "a wrong picture"

    def _verify(self) -> Iterator[str]:
        """Check the bundle as `latentrt verify` does. Yield what is no refusal."""
        try:
            rows = verify(Bundle.open(self.root), backend="cpu")
            self.counts["verify_refused"] += not all(row.ok for row in rows)
        except LatentrtError:
            self.counts["verify_refused"] += 1
        except BaseException as error:
            yield f"verify: {type(error).__name__}: {error}"


def run(work: Path, *, seed: int, seconds: float, short: bool) -> Result:
    """Alter files of each family in turn, as far as the time goes. short: of the first family alone"""
    if short:
        from benchmarks.torture.sources import sources

        found_bundles = {"sd1": sources(work / "sources").bundle}
    else:
        found_bundles = bundles(work / "families")
    altered = [Altered(family, source, work / f"altered-{family}") for family, source in found_bundles.items()]
    end, found = time.monotonic() + seconds, list[Found]()
    for number in range(MOST // len(altered)):
        for one in altered:
            if time.monotonic() < end:
                found += one.attack(number, seed)
    families = {one.family: one.counts for one in altered}
    counts = {what: sum(one.counts[what] for one in altered) for what in altered[0].counts}
    return Result(counts=counts, families=families, found=found)
