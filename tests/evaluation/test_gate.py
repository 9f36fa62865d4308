"""The gate: what fails a model, and what is left out of the judgement."""

from typing import Any

import pytest

from capas.evaluation.gate import judge, verdict

LIMITS = {
    **{"min_stop_rate": 0.9, "max_empty_rate": 0.01, "max_control_token_rate": 0.0},
    **{"min_length_ratio": 0.5, "max_length_ratio": 2.0, "min_gain_to_noise": 1.0},
    **{"max_forgetting": 1.0, "max_quantization_loss": 0.5},
}
BASE = {"loss": 3.2, "full_precision": {"loss": 3.0}}
LOSS = {"mean": -1.0, "low": -1.5, "high": -0.5}


def interval(ends: tuple[float, float]) -> dict[str, float]:
    return {"mean": sum(ends) / 2, "low": ends[0], "high": ends[1]}


def check(gate: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in gate["checks"] if c["name"] == name)
    return found


def judged(
    match: tuple[float, float] | None = (0.3, 0.5),
    loss: dict[str, float] = LOSS,
    base: dict[str, Any] = BASE,
    limits: dict[str, Any] = LIMITS,
    nearest: dict[str, Any] | None = None,
    noise: float | None = 0.1,
    length: tuple[float, float] | None = (0.9, 1.1),
    forgotten: tuple[float, float] = (0.1, 0.3),
    **tuned: float | None,
) -> dict[str, Any]:
    difference, metrics = {"loss": loss}, []
    if match:
        worse = {"mean": -0.5, "low": -0.6, "high": -0.4}
        difference |= {"valid_json": worse, "exact_match": interval(match)}
        metrics = ["exact_match", "valid_json"]
    rates = {"stop_rate": 0.95, "empty_rate": 0.0, "control_token_rate": 0.0}
    evaluation = {"tuned": rates | tuned, "difference": difference, "metrics": metrics}
    evaluation["difference_to_nearest"] = nearest or {}
    evaluation["general"] = {"difference": interval(forgotten)}
    evaluation["noise"] = None if noise is None else {"noise": noise}
    evaluation["length_ratio"] = length and interval(length)
    return judge(base, evaluation, limits)


def test_a_good_model_passes_every_check() -> None:
    gate = judged()
    assert gate["passed"] and gate["reasons"] == [] and verdict(gate) == "passed"
    assert [found["passed"] for found in gate["checks"]] == [True] * 9
    assert gate["checks"][0] == {
        **{"name": "exact_match_gain", "value": 0.3, "high": 0.5, "limit": 0.0, "passed": True}
    }
    assert check(gate, "quantization_loss")["value"] == pytest.approx(0.2)


@pytest.mark.parametrize("match", [(-0.1, 0.2), (0.0, 0.2), (0.0, 0.0), (-0.5, -0.1)])
def test_an_interval_that_is_not_above_zero_proves_no_gain(match: tuple[float, float]) -> None:
    gate = judged(match, noise=None)
    assert not gate["passed"]
    low, high = match
    assert gate["reasons"] == [
        f"no gain in exact_match is proven: its interval is {low:.4g} to {high:.4g}"
    ]
    assert verdict(gate).startswith("failed: no gain in exact_match")


def test_the_first_metric_is_the_one_that_must_gain() -> None:
    gain = {"mean": 0.1, "low": 0.05, "high": 0.2}
    rates = {"stop_rate": 1.0, "empty_rate": 0.0, "control_token_rate": 0.0}
    evaluation: dict[str, Any] = {"tuned": rates, "metrics": ["rougeL", "chrf"]}
    evaluation |= {"difference_to_nearest": {}, "general": {"difference": interval((0, 0))}}
    evaluation["difference"] = {"chrf": {**gain, "low": -0.1}, "rougeL": gain, "loss": LOSS}
    assert judge(BASE, evaluation, LIMITS)["checks"][0] == {
        **{"name": "rougeL_gain", "value": 0.05, "high": 0.2, "limit": 0.0, "passed": True}
    }
    evaluation["metrics"].reverse()
    assert judge(BASE, evaluation, LIMITS)["reasons"] == [
        "no gain in chrf is proven: its interval is -0.1 to 0.2"
    ]


@pytest.mark.parametrize(("low", "passed"), [(0.01, True), (0.0, False), (-0.2, False)])
def test_copying_the_nearest_training_answer_must_be_beaten(low: float, passed: bool) -> None:
    over = {"exact_match": {"mean": 0.1, "low": low, "high": 0.3}}
    gate = judged(nearest=over)
    assert gate["passed"] is passed
    assert gate["checks"][1]["name"] == "exact_match_gain_over_nearest"
    if not passed:
        assert gate["reasons"] == [
            "no gain in exact_match over copying the nearest training answer is proven: its interval is "
            f"{low:.4g} to 0.3"
        ]


def test_without_metrics_a_lower_loss_is_the_gain() -> None:
    generated_nothing: dict[str, Any] = dict.fromkeys(
        ("match", "stop_rate", "empty_rate", "control_token_rate", "noise", "length")
    )
    gate = judged(**generated_nothing)
    assert gate["passed"]
    assert gate["checks"][0]["name"] == "loss_gain" and gate["checks"][0]["value"] == 0.5
    assert [found["passed"] for found in gate["checks"]] == [
        *(True, None, None, None, None, None, None, True, True)
    ]
    worse = judged(**generated_nothing, loss={"mean": 0.4, "low": -0.1, "high": 0.9})
    assert worse["reasons"] == ["no gain in loss is proven: its interval is -0.9 to 0.1"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"stop_rate": 0.899}, "stop_rate 0.899 is below evaluation.gate.min_stop_rate = 0.9"),
        ({"empty_rate": 0.02}, "empty_rate 0.02 is above evaluation.gate.max_empty_rate = 0.01"),
        (
            {"control_token_rate": 0.01},
            "control_token_rate 0.01 is above evaluation.gate.max_control_token_rate = 0",
        ),
        (
            {"base": {"loss": 4.0, "full_precision": {"loss": 3.0}}},
            "quantization_loss 1 is above evaluation.gate.max_quantization_loss = 0.5",
        ),
        (
            {"forgotten": (0.5, 1.2)},
            "forgetting may be as large as 1.2, which is above evaluation.gate.max_forgetting = 1",
        ),
        (
            {"length": (0.4, 1.0)},
            "answers may be as short, relative to the references, as 0.4, which is below "
            "evaluation.gate.min_length_ratio = 0.5",
        ),
        (
            {"length": (1.0, 2.5)},
            "answers may be as long, relative to the references, as 2.5, which is above "
            "evaluation.gate.max_length_ratio = 2",
        ),
        (
            {"noise": 0.4},
            "the gain of 0.4 is not above 0.4, which batching alone may change "
            "(evaluation.gate.min_gain_to_noise)",
        ),
    ],
)
def test_each_limit_fails_alone_and_null_switches_it_off(found: Any, reason: str) -> None:
    assert judged(**found)["reasons"] == [reason]
    off = judged(**found, limits=dict.fromkeys(LIMITS))
    assert off["passed"] and [found["passed"] for found in off["checks"][1:]] == [None] * 8


def test_a_limit_is_met_by_its_own_value() -> None:
    assert judged(stop_rate=0.9, empty_rate=0.01)["passed"]
    assert judged(length=(0.5, 2.0), forgotten=(0.0, 1.0))["passed"]


def test_the_gain_must_exceed_the_noise_as_often_as_the_limit_says() -> None:
    assert judged(noise=0.3)["passed"] and judged(noise=0.0)["passed"]
    strict = judged(noise=0.3, limits=LIMITS | {"min_gain_to_noise": 2.0})
    assert check(strict, "noise_floor")["limit"] == 0.6 and not strict["passed"]
    lost = judged((-0.2, 0.2), noise=0.0)
    assert check(lost, "noise_floor")["passed"] is False


def test_what_an_evaluation_did_not_measure_is_not_checked() -> None:
    gate = judged(noise=None, length=None)
    names = ("noise_floor", "length_ratio_low", "length_ratio_high")
    assert gate["passed"] and [check(gate, name)["passed"] for name in names] == [None] * 3


def test_what_is_no_number_fails() -> None:
    nan = float("nan")
    assert not judged(forgotten=(nan, nan), length=(nan, nan))["passed"]
    assert len(judged((nan, nan), noise=None, stop_rate=nan, empty_rate=nan)["reasons"]) == 3


def test_several_reasons_stand_in_one_line() -> None:
    gate = judged((0.0, 0.1), noise=0.01, stop_rate=0.5, empty_rate=0.5)
    assert verdict(gate).count("; ") == 2 and len(gate["reasons"]) == 3


def test_a_base_that_came_quantized_is_not_checked_for_it() -> None:
    gate = judged(base={"loss": 9.0, "full_precision": None})
    assert gate["passed"] and check(gate, "quantization_loss")["passed"] is None
