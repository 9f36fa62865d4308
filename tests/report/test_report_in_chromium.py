"""The committed run's report as a browser lays it out: on a desk, on a phone, on paper.

Needs Debian's Chromium, and a run whose report is here (`dvc repro`, or `dvc checkout`).
"""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from report_inputs import REPOSITORY

from stages.build_report import LANGUAGES

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
PAGES = {code: REPOSITORY / page for code, page in LANGUAGES.items()}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not all(page.exists() for page in PAGES.values()), reason="no report is here: dvc repro"
    ),
]
WIDTHS = {"desk": 1440, "phone": 390}
OVERFLOWING = """() => [...document.querySelectorAll('.scroll, .concept, .bubble, table, pre')]
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
CLOSED = "() => [...document.querySelectorAll('details')].filter(d => !d.open).length"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.parametrize("place", WIDTHS)
@pytest.mark.parametrize("code", LANGUAGES)
def test_nothing_is_cut_off(browser: "Browser", code: str, place: str) -> None:
    """Neither in the page as it opens, nor in anything that is folded."""
    page = browser.new_page(viewport={"width": WIDTHS[place], "height": 900})
    page.goto(PAGES[code].as_uri())
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[place]
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(CLOSED) > 8 or _ == 1
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


def test_the_page_is_half_as_long_as_it_was(browser: "Browser") -> None:
    """It had 25,500 pixels at this width."""
    page = browser.new_page(viewport={"width": WIDTHS["desk"], "height": 900})
    page.goto(PAGES["en"].as_uri())
    assert page.evaluate("document.documentElement.scrollHeight") <= 25_500 / 2


def test_paper_shows_what_is_folded(browser: "Browser") -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.goto(PAGES["en"].as_uri())
    folded = page.get_by_text("lora.lora_alpha", exact=True)
    assert not folded.is_visible()
    page.emulate_media(media="print")
    assert folded.is_visible()
