"""Write reports/sweep.html and reports/sweep.es.html: what a sweep found, in words, tables and plots.

The page needs no network and no script, and git ignores it. Its input is plain rows: see `Result`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from capas.core.files import write_whole
from capas.core.language import Language, Numbers
from capas.report import findings
from capas.report.tables import label_cells
from capas.sweep import advice, costs
from capas.sweep.crosstable import CrossTable
from capas.sweep.display import adoption
from capas.sweep.effects import compared_keys, effects, number_of
from capas.sweep.names import short_keys
from capas.sweep.parallel import clipped, parallel, short_number
from capas.sweep.ranking import Row, columns, comparison, num_looked_at, replicate_key
from capas.sweep.remarks import Swept, halved
from capas.sweep.rungs import metric_of
from capas.sweep.state import CACHED, State
from capas.sweep.verdict import verdict
from capas.sweep.wording import TEXTS, rounded

PAGES = {"en": "reports/sweep.html", "es": "reports/sweep.es.html"}
TEMPLATE = "sweep.html.jinja"
NUM_ROWS = 20  # of the ranking, before the rest is folded
_TITLE_KEYS, _TITLE_LETTERS = 3, 40
History = Sequence[Mapping[str, Any]]  # rows of reports/history.csv


@dataclass(frozen=True)
class Result:
    """The result of a sweep: all that its page shows.

    Attributes:
        rows: the ranking, best first.
        settings: the group `sweep`.
        swept: the values of each key that has several, as given.
        words: the user's overrides.
        dropped: the settings that successive halving dropped, the furthest first.
        failed: the trials that failed.
        searches: whether a search chose the trials.
        known_costs: of each experiment, by the names of `costs.MEASURES`.
        lessons: by language, what the learning rates show.
        curves: the training loss of each learning rate, lowest first.
        crossed: models asked in each other's chat template.
        address: the page in MLflow, with a note behind it.
    """

    rows: Sequence[Row]
    settings: dict[str, Any]
    swept: Swept = field(default_factory=dict)
    words: Sequence[str] = ()
    dropped: Sequence[Row] = ()
    failed: Sequence[State] = ()
    searches: bool = False
    known_costs: dict[str, dict[str, float]] = field(default_factory=dict)
    lessons: Mapping[str, Sequence[str]] = field(default_factory=dict)
    curves: Mapping[str, History] = field(default_factory=dict)
    crossed: CrossTable | None = None
    address: str = ""


def render(result: Result) -> dict[str, str]:
    """Return {language: HTML}."""
    facts = gather(result)
    return {code: _render(result, facts, code) for code in PAGES}


def write(folder: Path, pages: Mapping[str, str]) -> list[str]:
    """Write the pages into a folder, and return their names."""
    folder.mkdir(exist_ok=True)
    names = {code: Path(path).name for code, path in PAGES.items()}
    for code, html in pages.items():
        write_whole(folder / names[code], html)
    return list(names.values())


def gather(result: Result) -> dict[str, Any]:
    """Return the facts that do not depend on the language, under the names that the texts use."""
    rows, settings = result.rows, result.settings
    states = [state for row in (*rows, *result.dropped) for state in row.states]
    found, maximize = comparison(rows, settings), settings["direction"] == "maximize"
    keys = compared_keys([*rows, *result.dropped], result.swept, settings)
    ran = [state for state in (*states, *result.failed) if state.status != CACHED]
    cost = costs.compare(rows, result.known_costs)
    return {
        "is_compared": found is not None and found.num_seeds > 1,
        **{"rows": rows, "found": found, "maximize": maximize, "keys": keys, "cost": cost},
        **{"failed": result.failed, "dropped": result.dropped, "rung_metric": metric_of(settings)},
        **{"curves": result.curves, "searches": result.searches},
        **{"objective": settings["objective"], "confidence": settings["confidence_fraction"]},
        "replicate": replicate_key(settings),
        "headings": short_keys(keys),
        "columns": columns(rows, settings),
        "has_intervals": any(row.margin is not None for row in rows),
        "command": advice.command(result.words),
        "num_trials": len(states) + len(result.failed),
        "num_cached": sum(state.status == CACHED for state in states),
        "seconds": sum(state.seconds for state in ran),
        "effects": effects(rows, result.swept, settings),
        "best": _best(cost, rows, maximize),
        "num_rows": NUM_ROWS,
        "num_looked_at": num_looked_at(rows),
    }


def _best(cost: costs.Costs | None, rows: Sequence[Row], maximize: bool) -> list[int]:
    """Return the places of the rows that none beats in both cost and score, cheapest first."""
    signed = [row.mean if maximize else -row.mean for row in rows]
    return costs.pareto(cost.of_rows, signed) if cost else []


def _render(result: Result, facts: Mapping[str, Any], code: str) -> str:
    shown, (address, _, note) = _number(Numbers(code)), result.address.partition(" ")
    own = {
        "shown": shown,
        "amount": amounts(Numbers(code)),
        "given": lambda text: _given(text, shown),
        "verdict": verdict(result.rows, result.settings, code),
        "adoption": adoption(result.rows, code),
        "halved": halved(result.rows, result.dropped, code),
        "steps": advice.next_steps(
            *(result.rows, result.settings, result.swept, result.words, result.searches, code)
        ),
        "lesson": result.lessons.get(code, ()),
        "crossed": result.crossed and _crossed(result.crossed, code),
        "address": address if address.startswith(("http://", "https://")) else "",
        "is_served": bool(note.strip()),
        "marks": [_mark(row, result.rows, facts["is_compared"]) for row in result.rows],
        "title_keys": _title(facts["headings"].values()),
        "lines": parallel(
            *(result.rows, facts["keys"], facts["objective"], facts["maximize"], shown)
        ),
    }
    texts = Language(TEXTS, code, {**facts, **own})
    style = (Path(findings.__file__).parent / "style.css").read_text(encoding="utf-8")
    return label_cells(
        texts.render(TEMPLATE, style=style, figures=_figures(facts, texts), pages=PAGES)
    )


def _number(numbers: Numbers) -> Callable[[float | None], str]:
    """Return how numbers are written: four digits, in the page's language."""
    return lambda value: "–" if value is None else numbers.general(rounded(value, 4))


def amounts(numbers: Numbers) -> Callable[[float], str]:
    """Return how costs are written: counts of thousands whole, with their separators."""
    return lambda value: numbers.num(value) if value >= 1000 else numbers.general(rounded(value, 4))


def _given(text: str, number: Callable[[float | None], str]) -> str:
    """Return a value as given; a number of many digits, as a search tries, is rounded."""
    return text if number_of(text) is None else short_number(text, number)


def _title(keys: Any) -> list[str]:
    """Return the keys of a title, at most a few."""
    short = [clipped(key, _TITLE_LETTERS) for key in keys]
    return short if len(short) <= _TITLE_KEYS else [*short[:_TITLE_KEYS], "…"]


def _mark(row: Row, rows: Sequence[Row], is_compared: bool) -> str:
    """Return what is known of a row: missing, tied, first or worse; without seeds only which is first."""
    if row.missing:
        return "missing"
    if row.tied or (row is rows[0] and any(other.tied for other in rows)):
        return "tied"
    if row is rows[0]:
        return "" if len(rows) < 2 else "first" if is_compared else "seen"
    return "worse" if is_compared else ""


def _crossed(table: CrossTable, code: str) -> dict[str, Any]:
    (head, *rest), (first, *rows) = table.sentences(code), table.rows(code)
    return {"head": head, "heading": first, "rows": rows, "sentences": rest}


def _figures(facts: Mapping[str, Any], texts: Language) -> dict[str, Markup]:
    """Return {name: SVG}: a response to each key, costs and losses, as far as there are numbers."""
    from capas.report.figure import to_svg  # matplotlib takes a second
    from capas.sweep import charts

    def words(key: str) -> str:
        return texts.say(f"page.{key}").unescape()

    number, objective = texts.numbers.general, facts["objective"]
    drawn: dict[str, tuple[Any, str]] = {}
    for place, effect in enumerate(facts["effects"]):
        about = texts.say("page.about_response", name=effect.key).unescape()
        drawn[f"response-{place}"] = charts.response(effect, objective, number), about
    if facts["cost"]:
        scores = [row.mean for row in facts["rows"]]
        figure = charts.costs_and_scores(
            facts["cost"], scores, facts["best"], objective, words, amounts(texts.numbers)
        )
        drawn["cost"] = figure, words("about_cost")
    if facts["curves"]:
        drawn["losses"] = charts.losses(facts["curves"], words, number), words("about_losses")
    return {name: Markup(to_svg(*(svg, name, about))) for name, (svg, about) in drawn.items()}
