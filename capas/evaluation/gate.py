"""Check a tuned model before it can be registered: a few checks, each with its value and limit. Pure."""

from collections.abc import Mapping
from typing import Any

from capas.evaluation.names import BALANCED, generates, headline

NEAREST = "_over_nearest"  # the suffix of the gain over copied answers
MAJORITY = "_over_majority"  # of the gain over always choosing the majority label
BASELINES = {
    NEAREST: "copying the nearest training answer",
    MAJORITY: "always choosing the most frequent label",
}
NOISE = "noise_floor"
OF_ANSWERS = (  # checks of generated answers
    *("stop_rate", "empty_rate", "control_token_rate", "length_ratio_low", "length_ratio_high"),
)
_NOT_GENERATED = {"unmeasured": "not_generated"}
IN_WORDS = {  # of checks whose value is an end of an interval
    "forgetting": "forgetting may be as large as",
    "length_ratio_low": "answers may be as short, relative to the references, as",
    "length_ratio_high": "answers may be as long, relative to the references, as",
}


def judge(
    base: Mapping[str, Any], evaluation: Mapping[str, Any], limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """Return the checks, and the reasons of those that failed.

    What is inferred must be proven: the gains, the forgetting and the length ratio pass if their whole
    interval lies within the limit. At the limit, chance passes at most 5 % of evaluations, and 6 % of those
    with 20 very skewed scores (`benchmarks/gate.py`). The rates, and the loss by quantization, describe the
    answers and weights at hand and are compared as they are: 100 records cannot prove that fewer than 1 % of
    the answers are empty. The noise floor compares the gain as it is, too; the gain's interval guards against
    chance.

    Args:
        base: reports/evaluation_base.json.
        evaluation: reports/evaluation.json without its `gate`; `noise` may be missing, `length_ratio` None.
        limits: `evaluation.gate`; None turns a check off.

    Returns:
        passed, checks, reasons. A check that is off, or whose value was not measured, has `passed` None. If
        nothing was generated, the checks of answers say so: `unmeasured` is `not_generated`.
    """
    tuned, name = evaluation["tuned"], headline(evaluation["metrics"])
    gain = evaluation["difference"][name]
    gains = [_gain(name, gain)]
    if name in evaluation["difference_to_nearest"]:
        gains.append(_gain(name, evaluation["difference_to_nearest"][name], NEAREST))
    if "difference_to_majority" in evaluation:
        found = evaluation["difference_to_majority"][BALANCED]
        gains.append(_gain(BALANCED, found, MAJORITY))
    forgotten, length = evaluation["general"]["difference"], evaluation.get("length_ratio") or {}
    checks = [
        *gains,
        _noise_floor(gain["mean"], evaluation.get("noise"), limits),
        _check("stop_rate", tuned["stop_rate"], "min_stop_rate", limits),
        _check("empty_rate", tuned["empty_rate"], "max_empty_rate", limits),
        _check("control_token_rate", tuned["control_token_rate"], "max_control_token_rate", limits),
        _check("length_ratio_low", length.get("low"), "min_length_ratio", limits),
        _check("length_ratio_high", length.get("high"), "max_length_ratio", limits),
        _check("forgetting", forgotten["high"], "max_forgetting", limits),
        _check("quantization_loss", quantization_loss(base), "max_quantization_loss", limits),
    ]
    if not generates(evaluation["metrics"]):
        checks = [{**c, **_NOT_GENERATED} if c["name"] in OF_ANSWERS else c for c in checks]
    reasons = [_words(check) for check in checks if check["passed"] is False]
    return {"passed": not reasons, "checks": checks, "reasons": reasons}


def verdict(gate: Mapping[str, Any]) -> str:
    """Return the verdict as one line, as in the tag `gate` of an MLflow run."""
    return "passed" if gate["passed"] else f"failed: {'; '.join(gate['reasons'])}"


def quantization_loss(base: Mapping[str, Any]) -> float | None:
    """Return what quantization adds to the base's loss, in nats per token; None if it came quantized."""
    whole = base["full_precision"]
    return None if whole is None else float(base["loss"] - whole["loss"])


def _gain(name: str, found: Mapping[str, float], over: str = "") -> dict[str, Any]:
    """Check that a gain is proven: its interval must lie wholly on the better side of zero."""
    sign = -1 if name == "loss" else 1
    low, high = sorted(found[end] * sign for end in ("low", "high"))
    value = {"name": f"{name}_gain{over}", "value": low, "high": high, "limit": 0.0}
    return {**value, "passed": low > 0}


def _noise_floor(
    gain: float, noise: Mapping[str, Any] | None, limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """Check that the gain itself, not its interval, is larger than what batching alone changes."""
    factor, passed, limit = limits["min_gain_to_noise"], None, None
    if noise is not None and factor is not None:
        limit = factor * noise["noise"]
        passed = gain > limit
    return {
        **{"name": NOISE, "value": gain if noise else None, "key": "min_gain_to_noise"},
        **{"limit": limit, "passed": passed},
    }


def _check(
    name: str, value: float | None, key: str, limits: Mapping[str, float | None]
) -> dict[str, Any]:
    limit, passed = limits[key], None
    if value is not None and limit is not None:
        passed = value >= limit if key.startswith("min_") else value <= limit
    return {"name": name, "value": value, "key": key, "limit": limit, "passed": passed}


def _words(check: Mapping[str, Any]) -> str:
    if "key" not in check:
        name, _, over = check["name"].rpartition("_gain")
        subject = f"no gain in {name}{f' over {BASELINES[over]}' if over else ''} is proven"
        return f"{subject}: its interval is {check['value']:.4g} to {check['high']:.4g}"
    name, value, key, limit = (check[part] for part in ("name", "value", "key", "limit"))
    if name == NOISE:
        return (
            f"the gain of {value:.4g} is not above {limit:.4g}, which batching alone may change "
            f"(evaluation.gate.{key})"
        )
    side = "below" if key.startswith("min_") else "above"
    words = f"{IN_WORDS[name]} {value:.4g}, which" if name in IN_WORDS else f"{name} {value:.4g}"
    return f"{words} is {side} evaluation.gate.{key} = {limit:g}"
