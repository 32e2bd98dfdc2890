"""The page of a result: self-contained, light and dark, every measurement on it; and the scales behind its plots."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.machine import Conditions, describe_machine
from latentrt.runtime.bench.report.html import page, write_page
from latentrt.runtime.bench.report.plots import accuracy_curves, scaling, stage_bars, stage_lines, strips
from latentrt.runtime.bench.report.svg import linear, log_ticks, logarithmic, ticks
from latentrt.runtime.bench.result import (
    BundleFacts,
    ColdStart,
    ComponentError,
    Method,
    PromptScore,
    Report,
    Settings,
    Variant,
)
from latentrt.runtime.bench.rounds import Warmup
from latentrt.runtime.bench.samples import summarise

ROUNDS = 9


def variant(steps: int, sampler: str = "euler", *, outlier: float = 1.0) -> Variant:
    settings = Settings(
        backend="cpu", threads=2, width=64, height=64, batch=1, steps=steps, sampler=sampler, guidance=3.0
    )
    parts = {"tokenize": 1e-4, "encode": 2e-3, "denoise": 0.01 * steps, "decode": 0.02, "encode_image": 0.004}
    parts |= {"step": 0.01, "total": sum(parts.values()) - 0.004, "end_to_end": sum(parts.values())}
    shares = [1 + 0.01 * i for i in range(ROUNDS - 1)] + [outlier]
    return Variant(
        name=f"{sampler}, {steps} <steps> & more",
        settings=settings,
        backend="cpu",
        reason="as asked",
        engines="cpu-x",
        warmup=Warmup(steady=True, seconds=(0.1,)),
        seconds={name: measured([seconds * share for share in shares]) for name, seconds in parts.items()},
        denoise_stages=tuple(summarise([0.01 * share for share in shares]) for _ in range(steps)),
        steps_per_second=measured([100 / share for share in shares]),
        outside_engines=measured([0.01] * ROUNDS),
        energy_j=None,
        device_bytes=None,
        prompts=PromptScore(prompts=50, right=min(50, 5 * steps), share=min(1.0, steps / 10), low=0.1, high=1.0),
    )


def report(*variants: Variant) -> Report:
    start = ColdStart(
        name=variants[0].name,
        settings=variants[0].settings,
        seconds={part: measured([0.1] * 3) for part in ("interpreter", "import", "load", "first", "second", "total")},
        loaded_rss_bytes=measured([1e8] * 3),
        peak_rss_bytes=measured([2e8] * 3),
    )
    return Report(
        kind="latentrt bench",
        schema_version=1,
        created="2026-11-21T00:00:00Z",
        command="latentrt bench <shapes>",
        machine=describe_machine(),
        conditions=Conditions(load_before=0.1, others_share=0.0, stolen_share=0.0),
        bundle=BundleFacts(name="a & b", family="sd1", precision="fp32", checkpoint="demo", graphs="0" * 64, bytes=1),
        method=Method(
            rounds=ROUNDS, rounds_asked=ROUNDS, seconds_asked=1.0, seed=0, warmup_rule="rule", prompt="<a circle>"
        ),
        variants=variants,
        cold_starts=(start,),
        errors=(ComponentError(backend="cpu", component="unet", error=1e-6, limit=1e-3),),
    )


@pytest.fixture(scope="module")
def many() -> Report:
    return report(*(variant(steps, sampler) for sampler in ("euler", "ddim") for steps in (1, 4, 9)))


def drawings(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]


def coordinates(drawing: ElementTree.Element) -> Iterator[tuple[float, float]]:
    for mark in drawing.iter():
        for x, y in (("cx", "cy"), ("x", "y"), ("x1", "y1"), ("x2", "y2")):
            if x in mark.attrib:
                yield float(mark.attrib[x]), float(mark.attrib[y])


def test_the_page_fetches_nothing_and_runs_nothing(many: Report) -> None:
    text = page(many)
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:|src=|href=", text)


def test_the_page_has_colours_for_light_and_for_dark(many: Report) -> None:
    text = page(many)
    light, dark = re.findall(r"--k0: (#\w+)", text)
    assert light != dark
    assert "@media (prefers-color-scheme: dark)" in text
    assert 'name="viewport"' in text


def test_every_drawing_is_well_formed_labelled_and_stays_inside(many: Report) -> None:
    found = drawings(page(many))
    assert len(found) == 5
    for drawing in found:
        assert drawing.attrib["aria-label"]
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for x, y in coordinates(drawing):
            assert -0.01 <= x <= width + 0.01
            assert -0.01 <= y <= height + 0.01


def test_words_from_outside_cannot_become_markup(many: Report) -> None:
    text = page(many)
    assert "<steps>" not in text
    assert "<a circle>" not in text
    assert "&lt;a circle&gt;" in text


def test_every_measurement_is_a_dot_outliers_too() -> None:
    text = strips(report(variant(4, outlier=9.0), variant(5)))
    dots = [mark for mark in ElementTree.fromstring(text).iter() if mark.tag == "circle"]
    assert len(dots) == 2 * ROUNDS
    xs = sorted(float(dot.attrib["cx"]) for dot in dots)
    assert xs[-1] - xs[-2] > 300  # nothing was clipped to the rest


def test_bars_are_as_long_as_their_seconds() -> None:
    text = stage_bars(report(variant(4), variant(8)))
    assert text is not None
    bars = [mark for mark in ElementTree.fromstring(text).iter() if mark.tag == "rect" and mark.attrib["class"] == "c0"]
    short, long = (float(bar.attrib["width"]) for bar in bars[1:])  # the first is the legend's
    assert long / short == pytest.approx(2, rel=0.02)


def test_curves_need_scores_and_scaling_needs_one_number_that_grows() -> None:
    plain = msgspec.structs.replace(variant(4), prompts=None)
    assert accuracy_curves(report(plain)) is None
    assert accuracy_curves(report(variant(2), variant(4))) is not None
    assert scaling(report(variant(2), variant(4), variant(8))) is not None
    assert scaling(report(variant(2), variant(4, "ddim"), variant(8))) is None
    assert scaling(report(variant(2), variant(4))) is None
    assert stage_lines(report(variant(1))) is None


def test_the_page_is_written_in_one_step_with_its_folder(many: Report, tmp_path: Path) -> None:
    write_page(many, tmp_path / "new" / "page.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


ranges = st.tuples(st.floats(0, 1e6), st.floats(1e-6, 1e6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(ranges, st.integers(2, 12))
def test_ticks_are_round_few_evenly_spaced_and_inside(limits: tuple[float, float], most: int) -> None:
    low, high = limits
    found = ticks(low, high, most)
    assert len(found) <= most
    slack = 1e-6 * (high - low) + 1e-9
    assert all(low - slack <= tick <= high + slack for tick in found)
    gaps = {round(b - a, 9) for a, b in pairwise(found)}
    assert all(math.isclose(gap, max(gaps), rel_tol=1e-3, abs_tol=1e-8) for gap in gaps)


@given(st.floats(1e-3, 1e5), st.floats(1.5, 1e4))
def test_ticks_of_a_logarithmic_axis_are_inside_and_in_order(low: float, factor: float) -> None:
    found = log_ticks(low, factor * low)
    assert found == sorted(found)
    assert all(low <= tick <= factor * low for tick in found)
    assert 1 <= len(found) <= 9


@given(ranges.filter(lambda pair: pair[0] > 0), st.floats(0, 1))
def test_scales_keep_the_order_and_meet_their_ends(limits: tuple[float, float], part: float) -> None:
    low, high = limits
    for make in (linear, logarithmic):
        scale = make(low, high, 10.0, 110.0)
        assert scale(low) == pytest.approx(10.0)
        assert scale(high) == pytest.approx(110.0)
        assert 10.0 - 1e-6 <= scale(low + part * (high - low)) <= 110.0 + 1e-6
