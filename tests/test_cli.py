"""The command line: what it writes, what it prints, and one sentence with exit code 2 for what a user can mend."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from PIL import Image

from latentrt.__main__ import COMMANDS
from latentrt.engines.bundle.manifest import MANIFEST
from latentrt.runtime import cli_options
from latentrt.runtime.cli import generate
from latentrt.runtime.cli_options import Interval
from latentrt.runtime.request import DECODERS, NOISES
from latentrt.runtime.sampling.guidance import ALWAYS
from latentrt.runtime.sampling.make import TIMESTEP_SPACINGS
from latentrt.runtime.sampling.spacings import SPACINGS


def latentrt(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "latentrt", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def refusal(*arguments: object) -> str:
    """Run what must be refused: exit code 2 and a last line that is one sentence."""
    result = latentrt(*arguments, code=2)
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def test_help_names_every_command() -> None:
    text = latentrt("--help").stdout
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str) -> None:
    assert "--json" in latentrt(command, "--help").stdout


@pytest.mark.parametrize("command", ["generate", "animate", "samplers"])
def test_the_help_of_a_command_that_draws_loads_nothing_that_draws(command: str) -> None:
    code = f"import sys, latentrt.__main__ as front; front.find_command({command!r}); print('numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_what_may_be_chosen_by_name_is_said_on_the_command_line_as_it_is() -> None:
    assert cli_options.SPACINGS.split(", ") == [*TIMESTEP_SPACINGS, *SPACINGS]
    assert (set(cli_options.NOISES), set(cli_options.DECODERS)) == (set(NOISES), set(DECODERS))
    defaults = {option.name: option.get_default(click.Context(generate)) for option in generate.params}
    assert Interval().convert(defaults["guidance_interval"], None, None) == ALWAYS


def test_generate_writes_pictures_with_their_settings(sd1_bundle: Path, tmp_path: Path) -> None:
    asked = (
        "--steps",
        2,
        "--seed",
        5,
        "-n",
        2,
        "--negative",
        "blue",
        "--size",
        "40x32",
        "--sampler",
        "dpmpp_2m_karras",
    )
    summary = json.loads(latentrt("generate", sd1_bundle, "a red circle", *asked, "-o", tmp_path, "--json").stdout)
    assert summary["seeds"] == [5, 6]
    assert len(summary["step_seconds"]) == 2
    for file, seed in zip(summary["files"], summary["seeds"], strict=True):
        with Image.open(file) as image:
            assert image.size == (40, 32)
            lines = image.info["parameters"].splitlines()
        assert lines[:2] == ["a red circle", "Negative prompt: blue"]
        assert f"Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: {seed}, Size: 40x32, Model: sd1" in lines[2]


@pytest.mark.parametrize(("asked", "line"), [((), []), (("--negative", ""), ["Negative prompt: "])])
def test_a_picture_tells_an_empty_negative_prompt_from_none(
    sd1_bundle: Path, tmp_path: Path, asked: tuple[str, ...], line: list[str]
) -> None:
    """To SDXL they are not the same."""
    file = tmp_path / "one.png"
    command = ("generate", sd1_bundle, "a circle", "--steps", 1, *asked, "-o", file, "--json")
    assert json.loads(latentrt(*command).stdout)["negative_prompt"] == ("" if asked else None)
    with Image.open(file) as image:
        assert image.info["parameters"].splitlines()[1:-1] == line


def test_a_weighted_prompt_that_names_a_lora_is_refused(sd1_bundle: Path, tmp_path: Path) -> None:
    sentence = refusal("generate", sd1_bundle, "a <lora:x:0.8>", "--weighted", "-o", tmp_path / "pictures")
    assert "--lora FILE:SCALE" in sentence and not (tmp_path / "pictures").exists()


def test_generate_never_overwrites_another_picture(sd1_bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", sd1_bundle, "a circle", "--seed", 1, "-o", tmp_path)
    latentrt(*arguments, "--steps", 1)
    latentrt(*arguments, "--steps", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-circle-1-2.png", "a-circle-1.png"]


def test_generate_prints_the_seconds_of_each_stage(sd1_bundle: Path, tmp_path: Path) -> None:
    text = latentrt("generate", sd1_bundle, "a circle", "--steps", 1, "-o", tmp_path / "one.png").stdout
    assert str(tmp_path / "one.png") in text
    assert all(word in text for word in ("backend cpu", "load", "encode", "denoise", "decode", "ms a step"))


def test_generate_notes_every_option_that_shaped_the_picture(sd1_bundle: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    latentrt("generate", sd1_bundle, "a circle", "--steps", 1, "-o", first)
    asked = ("--image", first, "--strength", 0.5, "--guidance-interval", "0.25-1", "--sigmas", "9,3,1,0.5,0")
    latentrt("generate", sd1_bundle, "a circle", *asked, "--sampler", "euler", "-o", second)
    with Image.open(second) as image:
        text = image.info["parameters"]
    assert "Sigmas: 9 3 1 0.5 0, Guidance interval: 0.25 1, Denoising strength: 0.5" in text


def test_inspect_shows_components_and_engines(sd1_bundle: Path) -> None:
    text = latentrt("inspect", sd1_bundle).stdout
    assert all(word in text for word in ("sd1", "epsilon", "unet", "vae_decoder", "x86_64"))
    document = json.loads(latentrt("inspect", sd1_bundle, "--json").stdout)
    assert set(document["manifest"]["components"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert len(document["engines"]) == 1


@pytest.mark.parametrize("columns", [None, 60])
def test_a_table_cuts_no_name(columns: int | None, sd1_bundle: Path) -> None:
    # Given whole: readline, which pytest imports, sets COLUMNS where os.environ does not see it.
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {} if columns is None else {"COLUMNS": str(columns)}
    command = [sys.executable, "-m", "latentrt", "inspect", str(sd1_bundle)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("│")]
    (engines,) = (path.name for path in (sd1_bundle / "engines").iterdir() if path.is_dir())
    assert engines in "".join(line.split("│")[1].strip() for line in lines)
    assert any(engines in line for line in lines) == (columns is None)
    assert all(len(line) <= (columns or 200) for line in lines)


def test_verify_proves_a_bundle_and_finds_an_altered_file(sd1_bundle: Path, tmp_path: Path) -> None:
    assert all(row["ok"] for row in json.loads(latentrt("verify", sd1_bundle, "--json").stdout))
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    file = tmp_path / "bundle" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("circle", "cIrcle"))
    told = r"tokenizer\.json.*SHA-256"
    assert re.search(told, latentrt("verify", tmp_path / "bundle", code=2).stderr)
    assert re.search(told, refusal("generate", tmp_path / "bundle", "a circle", "-o", tmp_path))


def test_build_says_what_it_built(sd1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "engines")
    assert "engines/cpu-" in latentrt("build", tmp_path / "bundle").stdout
    latentrt("verify", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "33x32"), "--size: .*33x32.* 4 .*32x32"),
        (("--size", "0x32"), "--size: .*0x32.* 4 "),
        (("--size", "big"), "'--size': .*'big'.*512x768"),
        (("--steps", 0), "--steps: .* 0, .* 1 .* 1000"),
        (("--sampler", "dpmpp_2mm"), "--sampler: .*'dpmpp_2mm'.*'dpmpp_2m'"),
        (("--guidance", -1), "--guidance: .* -1.0, .* 0 "),
        (("--guidance-interval", "0.5"), "'--guidance-interval': .*'0.5'.* 0.2-0.8"),
        (("--guidance-interval", "0.5-0.2"), "--guidance-interval: .* 0.5 .* 0.2, "),
        (("--timesteps", "9,x"), "'--timesteps': .*'9,x'"),
        (("--strength", 0.5), "--strength: .*--image"),
        (("--image", "nowhere.png"), "--image: .*'nowhere.png'"),
        (("-n", 0), "-n: .* 0, .* 1 "),
        (("--backend", "gpu"), "'gpu'.* auto, cpu"),
        (("-o", "one.jpg"), "--output: .*'one.jpg'.*.png"),
        (("-o", __file__), "--output: .*'.*test_cli.py'"),
        (("-o", f"{__file__}/one.png"), "test_cli.py/one.png .*'.*test_cli.py'"),
        (("-n", 2, "-o", "one.png"), "--output: .*'one.png'.* 2 "),
    ],
)
def test_generate_refuses_in_one_sentence(
    sd1_bundle: Path, tmp_path: Path, arguments: tuple[object, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(told, refusal("generate", sd1_bundle, "a circle", *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "verify", "build"])
def test_no_bundle_is_one_sentence_for_every_command(command: str, tmp_path: Path) -> None:
    assert f"'{tmp_path / 'x'}'" in refusal(command, tmp_path / "x")


def test_a_manifest_from_the_future_is_one_sentence(sd1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 7}))
    assert re.search(rf"{MANIFEST}\D+7\D", refusal("generate", tmp_path / "bundle", "a circle"))


def test_a_path_that_leaves_the_bundle_is_one_sentence(sd1_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1_bundle, tmp_path / "bundle")
    manifest = tmp_path / "bundle" / MANIFEST
    manifest.write_text(manifest.read_text().replace("tokenizer/tokenizer.json", "../../tokenizer.json"))
    assert "'../../tokenizer.json'" in refusal("generate", tmp_path / "bundle", "a circle")


def test_samplers_lists_every_name_and_prints_a_plan() -> None:
    assert "dpmpp_2m" in latentrt("samplers").stdout
    table = json.loads(latentrt("samplers", "--plan", "DPM++ 2M Karras", "--steps", 6, "--json").stdout)
    assert len(table["timesteps"]) == len(table["transitions"]) == 6
    assert "'dpmpp_2m'" in refusal("samplers", "--plan", "dpmpp_2mm")
