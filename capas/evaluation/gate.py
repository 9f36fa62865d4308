"""Whether a tuned model may be passed on: a few checks, each with its value and its limit. Pure."""

from collections.abc import Mapping
from typing import Any

from capas.evaluation.names import headline

NEAREST = "_over_nearest"  # behind the name of the gain over copied answers
NEAREST_IN_WORDS = "copying the nearest training answer"


def judge(
    base: Mapping[str, Any], evaluation: Mapping[str, Any], limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """The checks, and in words those that failed.

    Args:
        base: reports/evaluation_base.json.
        evaluation: `tuned`, `difference`, `difference_to_nearest` and `metrics` of reports/evaluation.json.
        limits: `evaluation.gate`; None switches a check off.

    Returns:
        passed, checks, reasons. A check that is off, or whose value was not measured, has `passed` None.
    """
    tuned, name = evaluation["tuned"], headline(evaluation["metrics"])
    gains = [_gain(name, evaluation["difference"][name])]
    if name in evaluation["difference_to_nearest"]:
        gains.append(_gain(name, evaluation["difference_to_nearest"][name], NEAREST))
    checks = [
        *gains,
        _check("stop_rate", tuned["stop_rate"], "min_stop_rate", limits),
        _check("empty_rate", tuned["empty_rate"], "max_empty_rate", limits),
        _check("control_token_rate", tuned["control_token_rate"], "max_control_token_rate", limits),
        _check("quantization_loss", quantization_loss(base), "max_quantization_loss", limits),
    ]
    reasons = [_words(check) for check in checks if check["passed"] is False]
    return {"passed": not reasons, "checks": checks, "reasons": reasons}


def verdict(gate: Mapping[str, Any]) -> str:
    """In one line, as the tag `gate` of an MLflow run has it."""
    return "passed" if gate["passed"] else f"failed: {'; '.join(gate['reasons'])}"


def quantization_loss(base: Mapping[str, Any]) -> float | None:
    """What quantization adds to the base's loss, in nats a token; None where it came quantized."""
    whole = base["full_precision"]
    return None if whole is None else float(base["loss"] - whole["loss"])


def _gain(name: str, found: Mapping[str, float], over: str = "") -> dict[str, Any]:
    """Check that a gain is proven: an interval that includes zero, or lies on its wrong side, proves none."""
    sign = -1 if name == "loss" else 1
    low, high = sorted(found[end] * sign for end in ("low", "high"))
    value = {"name": f"{name}_gain{over}", "value": low, "high": high, "limit": 0.0}
    return {**value, "passed": low > 0}


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
        subject = f"no gain in {name}{f' over {NEAREST_IN_WORDS}' if over else ''} is proven"
        return f"{subject}: its interval is {check['value']:.4g} to {check['high']:.4g}"
    side = "below" if check["key"].startswith("min_") else "above"
    name, value, key, limit = (check[part] for part in ("name", "value", "key", "limit"))
    return f"{name} {value:.4g} is {side} evaluation.gate.{key} = {limit:g}"
