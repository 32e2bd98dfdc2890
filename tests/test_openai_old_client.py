"""OpenAI's client of 2025, 1.109 on httpx, as `make .cache/old-openai` installs it: generate, edit, stream, errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import ServeOptions
from tests.serving import served
from tests.test_openai_pictures import file_of, grey

PYTHON = Path(__file__).parent.parent / ".cache" / "old-openai" / "bin" / "python"
CALLS = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
drawn = client.images.generate(prompt="a star", n=2, response_format="b64_json", extra_body={"steps": 4, "seed": 3})
with open(sys.argv[2], "rb") as image:
    edited = client.images.edit(image=image, prompt="a star", extra_body={"steps": 4, "seed": 3})
edited_both = client.images.edit(image=[open(sys.argv[2], "rb")] * 2, prompt="a star", n=2, extra_body={"steps": 4})
streamed = client.images.generate(prompt="a star", stream=True, partial_images=2, extra_body={"steps": 8})
told = {
    "version": openai.__version__,
    "seeds": [one.model_extra["seed"] for one in drawn.data],
    "pictures": [len(answer.data) for answer in (drawn, edited, edited_both)],
    "events": [event.type for event in streamed],
    "models": [model.id for model in client.models.list()],
    "errors": [],
}
for model, size in (("nope", "auto"), ("tiny", "17x17")):
    try:
        client.images.generate(prompt="a star", model=model, size=size)
    except openai.APIStatusError as error:
        told["errors"].append([type(error).__name__, error.param, error.code, error.request_id is not None])
print(json.dumps(told))
"""


@pytest.mark.slow
def test_an_older_client_draws_edits_streams_and_reads_errors(sd1_bundle: Path, tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip("the older client is not here; `make .cache/old-openai` brings it")
    image = tmp_path / "grey.png"
    image.write_bytes(file_of(grey()))
    with (
        Models({"tiny": sd1_bundle}, ServeOptions(slots=2), {"backend": "cpu", "threads": 1}) as models,
        served(build(models)) as address,
    ):
        command = [str(PYTHON), "-c", CALLS, address, str(image)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"].startswith("1.") and told["seeds"] == [3, 4] and told["pictures"] == [2, 1, 2]
    assert told["events"] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert told["models"] == ["tiny"]
    assert told["errors"] == [
        ["NotFoundError", "model", "model_not_found", True],
        ["BadRequestError", "size", "invalid_value", True],
    ]
