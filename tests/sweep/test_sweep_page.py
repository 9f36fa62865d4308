"""The page of a sweep: its numbers, tables and drawings of planted trials; no text of the user runs."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from planted_sweeps import HOSTILE, LOSS, RATE, SCORE, SETTINGS, hostile, result, seeded, trial
from sweeping import plan_in

from capas.core.dag import recorded_key
from capas.core.params import flatten
from capas.sweep import advice, costs, page, point
from capas.sweep.comparison import compare, seeds_to_show
from capas.sweep.effects import NUM_BINS, Effect, effects, is_logarithmic
from capas.sweep.page import PAGES, Result, render
from capas.sweep.parallel import MARGIN, WIDTH, clipped, parallel, thinned
from capas.sweep.ranking import dropped_rows, scores
from capas.sweep.state import CACHED, DROPPED, State
from capas.sweep.verdict import verdict
from capas.sweep.wording import TEXTS


class Page(HTMLParser):
    """A page as a browser reads it: texts by the id of the element, addresses, and elements that run code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        loads = {"src", "href", "xlink:href", "data", "action", "srcset", "poster"}
        self.addresses += [value or "" for name, value in attrs if name in loads]
        self._open.append((tag, dict(attrs).get("id") or ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass  # an element without an end, such as <meta>

    def handle_data(self, data: str) -> None:
        if any(tag in ("td", "th") for tag, _ in self._open):
            self.rows[-1][-1] += data
        for name in (name for _, name in self._open if name):
            self.texts[name] = self.texts.get(name, "") + data


# 2 x 2 settings, two seeds each: r=16 is 0.2 better, and the rate 0.01 is 0.4 better, whatever the other is.
GRID = {
    f"{RATE}=0.001 lora.r=8": (0.9, 1.1),
    f"{RATE}=0.001 lora.r=16": (0.7, 0.9),
    f"{RATE}=0.01 lora.r=8": (0.5, 0.7),
    f"{RATE}=0.01 lora.r=16": (0.3, 0.5),
}
SWEPT = {RATE: ("0.001", "0.01"), "lora.r": ("8", "16"), "seed": ("1", "2")}
WORDS = (f"{RATE}=0.001,0.01", "lora.r=8,16", "seed=1,2")


@pytest.fixture(scope="module")
def grid() -> Result:
    found = result(*seeded(GRID), swept=SWEPT, words=WORDS, defaults=(f"{RATE}=0.001", "lora.r=8"))
    known = {
        state.name: {"num_steps": 100.0 * int(row.value("lora.r"))}
        for row in found.rows
        for state in row.states
    }
    return replace(
        found, known_costs=known, address="http://h:5000/#/e?a=1&b=2   (served by `make ui`)"
    )


@pytest.fixture(scope="module")
def pages(grid: Result) -> dict[str, str]:
    return render(grid)


def test_the_ranking_has_the_planted_numbers(pages: dict[str, str]) -> None:
    heading, first, *_, last = Page(pages["en"]).rows[:5]
    assert heading == ["place", LOSS, "n", SCORE, "learning_rate", "r", "experiment"]
    # The mean of 0.3 and 0.5; 12.71 standard errors of 0.1 on one degree of freedom.
    assert first[1:6] == ["0.4 ± 1.271", "2", "0.25", "0.01", "16"]
    assert first[0].startswith("1") and "shown to be the best" in first[0]
    assert last[1].startswith("1 ±") and "shown to be worse" in last[0] and "conf/" in last[0]
    assert Page(pages["es"]).rows[1][1] == "0,4 ± 1,271"


def test_the_verdict_is_that_of_the_terminal(grid: Result, pages: dict[str, str]) -> None:
    for code, words in (
        ("en", "is better than the default by 0.6"),
        ("es", "mejora a la de conf/ en 0,6"),
    ):
        said = verdict(grid.rows, grid.settings, code)
        assert words in said
        assert Page(pages[code]).texts["verdict"].strip() == said
    assert verdict(grid.rows, grid.settings) == verdict(grid.rows, grid.settings, "en")


def test_the_page_says_what_to_do_and_what_it_cost(pages: dict[str, str]) -> None:
    shown = Page(pages["en"])
    assert shown.texts["adopt"].split("   #")[0] == f"dvc exp apply {RATE}=0.01-lora.r=16-seed=1"
    assert "80 s" in pages["en"]  # eight trials of ten seconds
    assert f"python stages/sweep.py -m {RATE}=0.001,0.01 lora.r=8,16 seed=1,2" in pages["en"]
    assert shown.texts["mlflow"].startswith("The trials in MLflow")
    assert 'href="http://h:5000/#/e?a=1&amp;b=2"' in pages["en"]
    assert f"{RATE}=0.01 is the largest value tried" in pages["en"]


def test_a_mean_over_the_others_has_the_noise_of_the_seeds(grid: Result) -> None:
    noisy = {words: (a, b + 0.01 * i) for i, (words, (a, b)) in enumerate(GRID.items())}
    found = result(*seeded(noisy), swept=SWEPT)
    rate, rank_ = effects(found.rows, SWEPT, found.settings)
    assert [rate.key, rank_.key] == [RATE, "lora.r"]
    assert [level.text for level in rank_.levels] == ["8", "16"]
    assert [level.num_rows for level in rate.levels] == [2, 2] and rate.is_balanced
    # Of r=8: the means 1.0 and 0.61. The variance of a trial, with three degrees of freedom, is half of that
    # of the differences between the seeds.
    differences = [0.2, 0.21, 0.22, 0.23]
    mean = sum(differences) / 4
    variance = sum((d - mean) ** 2 for d in differences) / 3 / 2
    low = rank_.levels[0]
    assert low.mean == pytest.approx((1.0 + 0.61) / 2)
    assert low.margin == pytest.approx(3.1824 * math.sqrt(variance / 2 / 2), rel=1e-4)
    assert len(rate.points) == 8 and min(y for _, y in rate.points) == 0.3


def test_without_seeds_there_are_means_and_no_intervals() -> None:
    states = [trial(1.0, "lora.r=4"), trial(0.5, "lora.r=8"), trial(0.25, "lora.r=16")]
    (effect,) = effects(result(*states).rows, {"lora.r": ()}, SETTINGS)
    assert [(level.mean, level.margin) for level in effect.levels] == [
        *((1.0, None), (0.5, None), (0.25, None))
    ]
    assert effect.is_number and effect.is_log


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([4, 8, 16], True), ([1, 2, 3], False), ([1e-4, 1e-3], True), ([8, 16], False),
     ([0.0, 0.1, 1.0], False), ([5], False), ([4e-5, 4e-3, 0.1], True), ([], False)],
)  # fmt: skip
def test_an_axis_is_logarithmic_where_the_values_are(numbers: list[float], expected: bool) -> None:
    assert is_logarithmic(numbers) is expected


def only_effect(*texts: str) -> Effect:
    states = [trial(0.1 * place, f"x.y={text}") for place, text in enumerate(texts, 1)]
    return effects(result(*states).rows, {"x.y": texts}, SETTINGS)[0]


def test_what_is_no_number_is_a_category_in_the_order_of_the_scores() -> None:
    effect = only_effect("null", "8", "[q_proj,v_proj]")
    assert not effect.is_number
    assert effect.categories == ("null", "8", "[q_proj,v_proj]")
    assert [(level.position, level.mean) for level in effect.levels] == [
        *((0, pytest.approx(0.1)), (1, pytest.approx(0.2)), (2, pytest.approx(0.3)))
    ]
    many = only_effect(*(f"name_{i}" for i in range(40)))
    assert len(many.categories) == 30 and many.num_left_out == 10


def test_the_values_of_a_search_are_put_into_bins() -> None:
    effect = only_effect(*(f"{i / 100:.3f}" for i in range(1, 21)))
    assert effect.is_binned and [level.num_rows for level in effect.levels] == [4] * NUM_BINS
    assert effect.levels[0].text == "0.010 – 0.040"
    assert effect.levels[0].position == pytest.approx(0.025)
    assert effect.levels[0].mean == pytest.approx(0.25)


def test_a_drawing_has_the_planted_points(pages: dict[str, str]) -> None:
    """Of the rank: eight faint points, and two means, of which that of r=16 is lower on the page's axis."""
    svg = pages["en"].split('id="response-1-figure_1"')[1].split("</svg>")[0]
    faint, bold = (drawn(svg, f"response-1-{name}") for name in ("trials", "means"))
    assert len(faint) == 8 and len(bold) == 2
    (left, high), (right, low) = sorted(bold)
    assert right > left and low > high  # a better loss is lower, and SVG counts downwards
    # Between the means lie 0.2 of the 0.8 from the best trial to the worst one.
    ys = [y for _, y in faint]
    assert (low - high) / (max(ys) - min(ys)) == pytest.approx(0.2 / 0.8, abs=1e-3)
    assert ">16</text>" in svg and f">{LOSS}</text>" in svg


def drawn(svg: str, group: str) -> list[tuple[float, float]]:
    part = svg.split(f'id="{group}"')[1].split("\n   </g>")[0]
    return [
        (float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', part)
    ]


def test_a_line_runs_through_the_values_of_its_trial(grid: Result, pages: dict[str, str]) -> None:
    found = parallel(grid.rows, [RATE, "lora.r"], LOSS, False, "{:g}".format)
    assert found is not None and len(found.lines) == 8
    left, right = MARGIN, WIDTH - MARGIN
    best = max(found.lines, key=lambda line: line.share)
    assert best.share == 1 and best.is_first
    assert best.points == f"{right:.1f},30 {right:.1f},100 {left:.1f},170"
    assert best.title == f"{RATE}=0.01, lora.r=16, seed=1, {LOSS} 0.3"
    worst = min(found.lines, key=lambda line: line.share)
    assert (worst.share, worst.points) == (0, f"{left:.1f},30 {left:.1f},100 {right:.1f},170")
    assert [axis.title for axis in found.axes] == [RATE, "lora.r", LOSS]
    assert [text for _, _, text in found.axes[2].ticks] == ["0.3", "0.7", "1.1"]
    assert f'points="{best.points}"><title>{best.title}</title>' in pages["en"]
    assert parallel(grid.rows[:1], [RATE], LOSS, False, str) is None


def test_texts_of_ticks_do_not_touch_each_other() -> None:
    kept = thinned([(MARGIN + 4 * i, f"name_{i}") for i in range(101)])
    assert (kept[0][2], kept[-1][2]) == ("name_0", "name_100")
    gaps = [b[1] - a[1] for a, b in pairwise(kept)]
    assert 3 < len(kept) < 12 and min(gaps) > 6 * 6.6
    assert clipped("data/own/a/long/path/records.jsonl", 18) == "data/own…rds.jsonl"
    assert (
        len(clipped("x" * 99, 18)) == 18 and clipped("a\n b", 18) == "a b" and clipped("", 9) == "–"
    )


def test_the_settings_that_none_beats_are_marked(grid: Result, pages: dict[str, str]) -> None:
    assert costs.pareto([1, 2, 3, 3], [0.5, 0.4, 0.9, 0.9]) == [0, 2, 3]
    assert costs.pareto([2, 1], [0.5, 0.5]) == [1]
    shown = [row for row in Page(pages["en"]).rows if row[:1] == ["training steps"]]
    place = Page(pages["en"]).rows.index(shown[0])
    assert [row[0] for row in Page(pages["en"]).rows[place + 1 :]] == ["800", "1,600"]
    assert [row[2:] for row in Page(pages["en"]).rows[place + 1 :]] == [
        ["0.01", "8"],
        ["0.01", "16"],
    ]
    svg = pages["en"].split('id="cost-figure_1"')[1].split("</svg>")[0]
    assert len(drawn(svg, "cost-settings")) == 4 and len(drawn(svg, "cost-pareto")) == 2


def test_costs_are_seconds_where_all_are_known() -> None:
    rows = result(trial(1.0, "r=1"), trial(2.0, "r=2")).rows
    steps = {"r=1": {"num_steps": 10.0}, "r=2": {"num_steps": 20.0}}
    found = costs.compare(
        rows, {k: {**v, "train_seconds": 3.0 + v["num_steps"]} for k, v in steps.items()}
    )
    assert found == costs.Costs("train_seconds", (13.0, 23.0))
    partly = {**steps, "r=1": {"train_seconds": 3.0, "num_steps": 10.0}}
    assert costs.compare(rows, partly) == costs.Costs("num_steps", (10.0, 20.0))
    assert costs.compare(rows, {name: {"num_steps": 10.0} for name in steps}) is None
    assert costs.compare(rows, {}) is None


def test_the_next_steps_come_with_their_commands() -> None:
    near = {"lora.r=8": (1.0, 1.2, 1.1), "lora.r=16": (1.1, 1.1, 1.15)}
    states = [*seeded(near), trial(0.5, "lora.r=4", "seed=2")]
    found = result(*states, defaults=("lora.r=8",), swept={"lora.r": ("4", "8", "16")})
    steps = advice.next_steps(
        found.rows, found.settings, found.swept, ["lora.r=4,8,16"], False, "en"
    )
    assert (
        steps[0].text == "lora.r=4-seed=2 lacks seed=1, seed=3, so it is compared with none. "
        "Run the missing trials:"
    )
    assert steps[0].command == "python stages/sweep.py -m lora.r=4 seed=1,3"
    assert steps[1].text.startswith("With 3 seeds a gain over the default of 0.")
    single = result(trial(1.0, "lora.r=8"), trial(2.0, "lora.r=16"))
    (repeat,) = advice.next_steps(single.rows, SETTINGS, {}, ["lora.r=8,16"], False, "en")
    assert repeat.command == "python stages/sweep.py -m lora.r=8,16 seed=1,2,3"
    (repeat,) = advice.next_steps(single.rows, SETTINGS, {}, ["sweep=optuna"], True, "en")
    assert repeat.command == "python stages/sweep.py -m lora.r=8 seed=1,2,3"


def test_more_seeds_show_a_smaller_gain() -> None:
    """With so many seeds a sweep shows that gain, and not with one less."""
    values = scores(result(*seeded({"r=1": (1.0, 1.2, 1.1), "r=2": (1.1, 1.1, 1.3)})).rows)
    found = compare(-values, 0)
    assert found.detectable is not None
    assert seeds_to_show(found.detectable * 1.0001, found) == 3
    assert seeds_to_show(found.detectable * 0.999, found) == 4
    half = seeds_to_show(found.detectable / 2, found)
    assert half is not None and 4 < half < 12
    assert seeds_to_show(found.detectable / 1000, found) is None
    assert seeds_to_show(1.0, compare(-values)) is None


def test_no_text_of_the_user_runs_and_nothing_is_loaded(pages: dict[str, str]) -> None:
    for html in (*render(hostile()).values(), *pages.values()):
        shown = Page(html)
        assert "script" not in shown.tags and shown.handlers == []
        assert not {"link", "iframe", "img", "object", "image", "base", "form"} & set(shown.tags)
        own = [address for address in shown.addresses if not address.startswith(("#", "sweep."))]
        assert all(address.startswith("http://h:5000/") for address in own)
        assert "url(http" not in html and "@import" not in html and "javascript:" not in html
        assert "<script" not in html and ("{{ 7*7 }}" in html) is (html not in pages.values())


def test_failed_trials_are_listed_with_their_reason() -> None:
    html = render(hostile())["en"]
    text = Page(html).texts["failed"]
    assert "x.y=3" in text and f"train: {HOSTILE}\nlast line" in text
    assert "1 failed" in html


def test_the_headline_metric_is_the_one_whose_gain_the_evaluation_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def headline_of(**metrics: float | None) -> str:
        monkeypatch.setattr(point, "git", lambda *_, **__: json.dumps(metrics) if metrics else "")
        return point.headline(Path(), "refs/exps/x")

    gain = {"rougeL_gain": 0.1, "rougeL_gain_low": 0.0}
    assert headline_of(loss=1.0, exact_match=None, rougeL=0.5, **gain) == "tuned.rougeL"
    assert headline_of(loss=1.0, exact_match=None) == "tuned.loss"
    assert headline_of() == headline_of(score=1.0) == ""


def test_the_seconds_of_a_training_outlive_its_workspace(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    lock = {"stages": {"train": {"cmd": "x", "params": {"params.yaml": {"lora.r": 8}}}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    key = recorded_key(lock["stages"]["train"])
    (timing := tmp_path / "reports/timings/train.json").parent.mkdir(parents=True)
    timing.write_text(json.dumps({"key": "other", "seconds": 1.0}))
    costs.remember(plan, tmp_path)
    assert costs.recall(plan, key) is None  # of other inputs
    timing.write_text(json.dumps({"key": key, "seconds": 41.2}))
    costs.remember(plan, tmp_path)
    assert costs.recall(plan, key) == 41.2


def test_a_column_shows_the_headline_metric_of_the_trials() -> None:
    rows = result(trial(1.0, "r=1"), trial(2.0, "r=2")).rows
    assert page.columns(rows, SETTINGS) == [SCORE]
    assert page.columns(rows, {**SETTINGS, "columns": []}) == []
    assert page.columns(rows, {**SETTINGS, "columns": ["tuned.loss", "auto", SCORE]}) == [
        "tuned.loss",
        SCORE,
    ]
    assert page.columns(rows, {**SETTINGS, "objective": SCORE}) == []


@pytest.mark.parametrize(
    "states",
    [
        [trial(0.5, "lora.r=8")],
        [trial(0.5, f"seed={i}") for i in (1, 2, 3)],
        [trial(0.5, f"lora.r={i}", status=CACHED) for i in (1, 2)],
        [trial(0.5, "lora.r=8", "seed=1"), trial(0.4, "lora.r=16", "seed=2")],
    ],
    ids=["one trial", "only seeds", "all the same, found again", "none with all seeds"],
)
def test_a_small_sweep_has_a_page(states: list[State]) -> None:
    for html in render(result(*states)).values():
        assert Page(html).texts["verdict"].strip()
        assert "nan" not in html and "None" not in html and "Undefined" not in html


def keys_of(code: str) -> dict[str, Any]:
    return flatten(yaml.safe_load((TEXTS / f"{code}.yaml").read_text(encoding="utf-8")))


def test_both_languages_have_the_same_texts_with_the_same_facts() -> None:
    english, spanish = keys_of("en"), keys_of("es")
    assert english.keys() == spanish.keys() and len(english) > 80
    for key, text in english.items():
        if not key.startswith(("crossing", "learning_rate")):
            facts, others = (set(re.findall(r"\{\{ (\w+)", t)) for t in (text, spanish[key]))
            assert facts <= others, key


def test_every_text_of_the_page_is_used() -> None:
    sources = [*TEXTS.glob("*.py"), *TEXTS.glob("*.jinja")]
    used = "\n".join(file.read_text(encoding="utf-8") for file in sources)
    leaves = [key.rpartition(".")[2] for key in keys_of("en")]
    assert [leaf for leaf in leaves if leaf.removeprefix("mark_") not in used] == []


def test_the_page_is_written_beside_the_report(tmp_path: Path, pages: dict[str, str]) -> None:
    assert page.write(tmp_path / "reports", pages) == ["sweep.html", "sweep.es.html"]
    assert (tmp_path / PAGES["es"]).read_text(encoding="utf-8") == pages["es"]
    assert 'href="sweep.es.html"' in pages["en"] and 'lang="es"' in pages["es"]


def test_the_same_trials_give_the_same_bytes(grid: Result, pages: dict[str, str]) -> None:
    assert render(grid) == pages


def test_a_long_ranking_is_folded() -> None:
    states = [trial(0.1 + i, f"lora.r={i}") for i in range(1, 31)]
    html = render(result(*states))["en"]
    assert "10 more rows" in html and html.count("<tr class=") == 30


def test_settings_that_successive_halving_dropped_are_listed_with_their_step() -> None:
    found = result(*seeded({f"{RATE}=0.01": (0.4,)}), swept={RATE: ("0.01", "0.1", "0.2")})
    states = [
        State(rate, f"rate={rate}", [f"{RATE}={rate}"], status=DROPPED, step=step, num_steps=27,
              metrics={LOSS: loss})
        for rate, step, loss in (("0.1", 9, 0.75), ("0.2", 3, 1.5))
    ]  # fmt: skip
    dropped = dropped_rows(states, found.settings)
    for row in found.rows:
        row.num_dropped = len(dropped)  # as `rank` finds them
    pages = render(replace(found, dropped=dropped))
    shown = {code: Page(html) for code, html in pages.items()}
    assert ["9 / 27", "0.75", "0.1"] in shown["en"].rows and ["3 / 27", "1.5", "0.2"] in shown[
        "en"
    ].rows
    assert ["9 / 27", "0,75", "0.1"] in shown["es"].rows
    words = (
        "1 of 3 settings trained to the end. Dropped because others were better at the same step: "
    )
    assert shown["en"].texts["verdict"].startswith(words) and "halved" not in shown["en"].texts
    assert "1 en el paso 3 de 27, 1 en el paso 9 de 27" in shown["es"].texts["verdict"]
    assert "first of 3 settings" in pages["en"]
    # With two that ended there is a verdict on them, and the sentence stands beside the table.
    two = result(*seeded({f"{RATE}=0.01": (0.4,), f"{RATE}=0.02": (0.5,)}), swept=found.swept)
    beside = Page(render(replace(two, dropped=dropped_rows(states, two.settings)))["en"]).texts
    assert words.replace("1 of 3", "2 of 4") in beside["halved"]
    assert beside["verdict"].startswith("One trial each")
