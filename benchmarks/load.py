"""Measure and simulate what the demo gives under load, and write both tables of docs/figures.md.

python benchmarks/load.py mix demo/shapes      # 4, 20 and 50 steps: about a quarter of an hour on an idle machine
python benchmarks/load.py twenty demo/shapes   # 20 steps alone: the same
python benchmarks/load.py fleet                # many machines, simulated from benchmarks/results/fleet-times.json
python benchmarks/load.py page                 # writes the tables again from the results that there are
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from page_tables import place

from latentrt.engines.bundle.parsing import decode, parse
from latentrt.runtime.bench.load.result import read_report
from latentrt.runtime.bench.load.simulator.survey import Survey, survey_table
from latentrt.runtime.bench.load.text import markdown

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures.md"
MIX = "4:40,20:40,50:20"
DEMO = {"mix": ("load-demo", MIX), "twenty": ("load-demo-20", "20:1")}
MACHINES = "8,64,1000,10000"


def tables() -> dict[str, str]:
    """Return the tables of the page by the names of their places, of the results that there are."""
    files = [RESULTS / f"{name}.json" for name, _ in DEMO.values()]
    parts = [markdown(read_report(file)).splitlines() for file in files if file.is_file()]
    lines = [*parts[0][:2], *(row for part in parts for row in part[2:])] if parts else []
    fleet = RESULTS / "fleet.json"
    found = {"load": "\n".join(lines)} if lines else {}
    if fleet.is_file():
        found["fleet"] = survey_table(parse(Survey, decode(fleet.read_bytes(), strict=True))).rstrip()
    return found


def main() -> None:
    """Measure what is named, and write the page."""
    what, *bundle = sys.argv[1:]
    command = [sys.executable, "-m", "latentrt", "bench-serve"]
    if what in DEMO:
        name, mix = DEMO[what]
        options = [
            "--mix",
            mix,
            "--requests",
            "60",
            "--seconds",
            "1000",
            "--simulate",
            "--json",
            str(RESULTS / f"{name}.json"),
        ]
        subprocess.run([*command, *bundle, *options], check=True)
    elif what == "fleet":
        times = ["--times", str(RESULTS / "fleet-times.json"), "--mix", MIX, "--json", str(RESULTS / "fleet.json")]
        subprocess.run([*command, "--fleet", MACHINES, *times], check=True)
    page = PAGE.read_text()
    for name, table in tables().items():
        page = place(page, name, table)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
