"""The service's OpenAPI document: what it says is so."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import schemathesis
from starlette.routing import Route
from starlette.testclient import TestClient

from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.openai.schema import Drawing, Edit, Generation


def shown() -> dict[str, Any]:
    with TestClient(build(Models({})), base_url="http://localhost") as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
        return found


def test_every_reference_leads_somewhere_and_schemathesis_reads_it() -> None:
    document = shown()
    text = json.dumps(document)
    names = set(re.findall(r"#/components/schemas/([\w.]+)", text))
    assert names and names <= set(document["components"]["schemas"])
    assert len(list(schemathesis.openapi.from_dict(document).get_all_operations())) >= 5


def test_every_route_of_both_apis_is_described() -> None:
    app = build(Models({}))
    served = {route.path.replace(":path", "") for route in app.routes if isinstance(route, Route)}
    described = set(shown()["paths"])
    assert described <= served
    assert {path for path in served if path.startswith(("/v1/", "/sdapi/"))} <= described


def test_bodies_are_described_with_all_their_fields() -> None:
    document = shown()
    generation = document["components"]["schemas"]["Generation"]["properties"]
    assert set(generation) == {field.name for field in msgspec.structs.fields(Generation)}
    edit = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    files = {"image", "image[]", "mask", "controls[][image]", "image_prompts[][image]"}
    assert set(edit["properties"]) == {field.name for field in msgspec.structs.fields(Edit)} | files
    assert set(edit["required"]) == {"prompt", "image"}
    assert set(Drawing.__struct_fields__) < set(edit["properties"])
