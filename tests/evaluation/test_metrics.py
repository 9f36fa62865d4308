"""Metrics against values computed by hand."""

import json
import math
import random
from decimal import Decimal

import pytest
from rouge_score.rouge_scorer import RougeScorer

from capas.evaluation.comparison import paired_difference, perplexity, records_needed, verdict
from capas.evaluation.match_metrics import exact_match, json_fields, valid_json
from capas.evaluation.names import BINARY, BUILT_IN
from capas.evaluation.number_metric import final_number, last_number
from capas.evaluation.overlap_metrics import chrf, rouge
from capas.evaluation.scorer import RULES

CALL = '{"name": "set_timer", "arguments": {"minutes": 99}}'


@pytest.mark.parametrize(
    ("completion", "reference", "equal"),
    [
        (CALL, CALL, True),
        ('{"arguments":{"minutes":99},"name":"set_timer"}', CALL, True),
        ('{"name": "set_timer", "arguments": {"minutes": 98}}', CALL, False),
        ('{"name": "set_timer", "arguments": {"minutes": "99"}}', CALL, False),
        ('{"name": "set_timer", "arguments": {"minutes": 99}', CALL, False),
        (CALL + " Done.", CALL, False),
        ("Okay, 99 minutes.", CALL, False),
        ("", CALL, False),
        ("true", "1", False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        (" Okay. \n", "Okay.", True),
        ("okay.", "Okay.", False),
    ],
)
def test_exact_match(completion: str, reference: str, equal: bool) -> None:
    assert exact_match(completion, reference) is equal


@pytest.mark.parametrize(
    ("completion", "valid"),
    [
        (CALL, True),
        ("[]", True),
        (f" {CALL}\n", True),
        ("99", False),
        ('"timer"', False),
        ("{'a': 1}", False),
        ('{"a": NaN}', False),
        (CALL[:-1], False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_valid_json(completion: str, valid: bool) -> None:
    assert valid_json(completion) is valid


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        (CALL, CALL, 1.0),
        ('{"arguments":{"minutes":99},"name":"set_timer"}', CALL, 1.0),
        ('{"name": "set_timer", "arguments": {"minutes": 98}}', CALL, 0.5),
        ('{"name": "set_timer", "arguments": {"minutes": "99"}}', CALL, 0.5),
        ('{"name": "set_timer"}', CALL, 2 / 3),  # recall 1/2, precision 1
        ('{"name": "set_timer", "arguments": {"minutes": 99}, "a": 1, "b": 2}', CALL, 2 / 3),
        ('{"name": {"set_timer": 99}}', CALL, 0.0),
        ('{"a": [1, 2, 3]}', '{"a": [1, 2]}', 0.8),
        ('{"a": [2, 1]}', '{"a": [1, 2]}', 0.0),
        ('{"a": {}}', '{"a": []}', 0.0),
        ("[]", "[]", 1.0),
        ('{"0": 5}', "[5]", 0.0),
        ("Okay, 99 minutes.", CALL, 0.0),
        ("[" * 100_000, CALL, 0.0),
        ("", CALL, 0.0),
        (" Okay. ", "Okay.", 1.0),
        (CALL, "Okay.", 0.0),
    ],
)
def test_json_fields(completion: str, reference: str, score: float) -> None:
    assert json_fields(completion, reference) == pytest.approx(score)
    assert (json_fields(completion, reference) == 1) == exact_match(completion, reference)


def test_fields_are_counted_the_same_from_both_sides() -> None:
    one, other = '{"a": 1, "b": [1, {"c": null}]}', '{"a": 1, "b": [2], "d": true}'
    assert json_fields(one, other) == json_fields(other, one) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He pays 3 x $24 = $72.\n#### 72", "72"),
        ("#### 5\nThat leaves 5 of 9.\n#### 4 dollars, in 2 notes", "4"),
        ("#### Step 1\nTwo and 3 are 5.", "5"),  # a heading is no answer
        ("in total $1,172.00.", "1172"),
        ("1.234,50 €", "1234.5"),
        ("1.234.567", "1234567"),
        ("12\u202f345,5", "12345.5"),
        ("3.5", "3.5"),
        ("3,5", "3.5"),
        (".5", "0.5"),
        ("1,234", "1234"),
        ("1.234", "1.234"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        ("10-5", "5"),
        ("- 5 apples", "5"),
        ("50%", "50"),
        ("1.5e3", "1500"),
        ("one of 1,2,3", "3"),
        ("on 2020-05-12", "12"),
        ("**42**", "42"),
    ],
)
def test_last_number(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


def test_an_answer_is_right_by_its_number_alone() -> None:
    assert final_number("So it is $1,172.00.", "... #### 1172")
    assert not final_number("It is 1173.", "#### 1172")
    assert not final_number("I do not know.", "#### 1172")
    assert last_number("no number, 4th of May aside"[:9]) is None
    with pytest.raises(ValueError, match="no number"):
        final_number("5", "five")


@pytest.mark.parametrize(("kind", "score"), [("rouge1", 0.8), ("rouge2", 2 / 3), ("rougeL", 0.8)])
def test_rouge_is_the_f1_of_words_in_common(kind: str, score: float) -> None:
    """the cat sat / the cat: 2 of 3 and 2 of 2 words, 1 of 2 and 1 of 1 pairs."""
    assert rouge(kind, "The cat sat.", "the cat") == pytest.approx(score)
    assert rouge(kind, "", "the cat") == 0.0
    assert rouge(kind, "a b c", "a b c") == 1.0


def test_rouge_takes_words_of_ascii_as_its_library_does_and_keeps_other_letters() -> None:
    texts = "It's 3.5 kg_x -- so-called!", "its 3 5 KG x, so called so"
    theirs = RougeScorer(["rouge1"]).score(texts[1], texts[0])["rouge1"].fmeasure
    assert rouge("rouge1", *texts) == theirs > 0
    assert rouge("rouge1", "una canción", "la canci") == 0.0
    assert rouge("rouge1", "cancio\u0301n", "canción") == 1.0


def test_chrf_weighs_recall_twice() -> None:
    """ab / abc: precision 1 and 1, recall 2/3 and 1/2 of runs of 1 and 2; 5PR / (4P + R) = 35/55."""
    assert chrf("ab", "abc") == pytest.approx(35 / 55)
    assert (chrf("same text", "same text"), chrf("xyz", "abc"), chrf("", "abc")) == (1.0, 0.0, 0.0)


def test_every_name_has_a_rule_with_scores_between_0_and_1() -> None:
    assert tuple(RULES) == BUILT_IN
    for name, rule in RULES.items():
        assert isinstance(rule(CALL, CALL), bool) == (name in BINARY)
        assert rule(CALL, CALL) == 1
        assert 0 <= rule(json.dumps({"minutes": 98}), CALL) < 1 or name == "valid_json"


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(8)) == pytest.approx(8)


def difference(before: list[float], after: list[float], **kwargs: object) -> dict[str, float]:
    options = {"resamples": 2000, "confidence_fraction": 0.95, "seed": 0, **kwargs}
    options = {"weights": [1] * len(before), **options}
    return paired_difference(before, after, **options)  # type: ignore[arg-type]


def test_difference_of_the_same_scores_is_zero() -> None:
    assert difference([0, 1, 1], [0, 1, 1]) == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_constant_gain_has_no_spread() -> None:
    assert difference([0, 1, 2], [0.5, 1.5, 2.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_interval_is_that_of_the_normal_approximation() -> None:
    """400 records, gain 1 for a quarter: mean 0.25, standard error sqrt(0.25 * 0.75 / 400) = 0.0217."""
    found = difference([0.0] * 400, [1.0] * 100 + [0.0] * 300, resamples=20_000)
    assert found["mean"] == 0.25
    assert found["low"] == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.004)
    assert found["high"] == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.004)


def test_few_records_have_a_wider_interval() -> None:
    """Student's half-width with 9 degrees of freedom is 2.262 standard errors, not 1.96."""
    scores = [-4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    found = difference([0.0] * 10, scores, resamples=20_000)
    error = math.sqrt(sum(s * s for s in scores) / 9 / 10)
    assert found["high"] == pytest.approx(2.262 * error, rel=0.06)
    assert found["low"] == pytest.approx(-2.262 * error, rel=0.06)


def test_the_interval_of_skewed_scores_reaches_further_on_the_long_side() -> None:
    scores = [0.0] * 12 + [1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 6.0, 9.0]
    right, left = difference([0.0] * 20, scores), difference(scores, [0.0] * 20)
    assert right["high"] - right["mean"] > 1.4 * (right["mean"] - right["low"])
    assert left["mean"] - left["low"] == pytest.approx(right["high"] - right["mean"], rel=0.05)


@pytest.mark.parametrize("scores", [[1.0], [0.5, 0.5, 0.5], [0.0] * 20])
def test_scores_that_do_not_vary_have_no_width(scores: list[float]) -> None:
    found = difference([0.0] * len(scores), scores)
    assert found["low"] == found["mean"] == found["high"] == scores[0]


def test_weights_count_tokens() -> None:
    """3 tokens gain 1 each, 1 token loses 1: (3 - 1) / 4."""
    assert difference([0, 1], [1, 0], weights=[3, 1])["mean"] == 0.5


def test_seed_decides() -> None:
    scores = [0.0] * 10, [math.sin(i) for i in range(10)]
    assert difference(*scores) == difference(*scores)
    assert difference(*scores, seed=1) != difference(*scores)


def test_a_perplexity_beyond_all_floats_is_none() -> None:
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) is None


def needed(before: list[float], after: list[float], **kwargs: object) -> int | None:
    options = {"confidence_fraction": 0.95, "weights": [1] * len(before), **kwargs}
    return records_needed(before, after, **options)  # type: ignore[arg-type]


def test_records_needed_are_those_of_the_textbook() -> None:
    """Mean 0.5, sd 1, 5 % two-sided, power 80 %: (1.95996 + 0.84162)^2 / 0.25 = 31.4."""
    differences = [0.5 + math.sqrt(0.5), 0.5 - math.sqrt(0.5)]
    assert needed([0, 0], differences) == 32
    assert needed(differences, [0, 0]) == 32
    assert (
        needed([0, 0], differences, confidence_fraction=0.9) == 25
    )  # (1.64485 + 0.84162)^2 / 0.25
    assert needed([0, 0], differences, power_fraction=0.9) == 43  # (1.95996 + 1.28155)^2 / 0.25


def test_records_needed_are_found_by_drawing() -> None:
    """Of tests with as many records as that, 80 % have an interval without zero."""
    scores = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10  # mean 0.2
    count = needed([0.0] * 100, scores)
    assert count == 72
    seen = 0
    for seed in range(400):
        drawn = [scores[i] for i in _drawn(seed, count)]
        seen += difference([0.0] * count, drawn, resamples=400)["low"] > 0
    assert seen / 400 == pytest.approx(0.8, abs=0.07)


def _drawn(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(100), k=count)


def test_there_is_no_number_of_records_for_no_difference() -> None:
    assert needed([0, 1, 2], [0, 1, 2]) is None
    assert needed([0, 1], [1, 0]) is None
    assert needed([0], [1]) is None
    assert needed([0, 0], [1, 1]) == 2  # every record shows it
    assert needed([0, 0], [1e-300, -0.9e-300]) is not None


def test_a_weight_is_so_many_records_in_the_mean() -> None:
    """Linearised residuals w (d - mean) / mean(w): 1.5 (1 - 0.5) = 0.75 and 0.5 (-1 - 0.5) = -0.75."""
    spread = math.sqrt(2 * 0.75**2)
    assert needed([0, 0], [1, -1], weights=[3, 1]) == math.ceil((2.80159 * spread / 0.5) ** 2)


def test_verdict_says_on_which_side_of_zero_the_interval_lies() -> None:
    assert verdict({"low": 0.1, "high": 0.2}) == "better"
    assert verdict({"low": -0.2, "high": -0.1}) == "worse"
    assert verdict({"low": -0.2, "high": -0.1}, higher_is_better=False) == "better"
    assert verdict({"low": 0.1, "high": 0.2}, higher_is_better=False) == "worse"
    for low, high in ((-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (0.0, 0.0)):
        assert verdict({"low": low, "high": high}) == "no difference seen"
