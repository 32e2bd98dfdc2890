"""What travels to a GPU machine arrives whole, or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_pieces import SETS, cut, join, make  # noqa: E402
from one_architecture import ENTRY, HEADER, keep_architecture  # noqa: E402


@pytest.fixture
def pieces(tmp_path: Path) -> list[Path]:
    tree = tmp_path / "tree"
    (tree / "package").mkdir(parents=True)
    (tree / "package" / "library.so").write_bytes(np.random.default_rng(0).bytes(30_000))
    (tree / "package" / "__init__.py").write_text("here = 1\n")
    return cut(tree, "few", tmp_path / "kept", piece_bytes=12_000)


def test_a_set_is_cut_into_pieces_and_joined_to_the_byte(pieces: list[Path], tmp_path: Path) -> None:
    assert [piece.name for piece in pieces] == ["few.00", "few.01", "few.02"]
    assert max(piece.stat().st_size for piece in pieces) == 12_000
    joined = join(tmp_path / "kept", "few", tmp_path / "joined")
    files = {path.relative_to(joined).as_posix() for path in joined.rglob("*") if path.is_file()}
    assert files == {"package/library.so", "package/__init__.py"}
    assert all((joined / file).read_bytes() == (tmp_path / "tree" / file).read_bytes() for file in files)


def test_the_same_set_gives_the_same_pieces(pieces: list[Path], tmp_path: Path) -> None:
    again = cut(tmp_path / "tree", "few", tmp_path / "again", piece_bytes=12_000)
    assert [piece.read_bytes() for piece in again] == [piece.read_bytes() for piece in pieces]


def fat_binary(codes: dict[int, bytes]) -> bytes:
    """Return machine code for several architectures, packed as CUDA's compiler does it."""
    entries = b"".join(
        ENTRY.pack(2, 0, 64, len(code), 0, 0, 0, 0, sm).ljust(64, b"h") + code for sm, code in codes.items()
    )
    return HEADER.pack(0xBA55ED50, 1, HEADER.size, len(entries)) + entries


def test_only_the_code_of_other_architectures_becomes_zeros(tmp_path: Path) -> None:
    fakes = [b"\x50\xed\x55\xba", HEADER.pack(0xBA55ED50, 1, 16, 1 << 40), b"\x50\xed\x55\xba at the end"]
    parts = [
        b"ELF",
        fat_binary({80: b"a" * 96, 90: b"b" * 32}),
        fakes[0],
        fakes[1],
        fat_binary({90: b"c" * 40}),
        fakes[2],
    ]
    library = tmp_path / "library.so"
    library.write_bytes(b"".join(parts))
    assert keep_architecture(library, 90) == (72, 96)
    assert library.read_bytes() == b"".join(parts).replace(b"a" * 96, bytes(96))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?")])
def test_a_missing_or_altered_piece_is_named_and_nothing_is_unpacked(
    pieces: list[Path], tmp_path: Path, spoil: object
) -> None:
    spoil(pieces[1])  # type: ignore[operator]
    with pytest.raises(SystemExit, match=r"few\.01"):
        join(tmp_path / "kept", "few", tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_smaller_set_leaves_no_piece_of_the_larger_one(pieces: list[Path], tmp_path: Path) -> None:
    cut(tmp_path / "tree", "few", tmp_path / "kept", piece_bytes=40_000)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["few.00", "few.json"]
    assert list(json.loads((tmp_path / "kept" / "few.json").read_text())) == ["few.00"]


def test_the_bundles_that_were_packed_are_a_set(tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "demo.tar.gz").write_bytes(b"packed")
    assert "bundles" in SETS and len(make("bundles", tmp_path)) == 1
    assert (join(tmp_path, "bundles", tmp_path / "there") / "demo.tar.gz").read_bytes() == b"packed"
