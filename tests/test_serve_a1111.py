"""A1111's API as its clients call it: their requests, written after their sources, with their headers."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image, ImageFilter

from latentrt import Lora, Request
from latentrt.engines.spec import Array
from latentrt.runtime.serve.a1111.neutral import IGNORED
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import Limits, ServeOptions
from tests.lora_files import every_layer, kohya, save

SMALL = {"prompt": "a circle", "steps": 3, "width": 32, "height": 32, "cfg_scale": 7.5, "seed": 3}
OPEN_WEBUI = {"authorization": ""}  # what it sends where no password is set


@pytest.fixture(scope="module")
def lora(sd1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("loras") / "style.safetensors", kohya(every_layer(sd1_checkpoint, seed=1)))


@pytest.fixture(scope="module")
def models(sd1_bundle: Path, lora: Path) -> Iterator[Models]:
    options = ServeOptions(
        slots=4, aliases={"first": "tiny"}, limits=Limits(pixels=128 * 128, steps=1000), loras=lora.parent
    )
    with Models({"tiny": sd1_bundle, "other": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        yield opened


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{address}/sdapi/v1", timeout=120) as client:
        yield client
        client.post("/options", json={"sd_model_checkpoint": "tiny", "CLIP_stop_at_last_layers": 1})


def file_of(pixels: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


SQUARE = file_of(np.full((32, 32, 3), 200, np.uint8))


def pixels_of(image: str) -> Array:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def same(image: str, pixels: Array) -> bool:
    """Tell whether two pictures are the same, to 60 dB: no value differs by more than one."""
    return int(np.abs(pixels_of(image).astype(int) - pixels).max()) <= 1


def drawn(models: Models, **asked: Any) -> Array:
    base = {"prompt": "a circle", "steps": 3, "seed": 3, "size": (32, 32), "prompt_syntax": "weighted"}
    return models.all()[0].pipe.draw(Request(**(base | asked))).pixels


# --- the clients ---


def test_open_webui_sets_a_model_and_draws(client: httpx.Client, models: Models) -> None:
    client.headers.update(OPEN_WEBUI)
    listed = client.get("/sd-models").json()
    assert [(one["title"], one["model_name"]) for one in listed] == [
        ("tiny", "tiny"),
        ("other", "other"),
        ("first", "first"),
    ]
    options = client.get("/options").raise_for_status().json()
    options["sd_model_checkpoint"] = listed[1]["title"]
    client.post("/options", json=options).raise_for_status()  # the whole object back
    assert client.get("/options").json() == options

    asked = {"prompt": "a circle", "batch_size": 2, "width": 32, "height": 32, "steps": 3, "negative_prompt": "red"}
    answer = client.post("/txt2img", json=asked).raise_for_status().json()
    info = json.loads(answer["info"])
    assert len(answer["images"]) == len(info["all_seeds"]) == 2
    assert info["sd_model_name"] and (info["width"], info["height"]) == (32, 32)
    for image, seed in zip(answer["images"], info["all_seeds"], strict=True):
        assert same(image, drawn(models, seed=seed, negative_prompt="red", guidance=7.0)[0])


SILLY_TAVERN = {  # of public/scripts/extensions/stable-diffusion/index.js; its server sends all of it on
    "url": "http://localhost:7860",
    "auth": "",
    **SMALL,
    "negative_prompt": "blue",
    "sampler_name": "DPM++ 2M",
    "scheduler": "karras",
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.5,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


def test_sillytavern_looks_around_and_draws(client: httpx.Client, models: Models) -> None:
    client.headers["Authorization"] = "Basic"  # of no user and no password
    names = {
        route: [one["name"] for one in client.get(f"/{route}").raise_for_status().json()]
        for route in ("samplers", "schedulers", "upscalers", "latent-upscale-modes")
    }
    assert {"Euler a", "DPM++ 2M", "DPM++ 2M Karras"} <= set(names["samplers"])
    assert names["schedulers"][:3] == ["automatic", "uniform", "karras"]
    assert (names["upscalers"], names["latent-upscale-modes"]) == (["None"], [])
    assert client.get("/sd-vae").json() == []
    assert client.get("/sd-modules").status_code == 404  # Forge's, which it asks for beside

    client.post("/options", json={"sd_model_checkpoint": "other"}).raise_for_status()
    idle = client.get("/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)

    assert "forge_preset" not in client.get("/options").json()
    answer = client.post("/txt2img", json=SILLY_TAVERN).raise_for_status().json()
    asked = {"sampler": "DPM++ 2M Karras", "negative_prompt": "blue", "guidance": 7.5}
    assert same(answer["images"][0], drawn(models, **asked)[0])


def test_the_photoshop_plugin_draws_over_an_image_and_reads_its_settings(client: httpx.Client, models: Models) -> None:
    client.headers["Accept"] = "application/json"
    start = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    asked = {  # of utility/session.js
        **SMALL,
        "seed": "3",
        "init_images": [file_of(start)],
        "denoising_strength": 0.6,
        "sampler_index": "Euler",
        "batch_size": 1,
        "mask_blur": 4,
        "use_sharp_mask": False,
        "use_prompt_shortcut": False,
        "prompt_shortcut_ui_dict": {"a": "b"},
        "uniqueDocumentId": "0f",
        "mode": "img2img",
        "selection_info": {"left": 3},
        "original_prompt": "a circle",
        "original_negative_prompt": "",
        "restore_faces": False,
        "tiling": False,
        "alwayson_scripts": {},
    }
    answer = client.post("/img2img", json=asked).raise_for_status().json()
    alone = drawn(models, image=start, strength=0.6, sampler="euler", guidance=7.5, size=(32, 32))
    assert same(answer["images"][0], alone[0])

    found = client.post("/png-info", json={"image": "data:image/png;base64," + answer["images"][0]}).json()
    assert found["info"] == json.loads(answer["info"])["infotexts"][0]
    wanted = {"Prompt": "a circle", "Steps": "3", "Sampler": "Euler", "Seed": "3", "Size": "32x32"}
    assert wanted.items() <= found["parameters"].items()
    assert [one["name"] for one in client.get("/loras").json()] == ["style"]
    assert client.get("/embeddings").json() == {"loaded": {}, "skipped": {}}


# --- what the fields mean ---


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"sampler_name": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m_karras"}),
        ({"sampler_name": "DPM++ 2M Karras", "scheduler": "Automatic"}, {"sampler": "dpmpp_2m_karras"}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}, {"sampler": "dpmpp_2m_karras"}),
        (
            {"sampler_name": "Euler a", "scheduler": "SGM Uniform"},
            {"sampler": "euler_ancestral", "spacing": "sgm_uniform"},
        ),
        ({"sampler_index": "DDIM", "eta": 0.4}, {"sampler": "ddim", "eta": 0.4}),
        ({"sampler_name": "Euler", "eta": 0}, {"sampler": "euler"}),
        ({"prompt": "a (red:1.3) circle"}, {"prompt": "a (red:1.3) circle"}),
        ({"subseed": 9, "subseed_strength": 0.4}, {"variation_seed": 9, "variation_strength": 0.4}),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, {"clip_skip": 1}),
        ({"clip_skip": 2}, {"clip_skip": 1}),
        ({"override_settings": {"randn_source": "NV"}}, {"noise": "cuda"}),
        ({"batch_size": 2, "n_iter": 2}, {"n": 4}),
        ({"cfg_scale": None}, {"guidance": 7.0}),
    ],
)
def test_a_field_draws_what_the_library_draws(
    client: httpx.Client, models: Models, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    answer = client.post("/txt2img", json=SMALL | sent).raise_for_status().json()
    alone = drawn(models, **({"guidance": 7.5} | meant))
    assert len(answer["images"]) == len(alone)
    assert all(same(image, pixels) for image, pixels in zip(answer["images"], alone, strict=True))


def test_a_prompt_applies_loras_by_their_names(client: httpx.Client, models: Models, lora: Path) -> None:
    asked = SMALL | {"prompt": "a <lora:style:0.6>circle<lora:style:0.2>"}
    image = client.post("/txt2img", json=asked).raise_for_status().json()["images"][0]
    styled = drawn(models, loras=[Lora(file=lora, scale=0.8)], guidance=7.5)[0]
    assert same(image, styled) and not same(image, drawn(models, guidance=7.5)[0])
    plain = client.post("/txt2img", json=asked | {"disable_extra_networks": True}).json()["images"][0]
    assert same(plain, drawn(models, guidance=7.5)[0])


def test_a_mask_keeps_what_is_black(client: httpx.Client, models: Models) -> None:
    start = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    asked = SMALL | {"init_images": [file_of(start)], "mask": "data:image/png;base64," + file_of(mask), "mask_blur": 0}
    answer = client.post("/img2img", json=asked | {"inpainting_fill": 1, "inpaint_full_res": False})
    alone = drawn(models, image=start, mask=mask, strength=0.75, guidance=7.5)
    assert same(answer.raise_for_status().json()["images"][0], alone[0])


@pytest.mark.parametrize(
    ("route", "sent", "status", "field"),
    [
        ("txt2img", {"enable_hr": True}, 400, "enable_hr"),
        ("txt2img", {"restore_faces": True}, 400, "restore_faces"),
        ("txt2img", {"tiling": True}, 400, "tiling"),
        ("txt2img", {"styles": ["noir"]}, 400, "styles"),
        ("txt2img", {"script_name": "X/Y/Z plot"}, 400, "script_name"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 400, "alwayson_scripts"),
        ("txt2img", {"s_churn": 0.5}, 400, "s_churn"),
        ("txt2img", {"never_heard_of": 1}, 400, "never_heard_of"),
        ("txt2img", {"s_noise": 0}, 400, "s_noise"),
        ("txt2img", {"override_settings": {"initial_noise_multiplier": 0}}, 400, "initial_noise_multiplier"),
        ("txt2img", {"override_settings": {"enable_pnginfo": False}}, 400, "enable_pnginfo"),
        ("txt2img", {"prompt": "a" * 32_001}, 400, "prompt"),
        ("txt2img", {"negative_prompt": "a" * 32_001}, 400, "negative_prompt"),
        ("txt2img", {"sampler_name": "a" * 1000}, 400, "sampler_name"),
        ("txt2img", {"width": -32, "height": -32}, 400, "width"),
        ("txt2img", {"width": 0, "height": 0}, 400, "width"),
        ("txt2img", {"seed": "9" * 5000}, 400, "seed"),
        ("txt2img", {"subseed_strength": "nan"}, 400, "subseed_strength"),
        ("img2img", {"init_images": [SQUARE] * 3}, 400, "init_images"),
        ("txt2img", {"sampler_name": "nope"}, 400, "sampler_name"),
        ("txt2img", {"scheduler": "KL Optimal"}, 400, "scheduler"),
        ("txt2img", {"sampler_name": "Euler a", "eta": 0}, 400, "eta"),
        ("txt2img", {"width": 33}, 400, "width"),
        ("txt2img", {"width": 100_000, "height": 100_000}, 400, "width"),
        ("txt2img", {"width": None}, 400, "width"),
        ("txt2img", {"steps": 10_000}, 400, "steps"),
        ("txt2img", {"steps": 0}, 400, "steps"),
        ("txt2img", {"steps": "many"}, 400, "steps"),
        ("txt2img", {"batch_size": 6, "n_iter": 2}, 400, "batch_size"),
        ("txt2img", {"cfg_scale": "nan"}, 400, "cfg_scale"),
        ("txt2img", {"subseed": 1, "subseed_strength": 3}, 400, "subseed_strength"),
        ("txt2img", {"prompt": "a <lora:nope:0.8> circle"}, 400, "prompt"),
        ("txt2img", {"prompt": "a <lora:style:0.8:0.5> circle"}, 400, "prompt"),
        ("txt2img", {"prompt": "a <lora:style:strong> circle"}, 400, "prompt"),
        ("txt2img", {"prompt": "a [red:blue:0.5] circle"}, 400, "prompt"),
        ("txt2img", {"override_settings": {"sd_vae": "other.vae"}}, 400, "sd_vae"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "nope"}}, 404, "model"),
        ("img2img", {}, 400, "init_images"),
        ("img2img", {"init_images": ["http://127.0.0.1:1/a.png"]}, 400, "init_images"),
        ("img2img", {"init_images": ["../../etc/passwd"]}, 400, "init_images"),
        ("img2img", {"init_images": [base64.b64encode(b"no picture").decode()]}, 400, "init_images"),
        ("options", {"sd_model_checkpoint": "nope"}, 404, "model"),
        ("options", {"face_restoration": True}, 400, "face_restoration"),
        ("options", {"CLIP_stop_at_last_layers": 0}, 400, "CLIP_stop_at_last_layers"),
        ("png-info", {"image": "%"}, 400, "image"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(
    client: httpx.Client, route: str, sent: dict[str, Any], status: int, field: str
) -> None:
    base = SMALL if route.endswith("img") else {}
    answer = client.post(f"/{route}", json=base | sent)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    assert answer.json()["detail"].startswith((f"{field}:", f"{field}, "))


@pytest.mark.parametrize(("field", "value"), [("inpainting_fill", 0), ("inpaint_full_res", True), ("mask_blur", 65)])
def test_what_is_not_done_with_a_mask_is_refused_with_one_and_accepted_without(
    client: httpx.Client, field: str, value: object
) -> None:
    image = file_of(np.full((32, 32, 3), 200, np.uint8))
    asked = SMALL | {"init_images": [image], field: value}
    assert client.post("/img2img", json=asked).status_code == 200
    refused = client.post("/img2img", json=asked | {"mask": image})
    assert refused.status_code == 400 and refused.json()["detail"].startswith(f"{field}:")


def test_a_blurred_mask_mixes_the_picture_with_the_image_along_its_edge(client: httpx.Client, models: Models) -> None:
    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(2)))
    asked = SMALL | {"init_images": [file_of(start)], "mask": file_of(mask), "mask_blur": 2}
    image = client.post("/img2img", json=asked).raise_for_status().json()["images"][0]
    alone = drawn(models, image=start, mask=soft, strength=0.75, guidance=7.5)[0]
    share = soft[..., None] / 255
    assert same(image, share * alone + (1 - share) * start)
    assert (pixels_of(image)[:, :8] == start[:, :8]).all()  # where nothing of the mask comes
    assert Image.open(io.BytesIO(base64.b64decode(image))).info["parameters"]


@pytest.mark.parametrize("mode", ["white", "inverted", "opaque"])
def test_a_mask_is_white_or_opaque_where_it_repaints(client: httpx.Client, models: Models, mode: str) -> None:
    start = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    sent = {"white": mask, "inverted": 255 - mask, "opaque": np.dstack([np.zeros((32, 32, 3), np.uint8), mask])}[mode]
    asked = SMALL | {
        "init_images": [file_of(start)],
        "mask": file_of(sent),
        "inpainting_mask_invert": mode == "inverted",
    }
    image = client.post("/img2img", json=asked).raise_for_status().json()["images"][0]
    assert same(image, drawn(models, image=start, mask=mask, strength=0.75, guidance=7.5)[0])


def test_a_mask_is_read_as_it_is_shown(client: httpx.Client, models: Models) -> None:
    """It may lie on its side, with a note that says so, and have 16 bits."""
    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    soft = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(2)))
    turned, file, exif = np.rot90(mask).astype(np.uint16) * 257, io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned[turned == 0] = 300  # nearly black
    Image.fromarray(turned).save(file, "PNG", exif=exif)
    sent = {"init_images": [file_of(start)], "mask": base64.b64encode(file.getvalue()).decode(), "mask_blur": 2}
    image = client.post("/img2img", json=SMALL | sent).raise_for_status().json()["images"][0]
    alone = drawn(models, image=start, mask=soft, strength=0.75, guidance=7.5)[0]
    share = soft[..., None] / 255
    assert np.abs(pixels_of(image) - (share * alone + (1 - share) * start)).max() <= 3


def test_options_hold_for_later_calls_and_a_calls_own_do_not(client: httpx.Client, models: Models) -> None:
    client.post("/txt2img", json=SMALL | {"override_settings": {"sd_model_checkpoint": "other"}}).raise_for_status()
    assert client.get("/options").json()["sd_model_checkpoint"] == "tiny"
    kept = {"override_settings": {"CLIP_stop_at_last_layers": 2}, "override_settings_restore_afterwards": False}
    client.post("/txt2img", json=SMALL | kept).raise_for_status()
    assert client.get("/options").json()["CLIP_stop_at_last_layers"] == 2
    answer = client.post("/txt2img", json=SMALL).raise_for_status().json()
    assert same(answer["images"][0], drawn(models, clip_skip=1, guidance=7.5)[0])


def test_a_seed_that_is_not_given_is_another_one_each_time(client: httpx.Client) -> None:
    seeds = {
        json.loads(client.post("/txt2img", json=SMALL | {"seed": seed}).json()["info"])["seed"]
        for seed in (-1, None, -1)
    }
    assert len(seeds) == 3 and min(seeds) >= 0


def test_an_error_of_no_route_has_the_same_form(client: httpx.Client) -> None:
    assert set(client.get("/nope").json()) == {"error", "detail", "body", "errors"}
    assert client.get("/txt2img").status_code == 405
    assert client.post("/txt2img", content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_what_has_no_effect_is_named_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs/serving.md").read_text("utf-8")
    assert [name for name in IGNORED if f"`{name}`" not in page] == []


# --- progress and interrupt ---


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, "this did not happen within a minute"
        time.sleep(0.01)


def test_progress_is_told_and_an_interrupt_ends_the_callers_own(client: httpx.Client, address: str) -> None:
    answers: dict[str, httpx.Response] = {}

    def draw(name: str, steps: int) -> None:
        with httpx.Client(base_url=f"{address}/sdapi/v1", timeout=120, headers={"authorization": name}) as own:
            answers[name] = own.post(
                "/txt2img", json=SMALL | {"steps": steps, "batch_size": 2, "sampler_name": "Euler"}
            )

    threads = [threading.Thread(target=draw, args=("mine", 900)), threading.Thread(target=draw, args=("yours", 300))]
    for thread in threads:
        thread.start()
    mine = {"authorization": "mine"}
    looks: list[dict[str, Any]] = []

    def seen() -> bool:
        looks.append(client.get("/progress", headers=mine, params={"skip_current_image": False}).json())
        return looks[-1]["current_image"] is not None

    wait_for(seen)
    assert pixels_of(looks[-1]["current_image"]).ndim == 3
    assert 0 < looks[-1]["progress"] < 1 and looks[-1]["state"]["job_count"] == 1
    assert looks[-1]["state"]["sampling_steps"] == 900
    assert client.get("/progress").json()["state"]["job_count"] == 0  # another caller's
    assert client.post("/interrupt", headers=mine).json() == {}
    for thread in threads:
        thread.join(120)
    assert (answers["mine"].status_code, answers["mine"].json()["images"]) == (200, [])
    assert len(answers["yours"].json()["images"]) == 2
    assert client.get("/progress", headers=mine).json()["progress"] == 0.0
