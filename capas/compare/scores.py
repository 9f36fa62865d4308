"""Compare two results by their answers to the same test records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from capas.compare.sides import Predictions, Row, Side
from capas.evaluation.comparison import paired_difference, records_needed, verdict
from capas.evaluation.names import BINARY, BUILT_IN, LABEL_SCORES, LOG_LOSS
from capas.report.intervals import wilson_interval

LOSS = "loss"
# keys of `dataset`: if one differs, the records differ
_SOURCE = ("path", "name", "data_files", "split")
Verdict = Literal["better", "worse", "no difference seen"]
Test = Literal["same", "shared", "other", "unknown"]  # the test records of two results


@dataclass(frozen=True)
class Settings:
    """The values of `evaluation.*` on which intervals depend."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> "Settings":
        """Return the settings of a result, with defaults for those that it did not record."""
        return cls(
            float(texts.get("evaluation.confidence_fraction", cls.confidence)),
            int(texts.get("evaluation.bootstrap_resamples", cls.resamples)),
            int(texts.get("evaluation.seed", cls.seed)),
        )


class Score(NamedTuple):
    """A mean over the test records, with its interval if that is known."""

    value: float
    low: float | None = None
    high: float | None = None
    num_records: int | None = None


class Difference(NamedTuple):
    """The difference of B over A on the same records, with its paired interval.

    Attributes:
        num_needed: how many records would show the difference; None if unknown.
    """

    before: float
    after: float
    mean: float
    low: float
    high: float
    verdict: Verdict
    num_records: int
    num_needed: int | None


@dataclass(frozen=True)
class Compared:
    """B compared with A.

    Attributes:
        metric: the headline of B, or else another metric that both were scored by, or else the loss.
        pairs: the rows of A and B for each test record that both answered, in the order of B.
    """

    metric: str
    is_share: bool
    test: Test
    num_tests: tuple[int | None, int | None]
    scores: dict[str, tuple[Score | None, Score | None]]
    difference: Difference | None
    loss: Difference | None
    same_tokens: bool | None
    pairs: list[tuple[Row, Row]] = field(repr=False, default_factory=list)
    confidence: float = 0.95

    @property
    def higher_is_better(self) -> bool:
        return self.metric != LOSS

    def changed(self) -> tuple[list[tuple[Row, Row]], list[tuple[Row, Row]]]:
        """Return the pairs in which B scores better than A, and those in which it scores worse."""
        if any(self.metric not in row for pair in self.pairs[:1] for row in pair):
            return [], []
        name, sign = self.metric, 1 if self.higher_is_better else -1
        gains = [(sign * (float(b[name]) - float(a[name])), (a, b)) for a, b in self.pairs]
        won = [pair for gain, pair in gains if gain > 0]
        return won, [pair for gain, pair in gains if gain < 0]


def compare(a: Side, b: Side) -> Compared:
    """Compare two results over the test records that both answered."""
    settings = Settings.of(b.texts)
    names = common_metrics(a, b)
    metric = names[0]
    one, other = a.predictions, b.predictions
    pairs = _pairs(one, other, _same_prompts(a, b)) if one and other else []
    scores: dict[str, tuple[Score | None, Score | None]] = {
        name: (score(a, name, settings), score(b, name, settings)) for name in names
    }
    shares = all(is_share(side, metric) for side in (a, b))
    same_tokens = _same_tokens(pairs)
    return Compared(
        metric=metric,
        is_share=shares,
        test=_tests(a, b, pairs),
        num_tests=(_num_records(a), _num_records(b)),
        scores=scores,
        difference=_difference(pairs, metric, settings),
        loss=_difference(pairs, LOSS, settings) if same_tokens else None,
        same_tokens=same_tokens,
        pairs=pairs,
        confidence=settings.confidence,
    )


def headline(side: Side) -> str:
    """Return the name of the main metric of a result."""
    found = side.predictions.metrics if side.predictions else side.metrics_named
    return found[0] if found else LOSS


def common_metrics(a: Side, b: Side) -> list[str]:
    """Return the metrics that both were scored by, in the order of B, the loss last."""
    one, other = ([*_names(side), *_label_scores(side), LOSS] for side in (a, b))
    return [name for name in other if name in one]


def score(side: Side, name: str, settings: Settings) -> Score | None:
    """Return the mean of a metric with its interval; the loss has none.

    The interval is Wilson's if each answer is either right or wrong, and bootstrapped otherwise.
    """
    found = side.predictions
    summarized = name in LABEL_SCORES or (name == LOSS and found and not found.has_tokens)
    if found is None or not found.rows or summarized:
        value = side.metrics.get(name)
        return None if value is None else Score(float(value))
    if name not in found.rows[0]:
        return None
    values = [float(row[name]) for row in found.rows]
    if name == LOSS:
        weights = [float(row["num_supervised_tokens"]) for row in found.rows]
        value = _weighted(values, weights)
        return Score(value, num_records=len(values))
    mean = math.fsum(values) / len(values)
    if name in BINARY:
        low, high = wilson_interval(math.fsum(values), len(values), settings.confidence)
        return Score(mean, low, high, len(values))
    found_interval = _bootstrap([0.0] * len(values), values, [1.0] * len(values), settings)
    return Score(mean, found_interval["low"], found_interval["high"], len(values))


def is_share(side: Side, name: str) -> bool:
    """Return whether a metric's scores lie between 0 and 1, so that it can be shown as a percentage."""
    if name in (LOSS, LOG_LOSS):
        return False
    if name in LABEL_SCORES:
        return True
    if side.predictions is None:
        return name in BUILT_IN
    return all(0 <= row[name] <= 1 for row in side.predictions.rows)


def _names(side: Side) -> list[str]:
    return side.predictions.metrics if side.predictions else side.metrics_named


def _label_scores(side: Side) -> list[str]:
    """Return the scores of labels that a result has; they are not recorded for each test record."""
    return [name for name in LABEL_SCORES if side.metrics.get(name) is not None]


def _num_records(side: Side) -> int | None:
    if side.predictions:
        return len(side.predictions.rows)
    known = side.metrics.get("num_records")
    return None if known is None else int(known)


def _same_prompts(a: Side, b: Side) -> bool | None:
    """Return whether a record's prompt is the same text in both results; None if that is not certain.

    For records of the same data set it is None too: their ids alone identify them.
    """
    if a.outputs.digest("data/raw") and a.outputs.digest("data/raw") == b.outputs.digest(
        "data/raw"
    ):
        return None
    template = "data/composed/chat_template.jinja"
    same = a.outputs.digest(template) == b.outputs.digest(template)
    return same or None


def _pairs(
    one: Predictions, other: Predictions, same_prompts: bool | None
) -> list[tuple[Row, Row]]:
    """Return the rows that both have: equal in id and reference, and in prompt if `same_prompts`."""
    names = ("id", "reference", "prompt") if same_prompts else ("id", "reference")
    known = {tuple(row[name] for name in names): row for row in one.rows}
    found = ((known.get(tuple(row[name] for name in names)), row) for row in other.rows)
    return [(before, after) for before, after in found if before is not None]


def _tests(a: Side, b: Side, pairs: Sequence[tuple[Row, Row]]) -> Test:
    one, other = a.predictions, b.predictions
    if one and other:
        if not pairs:
            return "other"
        return "same" if len(pairs) == len(one.rows) == len(other.rows) else "shared"
    raw = [side.outputs.digest("data/raw/test.parquet") for side in (a, b)]
    if None in raw:
        raw = [side.outputs.digest("data/raw") for side in (a, b)]
    limits = {side.texts.get("evaluation.max_records") for side in (a, b)}
    if raw[0] and raw[0] == raw[1]:
        return "same" if len(limits) == 1 else "shared"
    sources = [{k: side.texts.get(f"dataset.{k}") for k in _SOURCE} for side in (a, b)]
    known = all("dataset.path" in side.texts for side in (a, b))
    return "other" if known and sources[0] != sources[1] else "unknown"


def _same_tokens(pairs: Sequence[tuple[Row, Row]]) -> bool | None:
    """Return whether the losses are means over the same tokens; None if that is not known."""
    if not pairs or any("num_supervised_tokens" not in row for pair in pairs for row in pair):
        return None
    return all(a["num_supervised_tokens"] == b["num_supervised_tokens"] for a, b in pairs)


def _difference(
    pairs: Sequence[tuple[Row, Row]], name: str, settings: Settings
) -> Difference | None:
    if not pairs or any(name not in row for row in pairs[0]):
        return None
    if name == LOSS and _same_tokens(pairs) is not True:
        return None
    before = [float(a[name]) for a, _ in pairs]
    after = [float(b[name]) for _, b in pairs]
    weights = [float(b["num_supervised_tokens"]) if name == LOSS else 1.0 for _, b in pairs]
    interval = _bootstrap(before, after, weights, settings)
    needed = records_needed(before, after, weights, confidence_fraction=settings.confidence)
    outcome: Any = verdict(interval, higher_is_better=name != LOSS)
    return Difference(
        before=_weighted(before, weights),
        after=_weighted(after, weights),
        mean=interval["mean"],
        low=interval["low"],
        high=interval["high"],
        verdict=outcome,
        num_records=len(pairs),
        num_needed=needed,
    )


def _bootstrap(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float], settings: Settings
) -> dict[str, float]:
    return paired_difference(
        before,
        after,
        weights,
        resamples=settings.resamples,
        confidence_fraction=settings.confidence,
        seed=settings.seed,
    )


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    pairs = zip(values, weights, strict=True)
    return math.fsum(value * weight for value, weight in pairs) / math.fsum(weights)
