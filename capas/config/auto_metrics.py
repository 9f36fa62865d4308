"""Replace `evaluation.metrics: auto` by the metrics that suit the answers of the data."""

import json
import logging
from functools import cache
from pathlib import Path

from capas.config.composition import Values
from capas.config.validation import validate
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.references import read_references
from capas.evaluation.choice import Choice, choose_metrics
from capas.evaluation.names import AUTO

log = logging.getLogger("capas")


def with_metrics(values: Values) -> Values:
    """Replace `evaluation.metrics: auto` by the metrics that suit the answers of the data.

    Values that are not valid stay as they are: `validate` reports all problems at once.
    """
    evaluation = values.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("metrics") != AUTO:
        return values
    try:
        validate(values)
    except CapasError:
        return values
    choice = chosen(json.dumps(values["dataset"]))
    return {**values, "evaluation": {**evaluation, "metrics": choice.metrics}}


@cache
def chosen(dataset: str) -> Choice:
    """Choose the metrics and log the choice, once per run of compose. `dataset` is the group as JSON."""
    params = Params(json.loads(dataset))
    choice = choose_metrics(read_references(params, Path()))
    names = ", ".join(choice.metrics) or "[]"
    log.info("evaluation.metrics=auto looked at the answers (%s): %s", choice.why, names)
    return choice
