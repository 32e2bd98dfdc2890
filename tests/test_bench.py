"""`latentrt bench`: real runs of tiny bundles, results that are what their schema says, comparisons that decide."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

from latentrt.engines.bundle.files import Bundle, record_file, write_manifest
from latentrt.engines.bundle.parsing import json_schema
from latentrt.engines.errors import RequestError
from latentrt.engines.open import open_engines
from latentrt.export.demo.scoring import held_out_prompts
from latentrt.runtime.bench.cold import measured
from latentrt.runtime.bench.compare import compare
from latentrt.runtime.bench.machine import describe_machine, differences
from latentrt.runtime.bench.measure import Asked, Candidate, names, run_bench
from latentrt.runtime.bench.meters import open_gpu_meter
from latentrt.runtime.bench.report.text import markdown, report_text
from latentrt.runtime.bench.result import Report, read_report, to_json, write_report
from latentrt.runtime.bench.timing import TimedPipeline
from latentrt.runtime.pipeline import Pipeline
from tests.refused import about

ROOT = Path(__file__).parent.parent
QUICK = Asked(
    steps=(1, 3), samplers=("euler",), threads=(1,), guidances=(3.0,), rounds=8, seconds=20.0, cold=1, prompt="a circle"
)


@pytest.fixture(scope="module")
def report(sd1_bundle: Path) -> Report:
    return run_bench(str(sd1_bundle), QUICK, command="latentrt bench sd1")


@pytest.fixture
def saved(report: Report, tmp_path: Path) -> Path:
    write_report(report, tmp_path / "a.json")
    return tmp_path / "a.json"


def latentrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "latentrt", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    return result


def altered(report: Report, change: Callable[[float], float], stage: str = "denoise") -> Report:
    """Return the report with other samples of one stage in every variant."""

    def alter(variant: object) -> object:
        seconds = dict(variant.seconds)  # type: ignore[attr-defined]
        seconds[stage] = measured([change(sample) for sample in seconds[stage].samples])
        return msgspec.structs.replace(variant, seconds=seconds)  # type: ignore[type-var]

    return msgspec.structs.replace(report, variants=tuple(alter(variant) for variant in report.variants))  # type: ignore[arg-type]


def even(report: Report) -> Report:
    """Return the report with a quiet machine's denoise samples: within one part in a thousand, and no drift."""
    samples = iter(range(10**6))
    return altered(report, lambda _: 0.1 * (1 + 1e-3 * (next(samples) % 2)))


def test_a_result_is_what_its_schema_says(report: Report) -> None:
    schema = json_schema(Report)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(to_json(report)), schema)


def test_the_schema_refuses_what_is_missing_or_unknown(report: Report) -> None:
    schema = json_schema(Report)
    for change in ({"machine": None}, {"more": 1}, {"variants": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(to_json(report)) | change, schema)


def test_the_written_schema_is_current() -> None:
    assert json.loads((ROOT / "docs" / "bench.schema.json").read_text()) == json.loads(json.dumps(json_schema(Report)))


def test_every_part_of_the_schema_is_described() -> None:
    undescribed = [name for name, part in json_schema(Report)["$defs"].items() if not part["description"]]
    assert undescribed == []


def test_a_result_is_read_back_as_it_was_written(report: Report, saved: Path) -> None:
    assert read_report(saved) == report


def test_every_stage_is_measured_in_every_round(report: Report) -> None:
    for variant in report.variants:
        assert {"tokenize", "encode", "denoise", "step", "decode", "encode_image", "total", "end_to_end"} <= set(
            variant.seconds
        )
        assert {len(m.samples) for m in variant.seconds.values()} == {report.method.rounds} == {8}
        assert len(variant.denoise_stages) == variant.settings.steps
        assert 0 <= variant.outside_engines.summary.lowest <= variant.outside_engines.summary.highest <= 1
        assert variant.warmup.seconds


def test_the_parts_of_a_picture_add_up_to_the_whole(report: Report) -> None:
    for variant in report.variants:
        rows = zip(
            *(variant.seconds[name].samples for name in ("tokenize", "encode", "denoise", "decode")), strict=True
        )
        for parts, total, whole, png in zip(
            rows,
            variant.seconds["total"].samples,
            variant.seconds["end_to_end"].samples,
            variant.seconds["encode_image"].samples,
            strict=True,
        ):
            assert sum(parts) <= total
            assert total + png == pytest.approx(whole)


def test_a_cold_start_is_a_fresh_process_in_all_its_parts(report: Report) -> None:
    (start,) = report.cold_starts
    parts = ("interpreter", "import", "load", "first")
    assert sum(start.seconds[part].summary.p50 for part in parts) == pytest.approx(start.seconds["total"].summary.p50)
    assert 0 < start.loaded_rss_bytes.summary.p50 <= start.peak_rss_bytes.summary.p50


def test_the_result_names_the_machine_and_the_errors_against_fp32(report: Report) -> None:
    assert report.machine == describe_machine()
    assert "onnxruntime" in report.machine.versions
    assert {error.component for error in report.errors} == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert all(error.error <= error.limit for error in report.errors)


def test_energy_is_null_where_no_gpu_counts_it(report: Report) -> None:
    if open_gpu_meter() is None:
        assert all(variant.energy_j is None and variant.device_bytes is None for variant in report.variants)
    else:
        assert all(variant.energy_j is not None for variant in report.variants)


def test_variants_are_named_by_what_differs(report: Report) -> None:
    assert [variant.name for variant in report.variants] == ["1 step", "3 steps"]
    assert names([report.variants[0].settings]) == ["32x32, batch 1, 1 step, euler, guidance 3"]


def test_the_same_settings_twice_are_measured_once(sd1_bundle: Path) -> None:
    assert len(Asked(steps=(4, 4), backends=("cpu", "auto")).variants(Bundle.open(sd1_bundle))) == 1


def test_timed_engines_give_the_same_picture_and_count_their_seconds(sd1_bundle: Path) -> None:
    with Pipeline.load(sd1_bundle, "cpu") as pipe:
        plain = pipe("a circle", steps=2, seed=1).pixels
    with TimedPipeline.load(sd1_bundle, "cpu") as pipe:
        result = pipe("a circle", steps=2, seed=1)
    assert np.array_equal(result.pixels, plain)
    assert set(pipe.stopwatch.seconds) == {"text_encoder", "unet", "vae_decoder"}
    assert 0 < pipe.stopwatch.total < result.seconds["total"]


def test_every_draw_encodes_its_text_again(sd1_bundle: Path) -> None:
    with TimedPipeline.load(sd1_bundle, "cpu") as pipe:
        (settings,) = Asked(steps=(1,)).variants(pipe.bundle)
        candidate = Candidate("one", settings, pipe, None, Asked(), itertools.count())
        for _ in range(3):
            drawn = candidate.draw(0)
            assert pipe.stopwatch.seconds["text_encoder"] > 0
            assert drawn.seconds["end_to_end"] > drawn.seconds["total"] > pipe.stopwatch.total


def test_peak_memory_is_of_this_program_and_does_not_shrink() -> None:
    child = """
from latentrt.runtime.bench.meters import peak_rss
import numpy as np
before = peak_rss()
held = np.ones(1 << 25)
after = peak_rss()
del held
print(before, after, peak_rss())
"""
    parent = f"""
import numpy as np, subprocess, sys
held = np.ones(1 << 26)
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    before, after, later = (int(number) >> 20 for number in told.split())
    assert before < 200  # MiB; the parent, which holds 512, is not counted
    assert 250 < after - before < 265
    assert abs(later - after) < 4


def test_prompt_accuracy_lies_beside_the_speed(demo_bundle: Path) -> None:
    asked = Asked(
        steps=(2, 12), samplers=("dpmpp_2m_karras",), guidances=(3.0,), rounds=1, cold=0, seconds=1, accuracy=6,
        golden=False,
    )  # fmt: skip
    result = run_bench(str(demo_bundle), asked, prompt_sets={"demo": held_out_prompts})
    few, many = (variant.prompts for variant in result.variants)
    assert few is not None and many is not None
    assert few.right < many.right >= 5  # two steps are noise, twelve are pictures
    assert many.low <= many.share <= many.high


def test_accuracy_is_refused_where_nobody_knows_the_answers(sd1_bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"^--accuracy: .*'demo'"):
        run_bench(str(sd1_bundle), Asked(accuracy=5), prompt_sets={"demo": held_out_prompts})


def test_a_judge_knows_right_from_wrong() -> None:
    prompts, judge = held_out_prompts(3)
    assert len(prompts) == 3
    assert not judge(0, np.zeros((128, 128, 3), dtype=np.uint8))


def test_the_same_result_has_not_regressed(report: Report) -> None:
    quiet = msgspec.structs.replace(report.conditions, others_share=0.01, stolen_share=0.0)
    report = msgspec.structs.replace(report, conditions=quiet)
    found = compare(report, report)
    assert found.regressed == ()
    assert found.differences == ()
    busy = msgspec.structs.replace(report, conditions=msgspec.structs.replace(quiet, others_share=0.4))
    assert compare(report, busy).differences == ("cores' time used by others: 1%, 40%",)
    assert {change.variant for change in found.changes} >= {"1 step", "3 steps"}


def test_a_stage_that_got_slower_past_the_noise_is_found_and_nothing_else(report: Report) -> None:
    calm = even(report)
    slower = altered(calm, lambda seconds: 1.2 * seconds)
    assert {change.figure for change in compare(calm, slower).regressed} == {"denoise"}
    assert {c.verdict for c in compare(slower, calm).changes if c.figure == "denoise"} == {"faster"}


def test_a_stage_within_the_tolerance_is_the_same(report: Report) -> None:
    calm = even(report)
    slower = altered(calm, lambda seconds: 1.2 * seconds)
    assert compare(calm, slower, tolerance=0.3).regressed == ()


def test_a_run_that_drifted_more_than_it_lost_proves_nothing(report: Report) -> None:
    calm, samples = even(report), iter(range(10**6))
    wandering = altered(calm, lambda seconds: seconds * (1.0 if next(samples) % 8 < 4 else 1.5))
    assert compare(wandering, altered(wandering, lambda seconds: 1.2 * seconds)).regressed == ()


def test_an_error_that_grew_and_accuracy_that_fell_are_regressions(report: Report) -> None:
    worse = msgspec.structs.replace(
        report, errors=tuple(msgspec.structs.replace(error, error=0.5 * error.limit) for error in report.errors)
    )
    found = {change.figure for change in compare(report, worse).regressed}
    # Pixels differ by one level or by none: whether half the limit is growth depends on the machine's rounding.
    assert found - {"vae_decoder"} == {"text_encoder", "unet", "vae_encoder"}


def test_a_comparison_names_what_differs_of_the_machine(report: Report) -> None:
    versions = {**report.machine.versions, "onnxruntime": "1.0"}
    other = msgspec.structs.replace(report.machine, cores=64, versions=versions)
    named = differences(report.machine, other)
    assert f"cores: {report.machine.cores}, 64" in named
    assert any(line.startswith("onnxruntime: ") and line.endswith(", 1.0") for line in named)
    assert len(named) == 2
    found = compare(report, msgspec.structs.replace(report, machine=other))
    assert set(named) <= set(found.differences)


def test_the_text_holds_every_variant_and_the_machine(report: Report) -> None:
    text = report_text(report)
    assert all(word in text for word in ("1 step", "3 steps", "decode to pixels", "cold start", "unet", "outside"))
    assert report.machine.processor in text
    table = markdown(report).split("\n\n")[0].splitlines()
    assert [line.count("|") for line in table] == [table[0].count("|")] * 4


def test_the_command_measures_writes_and_shows(sd1_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    options = ("--steps", "1", "--rounds", 3, "--seconds", 0.1, "--cold", 0, "--no-golden", "--json")
    result = latentrt("bench", sd1_bundle, *options, file)
    assert result.returncode == 0, result.stderr
    saved = read_report(file)
    assert saved.machine.processor in result.stdout
    assert saved.command.startswith("latentrt bench ")
    assert latentrt("bench", "--show", file).stdout == result.stdout
    assert latentrt("bench", "--show", file, "--markdown").stdout.startswith("| drawn |")
    printed = latentrt("bench", sd1_bundle, *options, "-")
    assert json.loads(printed.stdout)["kind"] == "latentrt bench"
    assert printed.stderr == ""


def test_compare_exits_with_1_for_a_regression_and_0_without(report: Report, tmp_path: Path) -> None:
    calm = even(report)
    write_report(calm, tmp_path / "a.json")
    write_report(altered(calm, lambda seconds: 1.2 * seconds), tmp_path / "b.json")
    regressed = latentrt("bench", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert regressed.returncode == 1
    assert "1 step: denoise; 3 steps: denoise" in regressed.stdout
    better = latentrt("bench", "--compare", tmp_path / "b.json", tmp_path / "a.json")
    assert better.returncode == 0 and "1 step: denoise" not in better.stdout


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (None, os.strerror(errno.ENOENT)),
        ("{", "JSON"),
        ("{}", "`latentrt bench`"),
        ('{"kind": "latentrt bench", "schema_version": 9}', " 9, "),
        ('{"kind": "latentrt bench", "schema_version": 1}', "created"),
    ],
)
def test_compare_refuses_what_is_no_result_with_exit_code_2(
    saved: Path, tmp_path: Path, document: str | None, told: str
) -> None:
    other = tmp_path / "b.json"
    if document is not None:
        other.write_text(document)
    result = latentrt("bench", "--compare", saved, other)
    assert (result.returncode, result.stdout) == (2, "")
    _, name, rest = result.stderr.splitlines()[-1].partition(str(other))
    assert name and told in rest


def test_results_with_nothing_in_common_are_not_compared(report: Report) -> None:
    one, other = (msgspec.structs.replace(report, variants=(variant,)) for variant in report.variants)
    with pytest.raises(RequestError):
        compare(one, other)


def test_too_few_rounds_are_refused_not_passed(report: Report, tmp_path: Path) -> None:
    few = msgspec.structs.replace(
        report,
        variants=tuple(
            msgspec.structs.replace(v, seconds={name: measured(m.samples[:3]) for name, m in v.seconds.items()})
            for v in report.variants
        ),
    )
    for name in ("a.json", "b.json"):
        write_report(few, tmp_path / name)
    result = latentrt("bench", "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert "--rounds 10" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--show FILE, --compare A B, --schema"),
        (("x", "--schema"), "--show FILE, --compare A B, --schema"),
        (("x", "--steps", "a"), "4,20"),
        (("x", "--steps", "0"), "4,20"),
        (("x", "--size", "big"), "256x256,512x512"),
        (("nowhere",), "'nowhere'"),
    ],
)
def test_bench_refuses_in_one_sentence(arguments: tuple[str, ...], told: str) -> None:
    result = latentrt("bench", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert told in result.stderr.splitlines()[-1]


def test_an_unknown_sampler_is_refused_before_anything_is_loaded(sd1_bundle: Path) -> None:
    with pytest.raises(RequestError, check=about("sampler")):
        run_bench(str(sd1_bundle), Asked(samplers=("eulr",)))


def test_engines_that_drift_are_not_measured(sd1_bundle: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    bundle = tmp_path / "bundle"
    shutil.copytree(sd1_bundle, bundle)
    golden = bundle / "golden" / "unet.safetensors"
    arrays = load_file(golden)
    save_file({name: a + (1 if name.startswith("output") else 0) for name, a in arrays.items()}, golden)
    manifest, name = Bundle.open(bundle).manifest, "golden/unet.safetensors"
    files = {**manifest.files, name: record_file(bundle, name)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    result = latentrt("bench", bundle, "--rounds", 1)
    assert result.returncode == 2
    assert "unet (cpu)" in result.stderr.splitlines()[-1]
    open_engines(Bundle.open(bundle), "cpu", components=("unet",)).close()
