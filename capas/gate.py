"""Whether a tuned model may be passed on: a few checks, each with its value and its limit. Pure."""

from collections.abc import Mapping
from typing import Any

from capas.metrics.names import headline


def judge(
    base: Mapping[str, Any], evaluation: Mapping[str, Any], limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """The checks, and in words those that failed.

    Args:
        base: reports/evaluation_base.json.
        evaluation: `tuned`, `difference` and `metrics` of reports/evaluation.json.
        limits: `evaluation.gate`; None switches a check off.

    Returns:
        passed, checks, reasons. A check that is off, or whose value was not measured, has `passed` None.
    """
    tuned, (gain, reason) = evaluation["tuned"], _gain(evaluation)
    checks = [
        gain,
        _check("stop_rate", tuned["stop_rate"], "min_stop_rate", limits),
        _check("empty_rate", tuned["empty_rate"], "max_empty_rate", limits),
        _check("quantization_loss", quantization_loss(base), "max_quantization_loss", limits),
    ]
    failed = [check for check in checks if check["passed"] is False]
    reasons = [reason if check is gain else _words(check) for check in failed]
    return {"passed": not failed, "checks": checks, "reasons": reasons}


def verdict(gate: Mapping[str, Any]) -> str:
    """In one line, as the tag `gate` of an MLflow run has it."""
    return "passed" if gate["passed"] else f"failed: {'; '.join(gate['reasons'])}"


def quantization_loss(base: Mapping[str, Any]) -> float | None:
    """What quantization adds to the base's loss, in nats a token; None where it came quantized."""
    whole = base["full_precision"]
    return None if whole is None else float(base["loss"] - whole["loss"])


def _gain(evaluation: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Of the headline. An interval that includes zero, or lies on the wrong side of it, proves no gain."""
    name = headline(evaluation["metrics"])
    sign = -1 if name == "loss" else 1
    ends = [evaluation["difference"][name][end] * sign for end in ("low", "high")]
    low, high = min(ends), max(ends)
    check = {"name": f"{name}_gain", "value": low, "limit": 0.0, "passed": low > 0}
    return check, f"no gain in {name} is proven: its interval is {low:.4g} to {high:.4g}"


def _check(
    name: str, value: float | None, key: str, limits: Mapping[str, float | None]
) -> dict[str, Any]:
    limit, passed = limits[key], None
    if value is not None and limit is not None:
        passed = value >= limit if key.startswith("min_") else value <= limit
    return {"name": name, "value": value, "key": key, "limit": limit, "passed": passed}


def _words(check: Mapping[str, Any]) -> str:
    side = "below" if check["key"].startswith("min_") else "above"
    name, value, key, limit = (check[part] for part in ("name", "value", "key", "limit"))
    return f"{name} {value:.4g} is {side} evaluation.gate.{key} = {limit:g}"
