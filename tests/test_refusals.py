"""What the command line refuses: exit code 2, no traceback, in its own words, and as JSON where that is asked for.

In one process: click's runner calls the commands as the shell does.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from latentrt.__main__ import COMMANDS, Refusal, cli, find_command, in_options, refused
from latentrt.engines.errors import BundleError, CheckpointError, LatentrtError, RequestError
from latentrt.runtime.batching.batcher import BatcherOptions
from latentrt.runtime.bench.load.arrivals import Item
from latentrt.runtime.ray_app import Args
from latentrt.runtime.request import Request
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.triton.tensors import INPUTS

ROOT = Path(__file__).parent.parent
# What a call may give and the command line has no option for.
API_ONLY = {"latents", "original_size", "target_size", "crop"}
# What else sentences of RequestError begin with: not of a request.
NO_FIELDS = {"shift"}  # of a plan
BUNDLE, NOTHING = "BUNDLE", "NOTHING"
DRAW = ("generate", BUNDLE, "a circle")
MOVE = ("animate", BUNDLE, "a@1", "b@2", "-o", "movie.webp")

REFUSALS: tuple[tuple[tuple[str, ...], str | None], ...] = (  # arguments, and the field that JSON names
    ((*DRAW, "--size", "33x32"), "size"),
    ((*DRAW, "--size", "big"), "size"),
    ((*DRAW, "--steps", "0"), "steps"),
    ((*DRAW, "--steps", "many"), "steps"),
    ((*DRAW, "--steps"), None),
    ((*DRAW, "--sampler", "dpmpp_2mm"), "sampler"),
    ((*DRAW, "--spacing", "odd"), "spacing"),
    ((*DRAW, "--eta", "-1"), "eta"),
    ((*DRAW, "--stop", "-0.5"), "stop"),
    ((*DRAW, "--timesteps", "-1,-5"), "timesteps"),
    ((*DRAW, "--sigmas", "1,2"), "sigmas"),
    ((*DRAW, "--forecast", "3"), "forecast"),
    ((*DRAW, "--guidance", "-1"), "guidance"),
    ((*DRAW, "--guidance", "nan"), "guidance"),
    ((*DRAW, "--guidance-interval", "0.5-0.2"), "guidance_interval"),
    ((*DRAW, "--guidance-rescale", "-2"), "guidance_rescale"),
    ((*DRAW, "--refine-from", "0.8"), "refine_from"),
    ((*DRAW, "--aesthetic-score", "-3"), "aesthetic_score"),
    ((*DRAW, "--negative-aesthetic-score", "-3"), "negative_aesthetic_score"),
    ((*DRAW, "--clip-skip", "-1"), "clip_skip"),
    ((*DRAW, "--lora", "nowhere.safetensors:-0.5"), "loras"),
    ((*DRAW, "--weighted", "--negative", "(a"), "prompt"),
    ((*DRAW, "--image", "nowhere.png"), "image"),
    ((*DRAW, "--mask", "nowhere.png"), "mask"),
    ((*DRAW, "--control", "edges=picture.png:-0.5"), "controls"),
    ((*DRAW, "--control", "edges"), "controls"),
    ((*DRAW, "--strength", "0.5"), "strength"),
    ((*DRAW, "--image", "picture.png", "--strength", "-1"), "strength"),
    ((*DRAW, "--variation-seed", "-7"), "variation_seed"),
    ((*DRAW, "--variation-seed", "1", "--variation-strength", "-1"), "variation_strength"),
    ((*DRAW, "--noise", "gpu"), "noise"),
    ((*DRAW, "--decoder", "tiny"), "decoder"),
    ((*DRAW, "--tile", "-4"), "tile"),
    ((*DRAW, "--deadline", "-1"), "deadline"),
    ((*DRAW, "-n", "0"), "n"),
    ((*DRAW, "-n", "2", "-o", "one.png"), "output"),
    ((*DRAW, "-o", "picture.png/below", "--seed", "1", "--steps", "1"), None),
    ((*DRAW, "-o", "a" * 300, "--seed", "1", "--steps", "1"), None),
    ((*DRAW, "--embedding", "nowhere.safetensors"), None),
    ((*DRAW, "--backend", "gpu"), None),
    ((*DRAW, "--threads", "0"), "threads"),
    ((*DRAW, "--guidance", "1e30", "--steps", "1"), None),
    ((*DRAW, "--guidence", "3"), None),
    (("generate", BUNDLE), "prompt"),
    (("generate", BUNDLE, "-cat"), None),
    (("generate", NOTHING, "a circle"), None),
    ((*MOVE, "--frames", "1"), "frames"),
    ((*MOVE, "--fps", "-1"), "fps"),
    ((*MOVE, "--batch", "0"), "batch"),
    ((*MOVE, "--guidance-interval", "0.9-0.1"), "guidance_interval"),
    (("animate", BUNDLE, "a@1", "b@2", "-o", "movie.avi"), "output"),
    (("animate", BUNDLE, "no seed", "-o", "movie.webp"), "keys"),
    (("animate", BUNDLE, "a@1", "b@2", "--frames", "2", "--steps", "1", "-o", "picture.png/movie.webp"), None),
    (("animate", NOTHING, "a@1", "b@2", "-o", "movie.webp"), None),
    (("samplers", "--plan", "dpmpp_2mm"), "sampler"),
    (("samplers", "--plan", "euler", "--steps", "-4"), "steps"),
    (("samplers", "--plan", "heun", "--forecast", "8"), "forecast"),
    (("samplers", "--plan", "euler", "--bundle", NOTHING), None),
    (("inspect", NOTHING), None),
    (("verify", NOTHING), None),
    (("verify", BUNDLE, "--backend", "gpu"), None),
    (("build", NOTHING), None),
    (("build", BUNDLE, "--backend", "gpu"), None),
    (("build", BUNDLE, "--fetch-only"), None),
    (("build", BUNDLE, "--batch", "-1"), None),
    (("build", BUNDLE, "--size", "wide"), "sizes"),
    (("export", NOTHING, "out"), None),
    (("export", "demo", "out", "--no-build", "--backend", "cpu"), None),
    (("export", "demo", "out", "--precision", "fp4"), "precision"),
    (("export", "demo", "picture.png", "--no-build"), None),
    (("export", "demo", "picture.png/below", "--no-build"), None),
    (("inspect", "picture.png"), None),
    (("verify", "picture.png"), None),
    (("build", "picture.png"), None),
    (("bench", NOTHING), None),
    (("bench", "picture.png"), None),
    (("bench",), None),
    (("bench", BUNDLE, "--sampler", "dpmpp_2mm"), "sampler"),
    (("bench", BUNDLE, "--steps", "0"), "steps"),
    (("bench", "--show", "picture.png"), None),
    (("bench", "--compare", "picture.png", "picture.png"), None),
    (("nothing",), None),
    ((), None),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one picture in it, to work in."""
    Image.new("RGB", (32, 32)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(bundle: Path, here: Path, *arguments: str) -> Result:
    places = {BUNDLE: str(bundle), NOTHING: str(here / "nothing")}
    return CliRunner().invoke(cli, [places.get(argument, argument) for argument in arguments], prog_name="latentrt")


def json_flag(command: str) -> tuple[str, ...]:
    return ("--json", "-") if command in ("bench", "bench-serve") else ("--json",)


@pytest.mark.parametrize(("arguments", "field"), REFUSALS, ids=lambda value: " ".join(value) if value else None)
def test_what_is_refused_is_a_sentence_or_an_object(
    sd1_bundle: Path, here: Path, arguments: tuple[str, ...], field: str | None
) -> None:
    text = call(sd1_bundle, here, *arguments)
    assert text.exit_code == 2 and isinstance(text.exception, SystemExit), text.exception
    assert text.stdout == "" and "Traceback" not in text.stderr
    if not arguments:  # the help, on stderr
        return
    first, *rest = arguments
    found = call(sd1_bundle, here, first, *json_flag(first), *rest)
    assert found.exit_code == 2 and isinstance(found.exception, SystemExit), found.exception
    assert "Traceback" not in found.stderr
    document = json.loads(found.stdout)
    assert set(document) == {"error"} and set(document["error"]) == {"type", "message", "field", "retryable"}
    assert document["error"]["field"] == field and document["error"]["retryable"] is False
    last = text.stderr.strip().splitlines()[-1]
    assert document["error"]["message"].splitlines()[-1] in last
    assert {path.name for path in here.iterdir()} == {"picture.png"}, "nothing is written"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_an_unknown_option_with_json(sd1_bundle: Path, here: Path, command: str) -> None:
    found = call(sd1_bundle, here, command, *json_flag(command), "--no-such-option")
    assert found.exit_code == 2
    assert json.loads(found.stdout)["error"]["type"] == "UsageError"


def test_a_result_that_goes_to_a_file_leaves_the_sentence_where_it_was(sd1_bundle: Path, here: Path) -> None:
    found = call(sd1_bundle, here, "bench", NOTHING, "--json", "result.json")
    assert found.exit_code == 2 and found.stdout == "" and str(here / "nothing") in found.stderr


def test_behind_two_dashes_json_is_a_prompt(sd1_bundle: Path, here: Path) -> None:
    found = call(sd1_bundle, here, "generate", NOTHING, "--", "--json")
    assert found.exit_code == 2 and found.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (("-a red circle",), "-a red circle"),
        (("--steps", "1", "-n red", "--size", "32"), "-n red"),  # -n is an option, and this is none
        (("-old = new",), "-old = new"),
        (("--a=b c, d", "--steps", "1"), None),  # no space before the sign: an option that is not known
        (("--steps", "1", "--", "-cat"), "-cat"),
        (("--", "--steps"), "--steps"),
        (("--negative", "-ugly, bad", "-o", "out", "a cat"), "a cat"),
        (("-", "--steps", "1"), "-"),
    ],
    ids=str,
)
def test_a_prompt_may_begin_with_a_dash(arguments: tuple[str, ...], prompt: str | None) -> None:
    """What the command was given is looked at, and nothing is drawn."""
    command = find_command("generate")
    assert command is not None
    if prompt is None:
        with pytest.raises(click.UsageError, match="BUNDLE -- -prompt"):
            command.make_context("generate", ["bundle", *arguments])
        return
    params = command.make_context("generate", ["bundle", *arguments]).params
    assert (params["bundle"], params["prompt"]) == ("bundle", prompt)
    if "--negative" in arguments:
        assert (params["negative_prompt"], str(params["output"])) == ("-ugly, bad", "out")


def test_key_frames_keep_their_order() -> None:
    command = find_command("animate")
    assert command is not None
    arguments = ["bundle", "a@1", "-b c@2", "--frames", "3", "d@3", "-o", "x.webp"]
    keys = command.make_context("animate", arguments).params["keys"]
    assert [(key.prompt, key.seed) for key in keys] == [("a", 1), ("-b c", 2), ("d", 3)]


def test_a_picture_of_a_prompt_with_a_dash_is_drawn(sd1_bundle: Path, here: Path) -> None:
    asked = ("--steps", "1", "--seed", "-3", "--variation-seed", "-4", "--variation-strength", "0.5", "--json")
    found = call(sd1_bundle, here, "generate", BUNDLE, "-a red circle", *asked)
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout)
    assert (summary["prompt"], summary["seeds"], summary["warnings"]) == ("-a red circle", [-3], [])


def test_json_says_which_refusals_are_worth_another_try(sd1_bundle: Path, here: Path) -> None:
    found = call(sd1_bundle, here, *DRAW, "--deadline", "0.000001", "--json")
    error = json.loads(found.stdout)["error"]
    assert (found.exit_code, error["type"], error["retryable"]) == (2, "DeadlineError", True)


def fields() -> list[str]:
    return list(Request.__struct_fields__)


@pytest.mark.parametrize("command", ["generate", "animate"])
def test_every_field_is_called_what_its_option_is_called(command: str) -> None:
    found = find_command(command)
    assert found is not None
    options = {param.name: param for param in found.params}
    for name in fields():
        if name not in options:
            assert name in API_ONLY or command == "animate", f"{name} has no option"
            continue
        expected = options[name].opts[0] if isinstance(options[name], click.Option) else "PROMPT"
        assert in_options(f"{name}: found 1", found) == (f"{expected}: found 1", name)
        assert in_options(f"{name}, 'it': found 1", found) == (f"{expected}, 'it': found 1", name)
        assert in_options(f"try `{name}`", found) == (f"try {expected}", None)


def test_what_stands_in_quotes_and_plain_words_stay() -> None:
    generate = find_command("generate")
    same = ("the image is '/a/clip_skip.png', `latentrt verify` and `clip_l` help", None)
    assert in_options(same[0], generate) == same
    assert in_options("a prompt with weights: give prompt_syntax='weighted'", generate)[0].endswith("give --weighted")
    assert in_options("give noise='cuda'", generate)[0] == "give --noise 'cuda'"
    assert in_options("output: found 0", generate) == ("--output: found 0", "output")
    assert in_options("n: found 0", None) == ("n: found 0", None)
    export, path = find_command("export"), "/x/b/text_encoder/text_encoder.json"
    for sentence in (f"{path} cannot be read", f"see {path}.", "golden/text_encoder.safetensors was altered"):
        assert in_options(sentence, export) == (sentence, None)
    assert in_options("see text_encoder.", export)[0] == "see --text-encoder."


def sentences() -> Iterator[tuple[str, str]]:
    """Give what each RequestError of the runtime begins with, a name that is filled in as {name}, and its place."""
    for file in sorted((ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RequestError" and node.args:
                yield _text(node.args[0]), f"{file.name}:{node.lineno}"


def _text(node: Any) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{…}" for part in node.values)
        return "".join(map(str, parts))
    return str(node.value) if isinstance(node, ast.Constant) else "{…}"


def other_names() -> set[str]:
    """Return what may be at fault besides a request's fields: options of commands, of structs, inputs of Triton."""
    options = {str(param.name) for name in COMMANDS if (found := find_command(name)) for param in found.params}
    structs = {name for one in (BatcherOptions, ServeOptions, Item) for name in one.__struct_fields__}
    return options | NO_FIELDS | structs | {*INPUTS} | {*Args.model_fields}


def test_every_sentence_that_names_a_field_begins_with_its_name() -> None:
    """Then the command line can say the option. A field in two words, or in the middle of a sentence, is not found."""
    known, spaced = {*fields(), *other_names()}, {name.replace("_", " ") for name in fields() if "_" in name}
    seen = set()
    for text, place in sentences():
        assert not any(re.search(rf"\b{name}\b", text) for name in spaced - {"clip skip"}), f"{place}: {text}"
        if head := re.match(r"([a-z_]+)(?:, [^:]*| '[^']*')?: ", text):
            assert head[1] in known, f"{place}: {text}"
            seen.add(head[1])
        for name in () if text.startswith("plan $") else re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text):
            assert name in known or name in ("clip_l", "clip_g"), f"{place}: {text}"
    assert {"guidance", "guidance_rescale", "mask", "seed", "clip_skip"} <= seen


def test_errors_of_the_runtime_are_told_apart_by_their_type(sd1_bundle: Path, here: Path) -> None:
    found = call(sd1_bundle, here, *DRAW, "--guidance", "1e30", "--sampler", "euler", "--steps", "2", "--json")
    error = json.loads(found.stdout)["error"]
    assert error["type"] == "NotFiniteError" and "stage 1 of 2" in error["message"]
    assert issubclass(RequestError, ValueError)


@pytest.mark.parametrize("kind", [CheckpointError, BundleError])
def test_a_component_is_not_told_as_the_option_of_its_name(kind: type[LatentrtError]) -> None:
    with pytest.raises(Refusal) as caught, refused(["export", "demo", "b"]):
        raise kind("text_encoder: it differs from the checkpoint")
    assert caught.value.message == "text_encoder: it differs from the checkpoint"
    with pytest.raises(Refusal) as caught, refused(["export", "demo", "b"]):
        raise RequestError("text_encoder: it is not there")
    assert "--text-encoder" in caught.value.message
