"""Choose the metrics that suit a set of reference answers: `evaluation.metrics: auto`."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from capas.evaluation.match_metrics import valid_json
from capas.evaluation.names import LABEL
from capas.evaluation.number_metric import last_number

MAX_LABELS, MAX_SHORT_WORDS = 20, 5
MIN_COUNT = 10  # records of each label, so that every split has some of them


@dataclass(frozen=True)
class Choice:
    """The chosen metrics, the headline first, and the reason: a clause about the answers."""

    metrics: list[str]
    why: str


def choose_metrics(references: Sequence[str]) -> Choice:
    """Choose the metrics by the form that all references share.

    - all are JSON objects or lists: exact match, valid JSON, JSON fields;
    - at most 20 distinct ones of at most five words, each seen at least 10 times: label accuracy;
    - at most 20 distinct ones, each seen at least twice: exact match;
    - all end in a number after `####` (GSM8K's form): that number;
    - at most five words in the median: exact match and chrF;
    - anything else is free text: chrF and ROUGE-L.

    Without any reference (plain text) nothing is generated, and only the loss is compared.
    """
    if not references:
        return Choice([], "no record has an answer to compare with")
    counts = Counter(text.strip() for text in references)
    words = statistics.median(len(text.split()) for text in references)
    length = f"{words:g} word{'' if words == 1 else 's'} in the median"
    if all(map(valid_json, counts)):
        return Choice(["exact_match", "valid_json", "json_fields"], "all are JSON")
    if len(counts) <= MAX_LABELS and min(counts.values()) >= 2:
        return Choice([LABEL if _are_labels(counts) else "exact_match"], _labels_in_words(counts))
    if all(re.search(r"####\s*\S", text) and last_number(text) is not None for text in counts):
        return Choice(["final_number"], "all end in a number after ####")
    if words <= MAX_SHORT_WORDS:
        return Choice(["exact_match", "chrf"], f"they are short, {length}")
    return Choice(["chrf", "rougeL"], f"free text, {length}")


def _are_labels(counts: Counter[str]) -> bool:
    """Return whether a few distinct answers are the labels of a classification."""
    is_short = all(0 < len(text.split()) <= MAX_SHORT_WORDS for text in counts)
    return len(counts) > 1 and is_short and min(counts.values()) >= MIN_COUNT


def _labels_in_words(counts: Counter[str]) -> str:
    labels = ", ".join(json.dumps(text, ensure_ascii=False) for text in sorted(counts)[:3])
    more = ", ..." if len(counts) > 3 else ""
    share = max(counts.values()) / counts.total()
    frequent = f", the most frequent in {share:.0%} of the records" if _are_labels(counts) else ""
    return f"{len(counts)} labels ({labels}{more}){frequent}"
