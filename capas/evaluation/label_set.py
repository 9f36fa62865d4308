"""Find the labels of a classification: the answers of the training split, or those of the configuration."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from capas.core.errors import CapasError
from capas.evaluation.names import LABEL

MAX_LABELS = 200  # a test record costs as many sequences
MAX_SHOWN = 5
TRAINED = "the answers of the training split"
GIVEN = "evaluation.labels"


@dataclass(frozen=True)
class LabelSet:
    """The labels, in the order in which probabilities and tables list them.

    Args:
        names: the labels.
        counts: how many records of the training split have each label.
        origin: where the labels come from, for error messages and reports.
    """

    names: list[str]
    counts: list[int]
    origin: str

    @classmethod
    def of(
        cls, given: Sequence[str] | None, trained: Iterable[str], origin: str = TRAINED
    ) -> "LabelSet":
        """Return the given labels, or else the distinct answers of the training split, sorted.

        Args:
            given: evaluation.labels.
            trained: the answers of the training split.
            origin: what these answers are, for error messages.

        Raises:
            CapasError: see `check_labels` and `check_known`.
        """
        counts = Counter(text.strip() for text in trained)
        if given is None:
            names = sorted(counts)
        else:
            names, origin = [name.strip() for name in given], GIVEN
        check_labels(names, origin)
        found = cls(names, [counts[name] for name in names], origin)
        found.check_known((f"{count} records", text) for text, count in counts.items())
        return found

    @property
    def majority(self) -> str:
        """The label of most training records; of equally frequent ones the first."""
        return self.names[self.counts.index(max(self.counts))]

    def index(self, text: str) -> int:
        """Return the position of an answer's label."""
        return self.names.index(text.strip())

    def without(self, answers: Iterable[str]) -> list[str]:
        """Return the labels that none of the answers is."""
        having = {text.strip() for text in answers}
        return [name for name in self.names if name not in having]

    def check_known(self, answers: Iterable[tuple[str, str]]) -> None:
        """Check that every answer is a label.

        The probability of a right label that cannot be chosen is 0, and its log loss infinite.

        Args:
            answers: (place of an answer, its text).

        Raises:
            CapasError: an answer is none of the labels.
        """
        known = set(self.names)
        lost = [(place, text.strip()) for place, text in answers if text.strip() not in known]
        if lost:
            place, text = lost[0]
            raise CapasError(
                f"evaluation.metrics=[{LABEL}]: {place}: the answer {text!r} is not among "
                f"{self.origin} ({shown(self.names)}); {len(lost)} such in all. Add training records "
                "with this label, remove the records that have it, or name every label in "
                "evaluation.labels"
            )


def check_labels(names: Sequence[str], origin: str) -> None:
    """Check that texts can be the labels of a classification task.

    Raises:
        CapasError: there are fewer than two or more than MAX_LABELS, one is empty, or two look the same.
    """
    subject = f"evaluation.metrics=[{LABEL}]: {origin}"
    if len(names) < 2:
        there = f"a single label ({names[0]!r})" if names else "no label"
        raise CapasError(f"{subject}: {there}; a classification needs at least two")
    if len(names) > MAX_LABELS:
        raise CapasError(
            f"{subject}: {len(names)} distinct texts ({shown(names)}), and at most {MAX_LABELS} can be "
            "labels. Choose another evaluation, such as evaluation=text"
        )
    if "" in map(str.strip, names):
        raise CapasError(f"{subject}: a label is empty. Give it a name, such as 'none'")
    known: dict[str, str] = {}
    for name in names:
        look = unicodedata.normalize("NFKC", name.strip())
        if look in known:
            raise CapasError(
                f"{subject}: {known[look]!a} and {name!a} look the same. Write this label the "
                "same way in all records, and name it once"
            )
        known[look] = name


def shown(names: Sequence[str]) -> str:
    """Return the first labels as text."""
    more = ", ..." if len(names) > MAX_SHOWN else ""
    return ", ".join(map(repr, names[:MAX_SHOWN])) + more
