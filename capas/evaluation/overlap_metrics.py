"""Measure how much of the reference's wording a completion has, with the usual libraries, from 0 to 1."""

import re
import unicodedata
from functools import cache
from typing import Any

_WORD = re.compile(r"[^\W_]+")


def rouge(kind: str, completion: str, reference: str) -> float:
    """Return the F1 of `rouge_score`: common words (rouge1), pairs of words (rouge2), longest subsequence.

    Words are runs of letters and digits, lower-cased and not stemmed. On ASCII text they equal those of the
    library's own tokenizer, which loses every other letter ("canción" would be "canci" and "n"). A language
    that
    is written without spaces has no such words: use chrf.

    Args:
        kind: rouge1, rouge2 or rougeL (over the whole text).

    Source: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    score: float = _rouge_scorer(kind).score(reference, completion)[kind].fmeasure
    return score


def chrf(completion: str, reference: str) -> float:
    """Return chrF2 of `sacrebleu`, its 0 to 100 divided by 100.

    It is the F-score of runs of 1 to 6 characters, in which recall counts twice. It is computed per record:
    the mean is not the chrF of a corpus, which adds up counts over all records.

    Source: M. Popović, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015.
    """
    score: float = _chrf_scorer().sentence_score(completion, [reference]).score
    return score / 100


class Words:
    """A tokenizer for `rouge_score`, which calls `tokenize`."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFC", text).lower())


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words())


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
