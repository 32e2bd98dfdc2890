"""docs/roofline.md has the tables of benchmarks/results/roofline.json, and what it says of them is so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from roofline import DENOISERS, KINDS, PICTURES, with_tables  # noqa: E402

from latentrt.engines.graphs.roofline import CEILINGS  # noqa: E402


@pytest.fixture(scope="module")
def found() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "roofline.json").read_text())


def test_the_page_has_the_tables_of_its_result(found: Any) -> None:
    page = (ROOT / "docs" / "roofline.md").read_text()
    assert with_tables(page, found) == page


def test_what_the_page_says_of_the_denoisers_is_so(found: Any) -> None:
    assert set(found["models"]) == set(PICTURES)
    for networks in found["models"].values():
        (denoiser,) = (networks[name] for name in DENOISERS if name in networks)
        for gpu, ceilings in CEILINGS.items():
            half, small = (denoiser[gpu][kind] for kind in KINDS)
            assert small["fused_s"] < half["fused_s"] < half["seconds"]
            assert denoiser["text_seconds"][gpu] < 0.03 * half["fused_s"]
            work = sum(cost["operations"] for cost in half["costs"])
            assert work / ceilings.operations_per_s < half["fused_s"] < 1.5 * work / ceilings.operations_per_s
