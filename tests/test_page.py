"""The page in a real Chromium: drawn with the keyboard alone, reloaded while drawing, looked at by axe."""

from __future__ import annotations

import base64
import copy
import io
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import msgspec
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import APIResponse, Browser, ConsoleMessage, Locator, Page, Route, expect, sync_playwright

from latentrt import Request
from latentrt.engines.spec import Array
from latentrt.runtime.images.read_parameters import parse, read_text
from latentrt.runtime.serve.app import build
from latentrt.runtime.serve.models import Models
from latentrt.runtime.serve.options import Access, Limits, ServeOptions
from tests.lora_files import kohya, make_factors, save
from tests.serving import served

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no Chromium at {CHROMIUM}")
WAIT_MS = 60_000  # for a busy machine
LONG = 900  # steps
PROMPT = "a red circle"
SEED = "9007199254740993"  # which no number of JavaScript is
REPORTS = """
window.reports = [];
document.addEventListener("securitypolicyviolation", (event) => window.reports.push(event.violatedDirective));
"""
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


class Pace:
    """Seconds that each stage takes longer, so that a picture can be watched and cancelled on any machine."""

    seconds = 0.0


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace()


@pytest.fixture(scope="module")
def models(
    sd1_checkpoint: Path, sd1_bundle: Path, pace: Pace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Models]:

    loras = tmp_path_factory.mktemp("loras")
    save(loras / "style.safetensors", kohya(make_factors(sd1_checkpoint, seed=1)))
    options = ServeOptions(slots=2, limits=Limits(steps=LONG), loras=loras)
    with Models({"tiny": sd1_bundle}, options, {"backend": "cpu", "threads": 1}) as opened:
        batcher: Any = opened.all()[0].batcher
        submit = batcher.submit

        def slowly(request: Any, *, on_step: Callable[..., None], **further: Any) -> Any:
            def slow(*step: Any) -> None:
                on_step(*step)
                time.sleep(pace.seconds)

            return submit(request, on_step=slow, **further)

        batcher.submit = slowly
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, address: str, pace: Pace) -> Iterator[Callable[..., Page]]:
    """Give what opens the page as somebody new; afterwards nothing was reported, and their jobs end."""
    contexts, said = [], []

    def open_page(at: str = address, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(REPORTS)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if is_trouble(message) else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(at)
        contexts.append(context)
        return page

    yield open_page
    pace.seconds = 0.0
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.reports") == []
            httpx.post(f"{address}/jobs/cancel", json={}, headers=session(page))
        context.close()
    assert said == []


def is_trouble(message: ConsoleMessage) -> bool:
    """Tell whether the console has an error; what the service refuses is none of the page's."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


@pytest.fixture
def page(opened: Callable[..., Page]) -> Page:
    page = opened()
    ready(page)
    return page


def ready(page: Page) -> None:
    expect(page.locator("#connection")).to_have_attribute("data-state", "on", timeout=WAIT_MS)
    expect(page.locator("#model option")).to_have_count(1, timeout=WAIT_MS)


def session(page: Page) -> dict[str, str]:
    return {"x-latentrt-session": page.evaluate("localStorage['latentrt.session']")}


def jobs(page: Page, address: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{address}/jobs", headers=session(page)).json()["jobs"]
    return found


def draw(page: Page, prompt: str = PROMPT, *, steps: int = 3) -> None:
    page.fill("#prompt", prompt)
    page.fill("#steps", str(steps))
    page.click("#draw")


def tiles(page: Page) -> Locator:
    return page.locator("#history li")


def drawn(page: Page, count: int) -> None:
    expect(tiles(page)).to_have_count(count, timeout=WAIT_MS)
    expect(page.locator("#queue li")).to_have_count(0, timeout=WAIT_MS)


def drop(page: Page, file: bytes, target: str) -> None:
    code = """(text) => {
        const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));
        return transfer;
    }"""
    transfer = page.evaluate_handle(code, base64.b64encode(file).decode())
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event(target, kind, {"dataTransfer": transfer})


def shown_file(page: Page) -> bytes:
    with page.expect_download() as download:
        page.click("#download")
    return Path(download.value.path()).read_bytes()


def test_from_the_prompt_to_the_downloaded_picture_with_the_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the prompt
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#download")).to_be_visible(timeout=WAIT_MS)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "download":
            break
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    text = read_text(Path(download.value.path()).read_bytes())
    assert text is not None and parse(text).prompt == PROMPT
    assert download.value.suggested_filename.startswith("a-red-circle-")


def test_a_reload_while_drawing_keeps_the_job_and_its_preview_and_the_history(page: Page, pace: Pace) -> None:
    draw(page, "an old one")
    drawn(page, 1)
    pace.seconds = 0.02
    draw(page, steps=LONG)
    job = page.locator("#queue li").get_attribute("data-job")
    expect(page.locator("#stage img[alt^='Preview']")).to_be_visible(timeout=WAIT_MS)
    page.reload()
    ready(page)
    assert page.locator("#queue li").get_attribute("data-job") == job
    expect(page.locator("#stage img[alt^='Preview']")).to_be_visible(timeout=WAIT_MS)
    expect(page.locator("#stage-status")).to_contain_text(re.compile(r"Step \d+ of 90\d"))
    assert page.input_value("#prompt") == PROMPT
    expect(tiles(page)).to_have_count(1)
    pace.seconds = 0.0
    drawn(page, 2)
    expect(page.locator("#stage img")).to_have_attribute("alt", PROMPT)


def test_samplers_that_do_not_work_with_the_model_are_not_offered(page: Page) -> None:
    expect(page.locator("#sampler option[value=euler]")).to_have_count(1)
    expect(page.locator("#sampler option[value=flow_lcm]")).to_have_count(0)


def test_a_dropped_picture_gives_its_settings(page: Page) -> None:
    page.fill("#negative", "stars")
    page.select_option("#sampler", "euler_ancestral_karras")
    page.fill("#guidance", "4.5")
    page.fill("#seed", SEED)
    page.click("#presets [data-ratio='4:3']")
    draw(page, "two lines\nof text")
    drawn(page, 1)
    wanted = {name: page.input_value(f"#{name}") for name in ("width", "height")}
    file = shown_file(page)
    page.evaluate("localStorage.removeItem('latentrt.form')")
    page.reload()
    ready(page)
    assert page.input_value("#seed") == ""
    drop(page, file, "body")
    expect(page.locator("#seed")).to_have_value(SEED)
    wanted |= {"prompt": "two lines\nof text", "negative": "stars", "sampler": "euler_ancestral_karras"}
    wanted |= {"steps": "3", "guidance": "4.5"}
    assert {name: page.input_value(f"#{name}") for name in wanted} == wanted
    assert page.get_attribute("#lock", "aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Callable[..., Page], pace: Pace, scheme: Any) -> None:
    page = opened(color_scheme=scheme)
    ready(page)
    draw(page)
    drawn(page, 1)
    pace.seconds = 0.02
    draw(page, steps=LONG)
    draw(page, steps=LONG)
    draw(page, steps=5000)  # refused
    expect(page.locator("#refusal")).to_be_visible()
    expect(page.locator("#queue img").first).to_be_visible(timeout=WAIT_MS)
    found = {"drawing": violations(page)}
    page.click("#cancel-all")
    pace.seconds = 0.0
    tiles(page).first.locator("button").click()
    page.click("#start-from")
    found["a picture"] = violations(page)
    for button, close in (("#compare", "#compare-close"), ("#image-mask", "#mask-done"), ("#clear", "#ask-yes")):
        page.click(button)
        found[button] = violations(page)
        page.click(close)
    assert [one for ones in found.values() for one in ones] == []


def violations(page: Page) -> list[tuple[str, str]]:
    result = Axe().run(page, options=RULES)
    return [(one["id"], node["html"][:120]) for one in result.response["violations"] for node in one["nodes"]]


def test_the_policy_stops_what_is_not_the_pages_own_and_reports_are_seen(browser: Browser, address: str) -> None:
    with browser.new_context() as context:
        context.add_init_script(REPORTS)
        page = context.new_page()
        page.goto(address)
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.foreign = true";
            document.body.append(script);
        }""")
        assert page.evaluate("window.foreign ?? null") is None
        assert page.evaluate("window.reports") == ["script-src-elem"]


@pytest.mark.parametrize(("width", "height"), [(320, 640), (390, 844)])
def test_a_narrow_page_needs_no_scrolling_sideways(opened: Callable[..., Page], width: int, height: int) -> None:
    page = opened(viewport={"width": width, "height": height})
    ready(page)
    draw(page, "a-word-that-does-not-end-" * 10)
    drawn(page, 1)
    page.click("#start-from")
    for button in ("#start-from", "#compare", "#image-mask"):
        page.click(button)
        boxes = "[document.documentElement, ...document.querySelectorAll('dialog[open]')]"
        sides = page.evaluate(f"{boxes}.map((one) => one.scrollWidth - one.clientWidth)")
        assert max(sides) <= 0, button
        page.keyboard.press("Escape")


def test_everything_that_is_pressed_is_24_pixels_or_more(page: Page) -> None:
    draw(page)
    drawn(page, 1)
    page.click("#start-from")
    pressed = "button, a.button, input:not([type=checkbox]), select, summary, textarea"
    code = """(pressed) => [...document.querySelectorAll(pressed)]
        .filter((one) => one.checkVisibility()).map((one) => [one.id, one.getBoundingClientRect()])
        .filter(([, box]) => box.width < 24 || box.height < 24).map(([id]) => id)"""
    assert page.evaluate(code, pressed) == []


def test_cancelling_one_all_but_one_and_all(page: Page, address: str, pace: Pace) -> None:
    pace.seconds = 0.02
    for prompt in ("a heart", "a star", "a circle", "a square"):
        draw(page, prompt, steps=LONG)
    cards = page.locator("#queue li")
    expect(cards).to_have_count(4, timeout=WAIT_MS)
    expect(cards.filter(has_text="in line").first).to_be_visible(timeout=WAIT_MS)
    page.get_by_role("button", name="Cancel: a star").click()
    expect(cards).to_have_count(3, timeout=WAIT_MS)
    expect(cards.filter(has_text="a star")).to_have_count(0)
    page.get_by_role("button", name="Cancel all but: a circle").click()
    expect(cards).to_have_count(1, timeout=WAIT_MS)
    expect(cards).to_contain_text("a circle")
    page.get_by_role("button", name="Cancel all", exact=True).click()
    expect(cards).to_have_count(0, timeout=WAIT_MS)
    expect(tiles(page)).to_have_count(0)


def test_the_seed_is_new_each_time_until_it_is_kept(page: Page, address: str) -> None:
    for _ in range(2):
        draw(page)
    page.click("#lock")
    for _ in range(2):
        draw(page)
    drawn(page, 4)
    first, second, third, fourth = (job["asked"]["seed"] for job in jobs(page, address))
    assert len({first, second}) == 2 and second == third == fourth
    page.click("#dice")
    assert page.input_value("#seed") != str(fourth)
    tiles(page).last.locator("button").click()
    page.click("#reuse-seed")
    assert page.input_value("#seed") == str(first)


def test_a_picture_starts_from_another_and_a_painted_mask_says_what_is_drawn_anew(page: Page, address: str) -> None:
    draw(page, "first")
    drawn(page, 1)
    first = pixels(shown_file(page))
    page.click("#start-from")
    page.fill("#strength", "0.5")
    draw(page, "second")
    drawn(page, 2)
    page.click("#image-mask")
    canvas = page.locator("#mask-canvas")
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.8, steps=5)
    page.mouse.up()
    share = page.locator("#mask-share")
    assert share_of(share) > 5
    page.click("#undo")
    assert share_of(share) == 0 and page.is_disabled("#undo")
    page.get_by_role("button", name="Left half").click()
    assert share_of(share) == 50
    page.click("#invert")
    page.fill("#rect-x", "0")
    page.fill("#rect-h", "16")
    page.click("#rect-add")  # half of the left half
    assert share_of(share) == 75
    page.keyboard.press("Control+z")
    page.click("#mask-done")
    draw(page, "third", steps=8)
    drawn(page, 3)
    _, second, third = jobs(page, address)
    assert second["pictures"][0]["settings"]["further"]["strength"] == 0.5 and not second["asked"]["mask"]
    assert third["asked"]["image"] and third["asked"]["mask"]
    changed = np.abs(pixels(shown_file(page)) - first).mean(axis=(0, 2))
    assert changed[:12].mean() < 0.8 * changed[-12:].mean()  # the left is kept, as a tiny decoder shows it
    page.click("#image-clear")
    expect(page.locator("#image-choose")).to_be_focused()


def pixels(file: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(file))).astype(np.float32)


def share_of(told: Locator) -> int:
    return int((told.text_content() or "").split()[0])


def test_an_empty_number_is_the_services_own(page: Page, address: str) -> None:
    expect(page.locator("#guidance")).to_have_value("7.5")  # the model's own
    expect(page.locator("#strength")).to_have_value("0.8")
    page.fill("#guidance", "")
    draw(page)
    drawn(page, 1)
    (job,) = jobs(page, address)
    assert job["asked"]["guidance"] == Request(prompt="").guidance


def test_loras_are_chosen_by_name_and_restored(page: Page, address: str) -> None:
    page.click("#loras-part summary")
    page.get_by_label("style", exact=True).check()
    page.get_by_label("Strength of style").fill("0.7")
    draw(page)
    drawn(page, 1)
    assert jobs(page, address)[0]["pictures"][0]["settings"]["further"]["loras"] == ["style.safetensors:0.7"]
    page.get_by_label("style", exact=True).uncheck()
    drop(page, shown_file(page), "body")
    expect(page.get_by_label("style", exact=True)).to_be_checked()
    assert page.get_by_label("Strength of style").input_value() == "0.7"


def test_what_screen_readers_are_told_is_polite_and_says_that_it_is_done(page: Page) -> None:
    draw(page)
    drawn(page, 1)
    live = page.locator("#live")
    assert live.get_attribute("aria-live") == "polite"
    expect(live).to_have_text(f"Done: {PROMPT}", timeout=WAIT_MS)


def test_an_image_is_chosen_from_a_file(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "teal").save(tmp_path / "wide.png")
    page.click("#image-part summary")
    page.set_input_files("#image-file", tmp_path / "wide.png")
    expect(page.locator("#image-view")).to_be_visible()
    assert (page.input_value("#width"), page.input_value("#height")) == ("48", "24")
    (tmp_path / "none.png").write_bytes(b"nothing")
    page.set_input_files("#image-file", tmp_path / "none.png")
    expect(page.locator("#refusal")).to_be_visible()


def test_a_removed_picture_stays_away_and_arrows_lead_through_the_history(page: Page, address: str) -> None:
    page.fill("#count", "3")
    draw(page, "<img src=x onerror=alert(1)>")
    drawn(page, 3)
    first, second, third = (tiles(page).nth(at).locator("button") for at in range(3))
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(second).to_be_focused()
    page.keyboard.press("End")
    expect(third).to_be_focused()
    page.keyboard.press("Enter")
    expect(third).to_have_attribute("aria-current", "true")
    page.click("#remove")
    expect(tiles(page)).to_have_count(2)
    page.reload()
    ready(page)
    expect(tiles(page)).to_have_count(2)
    page.click("#clear")
    page.click("#ask-yes")
    expect(tiles(page)).to_have_count(0)
    while jobs(page, address):
        page.wait_for_timeout(50)
    page.reload()
    ready(page)
    expect(tiles(page)).to_have_count(0)


def test_a_picture_that_is_drawn_before_the_form_is_answered_leaves_the_queue(page: Page) -> None:
    held: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        held.append((route, route.fetch()))

    page.route("**/jobs", hold)
    draw(page)
    drawn(page, 1)
    ((route, answer),) = held
    assert answer.json()["state"] != "done"
    with page.expect_response("**/jobs"):
        route.fulfill(response=answer)
    expect(page.locator("#live")).to_have_text("In the queue", timeout=WAIT_MS)
    drawn(page, 1)
    expect(page.locator("#stage img")).to_have_attribute("alt", PROMPT)


def test_pictures_are_compared_with_the_keyboard(page: Page) -> None:
    draw(page, "one")
    drawn(page, 1)
    draw(page, "other")
    drawn(page, 2)
    page.focus("#compare")
    page.keyboard.press("Enter")
    expect(page.locator("#compare-table tbody th")).to_have_text(["Prompt", "Seed"])
    page.focus("#compare-at")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#compare-value")).to_have_text("60 %")
    style = "getComputedStyle(document.getElementById('compare-a-view')).clipPath"
    assert "40%" in page.evaluate(style).replace("100% - 60%", "40%")
    page.keyboard.press("Escape")
    expect(page.locator("#compare-dialog")).to_be_hidden()
    expect(page.locator("#compare")).to_be_focused()


def test_a_refusal_is_told_at_its_field_and_a_failure_in_the_queue(page: Page) -> None:
    page.fill("#width", "33")
    draw(page)
    expect(page.locator("#refusal")).to_contain_text("33")
    assert page.get_attribute("#width", "aria-invalid") == "true"
    page.fill("#width", "32")
    draw(page)
    drawn(page, 1)
    expect(page.locator("#refusal")).to_be_hidden()


def test_a_service_that_went_away_is_told_and_found_again(opened: Callable[..., Page], models: Models) -> None:
    with served(build(models)) as first:
        page = opened(first)
        ready(page)
        draw(page)
        drawn(page, 1)
        page.route("**/jobs**", lambda route: route.abort())
        page.reload()
        expect(page.locator("#connection")).to_have_attribute("data-state", "off")
        expect(tiles(page)).to_have_count(1)  # the browser's own copies
        draw(page)
        expect(page.locator("#refusal")).to_be_visible()
        page.unroute("**/jobs**")
        ready(page)
        draw(page)
        drawn(page, 2)
        expect(page.locator("#refusal")).to_be_hidden()
        page.context.close()


def test_a_service_with_keys_is_used_once_a_key_is_given(opened: Callable[..., Page], models: Models) -> None:
    guarded = copy.copy(models)
    guarded.options = msgspec.structs.replace(models.options, access=Access(keys=("secret-key",)))
    with served(build(guarded)) as address:
        page = opened(address)
        page.get_by_label("API key").fill("secret-key")
        page.keyboard.press("Enter")
        ready(page)
        draw(page)
        drawn(page, 1)
        page.context.close()
