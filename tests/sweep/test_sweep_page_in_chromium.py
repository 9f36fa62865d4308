"""The page of a sweep as a browser lays it out: on a desk and on a phone, with few trials and with many.

Needs Debian's Chromium.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from planted_sweeps import RATE, hostile, result, seeded, trial, wide

from capas.sweep import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
SWEEPS = {
    "hostile": hostile,
    "wide": wide,
    "single": lambda: result(trial(0.5, "lora.r=8")),
    "seeds": lambda: result(*seeded({f"{RATE}=1e-4": (0.1, 0.2), f"{RATE}=1e-3": (0.3, 0.4)})),
}
TOO_WIDE = """() => [...document.querySelectorAll('pre, td, .number, figure')]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", SWEEPS)
def test_nothing_is_cut_off_and_nothing_else_is_loaded(
    browser: "Browser", tmp_path: Path, name: str, width: int
) -> None:
    page.write(tmp_path, page.render(SWEEPS[name]()))
    for file in page.PAGES.values():
        tab = browser.new_page(viewport={"width": width, "height": 900})
        asked: list[str] = []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.on("dialog", lambda dialog, asked=asked: asked.append(dialog.message))
        address = (tmp_path / Path(file).name).as_uri()
        tab.goto(address)
        for _ in range(2):
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate(TOO_WIDE) == []
            tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert asked == [address]
        tab.close()
