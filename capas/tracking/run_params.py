"""Make the parameters of an MLflow run, and its name, which shows the difference from other runs.

embedded r16 lr4e-3          own_csv qwen2.5-0.5b r8 lr2e-4          own_csv qwen2.5-0.5b full lr1e-5
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from capas.core.dag import StageSpec, ancestors
from capas.core.params import flatten
from capas.training.steps import Step

MAX_TEXT = 500  # characters of a param or tag; the artifact params.yaml has the full text
_NOT_IN_A_NAME = re.compile(r"[^\w\-. /]")
_DEPTH = 2  # dataset.flaws is one param, not one for each kind of flaw
_GROUP_OF_TRACKING = "tracking"
_FACTORS = (  # arguments of `Step`
    "hardware.num_processes",
    "trainer.per_device_train_batch_size",
    "trainer.gradient_accumulation_steps",
)
_NUM_DIFFERENCES = 3  # differences shown in a name
_USUAL = ("_instruct", "_chat", "_it")  # endings of a model's preset that a name leaves out


def recorded_params(lock: Mapping[str, Any]) -> dict[str, str]:
    """Return the values with which the stages of dvc.lock ran, in the form of MLflow's params.

    If two stages have different values for a key, the value of the training counts.
    """
    led_to_it = ancestors("train", lock)
    names = sorted(lock.keys() - {"publish"}, key=lambda name: (name in led_to_it, name))
    entries = [lock[name] for name in names]  # publish is running, so its entry is outdated
    return _texts(entry.get("params", {}).get("params.yaml", {}) for entry in entries)


def current_params(root: Path) -> dict[str, str]:
    """Return the values in params.yaml that the stages of dvc.yaml declare."""
    return _texts(
        spec.values(root).get("params.yaml", {}) for spec in StageSpec.read_all(root).values()
    )


def _texts(declared: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    flat = {key: value for values in declared for key, value in flatten(values).items()}
    kept = {k: v for k, v in flat.items() if k.partition(".")[0] != _GROUP_OF_TRACKING}
    if {*_FACTORS} <= kept.keys():
        kept["global_batch_size"] = Step(*(kept[key] for key in _FACTORS)).num_rows
    return clipped(_shallow(kept))


def _shallow(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys cut to at most `_DEPTH` parts; deeper values become a mapping."""
    shallow: dict[str, Any] = {}
    for key, value in flat.items():
        parts = key.split(".")
        name, rest = ".".join(parts[:_DEPTH]), ".".join(parts[_DEPTH:])
        if rest:
            shallow.setdefault(name, {})[rest] = value
        else:
            shallow[name] = value
    return shallow


def clipped(values: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: text} with the characters and lengths that MLflow accepts."""
    texts = {metric_name(key): str(value) for key, value in values.items()}
    note = "… (whole in params.yaml)"
    return {
        k: v if len(v) <= MAX_TEXT else v[: MAX_TEXT - len(note)] + note for k, v in texts.items()
    }


def metric_name(key: str) -> str:
    """Return the key with _ for characters that MLflow refuses in names."""
    return _NOT_IN_A_NAME.sub("_", key)[:250]


def name_of(params: Mapping[str, str]) -> str:
    """Return the words that distinguish most runs: data, model, rank, learning rate."""
    # data and model may have the same name, which is then not repeated
    return " ".join(dict.fromkeys(filter(None, _words(params))))


def _words(params: Mapping[str, str]) -> Iterator[str]:
    yield params.get("dataset.preset", "")
    model = params.get("model.preset", "")
    for ending in _USUAL:
        model = model.removesuffix(ending)
    yield model.replace("_", "-")
    if params.get("quantization.preset", "nf4") not in ("nf4", "none"):
        yield params["quantization.preset"]
    yield "full" if params.get("lora.preset") == "none" else f"r{params.get('lora.r', '?')}"
    if rate := params.get("trainer.learning_rate"):
        yield f"lr{_short(float(rate))}"


def _short(number: float) -> str:
    """Return a number as short text: 4e-3, 1.5e-4, 0."""
    if not number:
        return "0"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def distinct_name(params: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> str:
    """Return `name_of`, extended by the difference from the runs that already have that name.

    Args:
        others: the params of each run whose name begins like this one's, oldest first.
    """
    name = name_of(params)
    if name not in others:
        return name
    first = others[name]
    changed = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in params.items()
        if key in first and first[key] != value and not key.endswith(".preset") and len(value) < 20
    ]
    words = [name, *changed[:_NUM_DIFFERENCES]]
    longer = " ".join(words)[:240]
    if longer not in others:
        return longer
    number = 2
    while f"{longer} #{number}" in others:
        number += 1
    return f"{longer} #{number}"
