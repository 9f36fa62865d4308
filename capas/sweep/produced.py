"""Determine which metrics the pipeline will write for a configuration, before it runs."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from capas.evaluation.names import (
    AUTO,
    BUILT_IN,
    LABEL_SCORES,
    OF_TOKENS,
    compares_labels,
    generates,
    name_of,
    needs_answers,
)
from capas.sweep.objective import is_on_test_split, stated_columns

_FIXED = {  # FILE -> the keys of reports/metrics/FILE.json that a sweep can read
    "format": ("num_train_tokens", "supervised_fraction", "num_truncated", "num_dropped"),
    "quantize": ("bytes_before", "bytes_after", "relative_error_mean"),
    "base": (),  # its numbers are nested under the key "base", and a sweep reads no nested keys
    "train": ("num_steps", "train_loss", *(f"validation_{name}" for name in OF_TOKENS)),
}
_ALWAYS = ("loss", "perplexity", "token_accuracy")
_GAINS = ("_gain", "_gain_low", "_gain_high")


def not_produced(settings: dict[str, Any], values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key of the sweep group, sentence) for each metric that the pipeline will not write.

    Args:
        settings: the group `sweep`. A column may be empty, the objective may not.
        values: the values of a trial. Nothing is known of a FILE that capas does not write.
    """
    numbers = keys_of(values)
    places = {**numbers, "tuned": ["exact_match", "stop_rate", *numbers["tuned"]]}
    for name in stated_columns(settings):
        file, _, key = name.partition(".")
        if key not in places.get(file, [key]):
            yield "sweep.columns", _sentence(f"sweep.columns={name}", name, places)
    name = settings["objective"]
    file, _, key = name.partition(".")
    if key not in numbers.get(file, [key]):
        metrics = values["evaluation"]["metrics"]
        chosen = f" with evaluation.metrics={metrics}" if file == "tuned" else ""
        sentence = _sentence(f"sweep.objective={name}", name, numbers, chosen)
        yield "sweep.objective", sentence


def keys_of(values: dict[str, Any]) -> dict[str, list[str]]:
    """Return the keys of each file in reports/metrics/ that will hold a number."""
    metrics = values["evaluation"]["metrics"]
    names = metrics_of(values)
    first = names if metrics == AUTO else names[:1]  # compose chooses it
    gains = [f"{name}{gain}" for name in first for gain in _GAINS]
    generated = ["stop_rate"] if metrics == AUTO or generates(metrics) else []
    labelled = LABEL_SCORES if compares_labels(names) else ()
    tuned = [*_ALWAYS, *names, *labelled, *generated, *gains]
    fixed = {file: list(keys) for file, keys in _FIXED.items()}
    of_checkpoint = values["trainer"]["metric_for_best_model"]
    if needs_answers(of_checkpoint):
        fixed["train"].append(f"validation_{name_of(of_checkpoint)}")
    return {**fixed, "tuned": tuned}


def metrics_of(values: dict[str, Any]) -> list[str]:
    """Return the names of the metrics that the evaluation may compute; higher is better for all of them."""
    metrics = values["evaluation"]["metrics"]
    return list(BUILT_IN) if metrics == AUTO else [name_of(metric) for metric in metrics]


def _sentence(given: str, name: str, places: Mapping[str, list[str]], chosen: str = "") -> str:
    file, _, key = name.partition(".")
    there = ", ".join(dict.fromkeys(places[file]))
    shown = f"it has {there}" if there else "it has no numbers for a sweep"
    missing = f"reports/metrics/{file}.json will not contain the number {key}{chosen}"
    return f"{given}: {missing}; {shown}{_meant(name, places)}"


def _meant(name: str, places: Mapping[str, list[str]]) -> str:
    """Return the metric that was probably meant, in this file or in another one, as the end of a sentence."""
    file, _, key = name.partition(".")
    known = [f"{place}.{number}" for place, numbers in places.items() for number in numbers]
    same_key = [k for k in known if k.partition(".")[2] == key and not is_on_test_split(k)]
    same_file = [k for k in known if k.startswith(f"{file}.")]
    close = same_key or get_close_matches(name, same_file, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
