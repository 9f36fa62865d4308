"""Define the names that `evaluation.metrics` may choose: capas' metrics, and functions of the user's own.

For all of them higher is better. The first one chosen is the headline.
"""

from collections.abc import Sequence
from typing import Literal, get_args

OfAnswers = Literal[
    "exact_match", "valid_json", "final_number", "json_fields", "rouge1", "rouge2", "rougeL", "chrf"
]
BuiltIn = Literal[OfAnswers, "label_accuracy"]
BUILT_IN: tuple[str, ...] = get_args(BuiltIn)
LABEL: BuiltIn = "label_accuracy"  # by the likelihoods of labels, see capas.evaluation.label_scores
# right or wrong; the others are graded
BINARY = ("exact_match", "valid_json", "final_number", LABEL)
BALANCED, MACRO_F1 = "label_balanced_accuracy", "label_macro_f1"
LOG_LOSS, CALIBRATION = "label_log_loss", "label_calibration_error"
LABEL_SCORES = (BALANCED, MACRO_F1, LOG_LOSS, CALIBRATION)  # reported with label_accuracy
LOWER_IS_BETTER = ("loss", LOG_LOSS, CALIBRATION)
OfTokens = Literal["loss", "token_accuracy"]  # of the expected answers: nothing is generated
OF_TOKENS: tuple[str, ...] = get_args(OfTokens)
AUTO = "auto"  # compose chooses by the references, see capas.evaluation.choice
OWN_FUNCTION = r"^[\w./-]+\.py:[A-Za-z_]\w*$"  # file.py:function
# Columns and keys of the reports, which are no names for a function of the user's own.
RESERVED = frozenset(
    (
        *BUILT_IN,
        *("id", "metadata", "prompt", "reference", "completion", "stopped", "empty", "bar", "kind"),
        *(
            "loss",
            "perplexity",
            "token_accuracy",
            "stop_rate",
            "empty_rate",
            "by",
            "model",
            "score",
        ),
        *("num_records", "num_supervised_tokens", "full_precision", "general", "metric"),
        *("nearest", "nearest_id", "similarity", "copied_values", "control_token"),
        *("control_token_rate", "copied_value_rate", "num_copied"),
        *(*LABEL_SCORES, "label_probabilities", "labels", "majority"),
    )
)

_OF_LOG = frozenset(
    ("step", "epoch", "runtime", "samples_per_second", "steps_per_second", "num_tokens")
)


def name_of(metric: str) -> str:
    """Return a metric's name in columns and reports: 'data/own/scores.py:politeness' -> 'politeness'."""
    return metric.rpartition(":")[2]


def needs_answers(metric: str) -> bool:
    """Return whether `trainer.metric_for_best_model` scores generated answers."""
    return metric not in OF_TOKENS


def is_column_of_curve(metric: str) -> bool:
    """Return whether a metric's name may be a column of the validation curve, and a key of Trainer's log."""
    return metric in (*BUILT_IN, *OF_TOKENS) or name_of(metric) not in RESERVED | _OF_LOG


def names_clash(metrics: Sequence[str]) -> bool:
    """Return whether two metrics share a name, or a function of the user's own has a reserved name."""
    names = [name_of(metric) for metric in metrics]
    own = {name_of(metric) for metric in metrics if metric not in BUILT_IN}
    return len(set(names)) < len(names) or not RESERVED.isdisjoint(own)


def compares_labels(metrics: Sequence[str]) -> bool:
    """Return whether the likelihoods of labels are compared, so that nothing is generated."""
    return LABEL in metrics


def generates(metrics: Sequence[str]) -> bool:
    """Return whether the metrics score generated answers."""
    return bool(metrics) and not compares_labels(metrics)


def of_answers(metrics: Sequence[str]) -> list[str]:
    """Return the metrics for generated answers: of a label, exact match."""
    return ["exact_match" if metric == LABEL else metric for metric in metrics]


def headline(names: Sequence[str]) -> str:
    """Return the metric that stands for the result: the first one, or the loss if there is none."""
    return names[0] if names else "loss"
