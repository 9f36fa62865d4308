"""Plots as SVG: unique ids, the page's colours, and a DAG that shows what dvc.yaml says."""

import re
from pathlib import Path

import pytest

from capas.core.dag import StageSpec, read_yaml
from capas.report import pipeline, plots
from capas.report.figure import COLOURS, to_svg

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def specs() -> dict[str, StageSpec]:
    stages = read_yaml(REPOSITORY / "dvc.yaml")["stages"]
    return {name: StageSpec.read(name, REPOSITORY) for name in stages}


def test_links_leave_out_what_a_longer_way_implies(specs: dict[str, StageSpec]) -> None:
    links = pipeline.edges(specs)
    assert ("compose", "fetch") in links
    assert ("compose", "train") not in links  # compose -> fetch -> ... -> train
    assert ("quantize", "train") in links
    assert ("report", "publish") in links


def test_every_stage_stands_below_what_it_needs(specs: dict[str, StageSpec]) -> None:
    links = pipeline.edges(specs)
    places = pipeline.positions(list(specs), links)
    assert len(set(places.values())) == len(specs)
    assert all(places[user][1] < places[maker][1] for maker, user in links)


def test_the_drawing_names_and_links_every_stage(specs: dict[str, StageSpec]) -> None:
    svg = to_svg(pipeline.draw(specs), "dag", 'the "DAG"')
    assert set(re.findall(r'href="#to-stage-(\w+)"', svg)) == set(specs)
    assert 'aria-label="the &quot;DAG&quot;"' in svg


def test_a_figure_takes_its_colours_from_the_page() -> None:
    rows = [{"label": "<all>", "base": (0.1, 0.0, 0.2), "tuned": (0.9, 0.8, 1.0)}]
    svg = to_svg(plots.shares(rows, str, "%"), "shares", "shares")
    assert "var(--base)" in svg
    assert "&lt;all&gt;" in svg
    assert not any(placeholder in svg for placeholder in COLOURS)
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_two_figures_share_no_id() -> None:
    history = [{"step": s, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0} for s in (1, 2)]
    figures = [to_svg(plots.learning_rate(history, str, str), name, "") for name in ("a", "b")]
    first, second = (set(re.findall(r'\bid="([^"]+)"', figure)) for figure in figures)
    assert first and not first & second
    assert all(f'"{link}"' in figures[0] for link in re.findall(r"url\(#([^)]+)\)", figures[0]))


def test_a_token_that_looks_like_a_formula_is_drawn_as_it_is() -> None:
    rows = [
        {"setting": "unchanged", "model": "tuned", "token": t, "probability": 0.5}
        for t in ("$a_b$", "\n", "漢")
    ]
    svg = to_svg(plots.next_token(rows, str, "%"), "next", "")
    assert all(f">{text}<" in svg for text in ("$a_b$", "↵", "漢"))
