"""Check before any stage runs that the answers of the data can be labels: evaluation=labels."""

from pathlib import Path

from capas.config.composition import Values
from capas.core.errors import CapasError
from capas.core.params import Params
from capas.dataset.references import read_references
from capas.dataset.source import FORMATS, sources_of
from capas.evaluation.label_set import GIVEN, LabelSet, check_labels, shown
from capas.evaluation.names import LABEL, compares_labels

ANSWERS = "the answers of the dataset"


def check_answers(values: Values) -> None:
    """Check evaluation.labels, and the answers in the user's own files; a data set of the Hub is not read.

    Which split an answer is in is not known yet: `evaluate_base` checks that training has every label.

    Raises:
        CapasError: these texts cannot be labels.
    """
    evaluation, dataset = values["evaluation"], values["dataset"]
    if not compares_labels(evaluation["metrics"]):
        return
    if dataset["path"] == "embedded":
        raise CapasError(
            f"evaluation.metrics=[{LABEL}]: the answers of the embedded records are calls in JSON, and no "
            "labels. Choose a classification, such as your own file (capas check FILE --write), or "
            "evaluation=exact_match"
        )
    given = evaluation["labels"]
    params, root = Params(dataset), Path()
    if all(source.path in FORMATS for source in sources_of(params, root)):
        found = LabelSet.of(given, read_references(params, root), ANSWERS)
        if given is None:
            _check_repeated(found)
    elif given is not None:
        check_labels(given, GIVEN)


def _check_repeated(labels: LabelSet) -> None:
    """Check that most answers occur more than once: free text has few copies.

    Raises:
        CapasError: most occur once.
    """
    once = [name for name, count in zip(labels.names, labels.counts, strict=True) if count == 1]
    if 2 * len(once) > len(labels.names):
        raise CapasError(
            f"evaluation.metrics=[{LABEL}]: {len(once)} of {len(labels.names)} distinct answers occur only "
            f"once ({shown(once)}): these are no labels. Choose another evaluation, such as "
            "evaluation=text, or name the labels in evaluation.labels"
        )
