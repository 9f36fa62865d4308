"""The MLflow UI as a user sees it: `make ui`, a sweep's runs compared, a run's samples and its loss curve.

Needs Debian's Chromium. The pictures of .github/images are made anew by

    CAPAS_IMAGES=.github/images python -m pytest -m slow tests/tracking/test_browser.py
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import pytest
from chromium import CHROMIUM, FLAGS
from servers import free_port
from workspace import Workspace, make_workspace

from capas.tracking.pages import Pages
from capas.tracking.store import existing, sweeps_of, tracking_uri

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
RATES = ("0.001", "0.01")
# The names of the metrics are a table of their own beside that of the values.
BESIDE = """link => {
  const cells = document.querySelectorAll('.ReactVirtualized__Grid__innerScrollContainer > *')
  const row = link.parentElement.style.top
  return [...cells].filter(cell => cell.style.top === row).map(cell => cell.innerText)
}"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("CAPAS_IMAGES") or tmp_path_factory.mktemp("images"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """The real pipeline, shrunk, after a sweep of two learning rates, and what the sweep printed."""
    workspace = make_workspace(tmp_path_factory.mktemp("browser") / "repository")
    points = f"trainer.learning_rate={','.join(RATES)}"
    said = workspace.run(sys.executable, "stages/sweep.py", "-m", "experiment=quick", points)
    return workspace, said


@pytest.fixture(scope="module")
def swept(sweep: tuple[Workspace, str]) -> Workspace:
    return sweep[0]


@pytest.fixture(scope="module")
def address(swept: Workspace) -> Iterator[str]:
    """Of the page that `make ui` names."""
    (swept.root / ".venv").symlink_to(sys.prefix)
    command = ["make", "--old-file=.venv/.ready", "ui", f"PORT={free_port()}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    ui = subprocess.Popen(
        command,
        cwd=swept.root,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert ui.stdout is not None
        found = None
        while found is None and (line := ui.stdout.readline()):
            found = re.search(r"http://127\.0\.0\.1\S+", line)
        assert found, "make ui printed no address"
        yield found[0]
    finally:
        os.killpg(ui.pid, signal.SIGTERM)
        ui.wait(timeout=30)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator["Page"]:
    from playwright.sync_api import Error, expect, sync_playwright

    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(60_000)
        for seconds in range(60):  # the server takes some to start
            try:
                page.goto(address)
                break
            except Error:
                assert seconds < 59, "the UI does not answer"
                page.wait_for_timeout(1000)
        yield page
        browser.close()


def row(page: "Page", text: str) -> "Locator":
    """Of the table of runs: the left half, which holds the check box and the name."""
    return page.get_by_role("row").filter(has_text=text).filter(has=page.get_by_role("checkbox"))


def close_assistant(page: "Page") -> None:
    """A panel of MLflow's that hides a third of the page when it is opened for the first time."""
    page.get_by_text("MLflow Assistant").first.wait_for()
    page.get_by_role("button", name="Close").last.click()


def test_the_table_opens_with_what_people_compare(
    page: "Page", swept: Workspace, images: Path
) -> None:
    from playwright.sync_api import expect

    close_assistant(page)
    metrics, params = ("score", "base_score", "tuned.loss"), ("trainer.learning_rate", "lora.r")
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in (*params, "dataset.preset")]
    for column in columns:
        expect(page.locator(f'.ag-header-cell[col-id="{column}"]')).to_be_in_viewport(ratio=1)
    duration = page.locator(".ag-header-cell").filter(has_text="Duration")
    expect(duration).to_be_in_viewport(ratio=1)
    assert parse_qs(page.url.partition("?")[2])["viewStateShareKey"] == ["capas"]
    for rate in RATES:
        expect(page.get_by_role("gridcell", name=rate, exact=True)).to_be_in_viewport()
        shown = page.get_by_role("gridcell", name=f"{score(swept, rate):.6g}", exact=True)
        expect(shown.first).to_be_in_viewport()
    page.screenshot(path=images / "runs.png")


def sweeps_page(swept: Workspace, address: str) -> str:
    """That of the sweeps, as `make ui` names it once there is one."""
    found = existing(swept.root).get_experiment_by_name(sweeps_of("capas"))
    base = address.partition("/#")[0]
    pages = Pages(tracking_uri(swept.root), found.experiment_id, int(base.rpartition(":")[2]))
    return pages.runs(view="")


def unfolded(page: "Page") -> "Locator":
    """The sweep's row, with its children below it; MLflow keeps a row unfolded that was so before."""
    parent = row(page, "sweep experiment=quick")
    parent.wait_for()
    page.wait_for_timeout(3_000)
    child = page.get_by_role("link", name=f"learning_rate={RATES[0]}-")
    if not child.count():
        parent.get_by_role("button").first.click()
    child.first.wait_for()
    return parent


def test_a_sweep_is_a_parent_with_a_child_for_each_point(
    page: "Page", swept: Workspace, address: str
) -> None:
    from playwright.sync_api import expect

    page.goto(sweeps_page(swept, address))
    parent = unfolded(page)
    for rate in RATES:
        row(page, f"learning_rate={rate}-").get_by_role("checkbox").first.check()
    parent.get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("Comparing 3 Runs")).to_be_visible(timeout=60_000)
    assert len(json.loads(parse_qs(page.url.partition("?")[2])["runs"][0])) == 3


def test_a_child_leads_to_its_training(page: "Page", swept: Workspace, address: str) -> None:
    page.goto(sweeps_page(swept, address))
    unfolded(page)
    page.get_by_role("link", name=f"learning_rate={RATES[0]}-").click()
    with page.expect_popup() as opened:
        page.get_by_role("link", name=f"learning_rate={RATES[0]}-").click()
    opened.value.get_by_role("tab", name="Artifacts").click()
    samples = opened.value.get_by_text("samples.json", exact=True)
    samples.wait_for()
    assert samples.is_visible()
    opened.value.close()


def test_compare_shows_both_learning_rates_and_both_scores(
    page: "Page", swept: Workspace, address: str
) -> None:
    scores = [score(swept, rate) for rate in RATES]
    assert scores[0] != scores[1]
    compare(page, address)
    page.get_by_role("switch", name="Parameters - Show diff only").click()
    rates = page.locator("tr").filter(has_text=re.compile(r"^trainer\.learning_rate"))
    assert set(RATES) <= set(rates.inner_text().split())
    metric = page.get_by_title("Plot chart").filter(has_text=re.compile("^tuned.exact_match$"))
    bring(page, metric)
    shown = metric.evaluate(BESIDE)
    assert {f"{value:.6g}" for value in scores} <= {text.strip() for text in shown}


def compare(page: "Page", address: str) -> None:
    """Open the comparison of the two training runs."""
    from playwright.sync_api import expect

    page.goto(address)
    for rate in RATES:
        row(page, f"learning_rate={rate}-").get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("Comparing 2 Runs")).to_be_visible(timeout=60_000)


def bring(page: "Page", wanted: "Locator") -> None:
    """Into view: the list of metrics draws only the rows that are seen."""
    page.get_by_role("switch", name="Metrics - Show diff only").click()
    values = page.locator(".ReactVirtualized__Grid").last
    values.scroll_into_view_if_needed()
    values.hover()
    for _ in range(50):
        area = values.bounding_box()
        box = wanted.bounding_box() if wanted.count() else None  # drawn a little before it is seen
        if box and area and box["y"] + box["height"] < area["y"] + area["height"]:
            return
        page.mouse.wheel(0, 150)
        page.wait_for_timeout(500)  # the names follow the values
    raise AssertionError("the metric is not in the list")


def experiment(swept: Workspace, rate: str) -> str:
    """The reference of the experiment of that learning rate."""
    listing = swept.run("git", "for-each-ref", "--format=%(refname)", "refs/exps")
    (name,) = [ref for ref in listing.split() if f"learning_rate={rate}-" in ref]
    return name


def score(swept: Workspace, rate: str) -> float:
    """What the experiment of that learning rate recorded."""
    found = swept.run("git", "show", f"{experiment(swept, rate)}:reports/metrics/tuned.json")
    value: float = json.loads(found)["exact_match"]
    return value


def test_the_trainings_alone_differ_by_the_learning_rate(
    page: "Page", address: str, images: Path
) -> None:
    from playwright.sync_api import expect

    compare(page, address)
    # MLflow chooses what differs for the parallel coordinates.
    expect(page.get_by_text("trainer.learning_rate", exact=True).first).to_be_visible()
    plot = page.locator(".js-plotly-plot").first
    plot.wait_for()
    drawn = plot.evaluate("plot => plot.data[0].dimensions.map(axis => [axis.label, axis.values])")
    assert sorted(dict(drawn)["trainer.learning_rate"]) == sorted(float(rate) for rate in RATES)
    page.wait_for_timeout(1000)  # it is drawn
    page.screenshot(path=images / "compare.png")


def test_the_address_that_a_sweep_prints_opens_its_parallel_coordinates(
    page: "Page", address: str, sweep: tuple[Workspace, str], images: Path
) -> None:
    found = re.search(r"the trials in MLflow: (http://127\.0\.0\.1:5000\S+)", sweep[1])
    assert found, sweep[1]
    page.goto(found[1].replace("http://127.0.0.1:5000", address.partition("/#")[0]))
    page.get_by_text("Parallel Coordinates").first.wait_for()
    page.get_by_text("2 matching runs").wait_for()
    for metric in ("train.validation_loss", "train/loss"):
        page.get_by_text(metric, exact=True).filter(visible=True).first.wait_for()
    page.wait_for_timeout(2000)  # it is drawn
    page.screenshot(path=images / "sweep.png")


def answer(swept: Workspace, rate: str) -> str:
    """The tuned model's first completion in that trial's table of samples."""
    client = existing(swept.root)
    (run,) = client.search_runs(["1"], f"attributes.run_name LIKE '%learning_rate={rate}-%'")
    table = json.loads(Path(client.download_artifacts(run.id, "samples.json")).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return next(str(row["completion"]) for row in rows if row["model"] == "tuned")


def test_a_run_shows_its_samples_as_a_table_and_its_loss_as_a_curve(
    page: "Page", address: str, swept: Workspace, images: Path
) -> None:
    from playwright.sync_api import expect

    page.goto(address)
    page.get_by_role("link", name=f"learning_rate={RATES[1]}-").click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("samples.json", exact=True).click()
    page.get_by_text("View as table").wait_for()
    for column in ("prompt", "model", "completion", "reference"):
        expect(page.get_by_role("columnheader", name=column).first).to_be_in_viewport()
    expect(page.get_by_role("cell", name=answer(swept, RATES[1])).first).to_be_in_viewport()
    page.screenshot(path=images / "samples.png")

    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("train/loss")
    plot = page.locator(".js-plotly-plot")
    expect(plot).to_have_count(1)  # the others are filtered out
    plot.locator("path.js-line").first.wait_for()
    losses = plot.evaluate("plot => plot.data[0].y")
    assert len(losses) >= 10
    assert losses[-1] < losses[0]
    page.screenshot(path=images / "curve.png")
