"""The screenshot of the service's page in the documentation: `latentrt serve` and a real Chromium.

    python benchmarks/page_picture.py demo/shapes docs/page.png

Needs playwright (pip install 'latentrt[dev]') and Debian's chromium.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PROMPTS = (
    "a large green heart on a checkered white background",
    "a medium yellow star on a plain purple background",
    "a small blue square on a plain orange background",
    "a large red circle on a striped blue background",
)
WAIT_MS = 120_000


@contextlib.contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """Serve a bundle as a process of its own; give its address."""
    command = [sys.executable, "-m", "latentrt", "serve", str(bundle), "--port", "0", "--slots", "3", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def draw_some(page: Page) -> None:
    """Fill the history, and then the queue."""
    page.fill("#guidance", "3")
    page.fill("#count", "3")
    for number, prompt in enumerate(PROMPTS, start=1):
        page.fill("#prompt", prompt)
        page.click("#draw")
        expect(page.locator("#history li")).to_have_count(3 * number, timeout=WAIT_MS)
    page.fill("#steps", "150")
    page.fill("#count", "1")
    for prompt in reversed(PROMPTS):
        page.fill("#prompt", prompt)
        page.click("#draw")
    expect(page.locator("#stage-status")).to_have_text(re.compile(r"Step ([4-9]\d|1\d\d) of .* left"), timeout=WAIT_MS)
    expect(page.locator("#stage img[alt^=Preview]")).to_be_visible()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    given = parser.parse_args()
    with serving(given.bundle) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=given.scheme)
        page.goto(address)
        expect(page.locator("#model option")).not_to_have_count(0, timeout=WAIT_MS)
        draw_some(page)
        shot = page.screenshot()
        page.click("#cancel-all")
        browser.close()
    small = Image.open(io.BytesIO(shot)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(given.picture, "PNG", optimize=True)
    print(f"{given.picture}: {given.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
