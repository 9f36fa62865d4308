"""The pages of `dvc plots show` and `dvc plots diff` need no network: .dvc/plots.html holds the scripts."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import REPOSITORY

CHROMIUM = shutil.which("chromium")
DVC = (sys.executable, "-m", "dvc", "plots")
LOADED = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)\s*=\s*["']?(?:https?:)?//"""
)
# The number of coloured columns of pixels in each drawing: curves and bars, and one symbol of the legend.
DRAWN = """() => [...document.querySelectorAll('.vega-embed canvas')].map(canvas => {
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
  const columns = new Set()
  for (let i = 0; i < data.length; i += 4) {
    const colours = data.slice(i, i + 3)
    if (Math.max(...colours) - Math.min(...colours) > 40) columns.add(i / 4 % canvas.width)
  }
  return columns.size
})"""


def plots(*arguments: str, out: Path) -> Path:
    """The page that this command of DVC's writes for the committed reports."""
    subprocess.run([*DVC, *arguments, "-o", str(out)], cwd=REPOSITORY, check=True)
    return out / "index.html"


def test_the_page_loads_nothing_from_the_network(tmp_path: Path) -> None:
    from dvc_render.vega import VegaRenderer

    text = plots("show", "reports/history.csv", out=tmp_path).read_text(encoding="utf-8")
    assert LOADED.search(VegaRenderer.SCRIPTS)
    assert not LOADED.search(text)
    assert text.count("vegaEmbed('#") == 1


def test_the_page_holds_the_versions_that_dvc_would_load() -> None:
    from dvc_render.vega import VegaRenderer

    text = (REPOSITORY / ".dvc/plots.html").read_text(encoding="utf-8")
    packages = re.findall(r'<script data-package="(.+?)">', text)
    assert packages == re.findall(r"/npm/(.+?)\"", VegaRenderer.SCRIPTS)
    assert len(packages) == 3


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_without_a_network_draws_every_plot(tmp_path: Path) -> None:
    from chromium import FLAGS
    from dvc_render.html import PAGE_HTML
    from playwright.sync_api import sync_playwright

    (tmp_path / "own.html").write_text(PAGE_HTML)
    own = ("show", "--html-template", str(tmp_path / "own.html"))
    pages = {
        "show": plots("show", out=tmp_path / "show"),
        "diff": plots("diff", "HEAD", out=tmp_path / "diff"),
        "DVC's own": plots(*own, out=tmp_path / "own"),
    }
    drawn = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(offline=True)
        for name, file in pages.items():
            page = context.new_page()
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(1000)  # it is drawn
            drawn[name] = page.evaluate(DRAWN)
            assert (len(asked) == 1) == (name != "DVC's own"), asked
        browser.close()
    # The loss, the learning rate, the token accuracy, the lengths, the quantized layers, the score.
    assert len(drawn["show"]) == len(drawn["diff"]) == 6
    assert min(drawn["show"] + drawn["diff"]) > 200, drawn
    assert drawn["DVC's own"] == []
