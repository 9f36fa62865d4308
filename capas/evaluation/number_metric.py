"""Extract the final number of a worked answer, as data sets of arithmetic are scored.

"He pays 3 x $24 = $72. #### 72"                      72, the number after ####
"So the three of them cost $1,172.00 in total."       1172, the last number
"""

import re
from decimal import Decimal

_SPACES = "\u00a0\u2009\u202f"  # they keep the groups of a number together
_RUN = rf"\d+(?:[.,{_SPACES}]\d+)*|(?<![\w.])\.\d+"
# A minus after a word, a number or a bracket is a hyphen or a subtraction: 10-5 ends with 5.
_NUMBER = re.compile(
    rf"(?P<minus>(?<![\w)\]%])[-\u2212])?[$€£¥]?(?P<inner>(?<=[$€£¥])[-\u2212])?"
    rf"(?P<run>{_RUN})(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?"
)
_ANSWER = re.compile(r"####\s*(?=[-\u2212$€£¥.\d])")
_WRITTEN = tuple(  # the form of a number, separators of groups, decimal marks
    (re.compile(pattern), separators, decimal)
    for pattern, separators, decimal in (
        (r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", ",", "."),  # 1,234.5
        (r"\d{1,3}(?:\.\d{3})+,\d+", ".", ","),  # 1.234,5
        (r"\d{1,3}(?:\.\d{3}){2,}", ".", ","),  # 1.234.567
        (rf"\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?:[.,]\d+)?", _SPACES, ",."),  # 1 234,5
        (r"\d*[.,]\d+|\d+", "", ",."),  # 3.5 and 3,5
    )
)


def final_number(completion: str, reference: str) -> bool:
    """Return whether the completion ends with the same number as the reference.

    The number after the last `####` is the final one (the format of GSM8K, Cobbe et al. 2021, "Training
    Verifiers to Solve Math Word Problems", arXiv:2110.14168). Without `####` it is the last number of the
    text (`flexible-extract` of the task gsm8k in EleutherAI's lm-evaluation-harness). Numbers are compared by
    value: 18, 18.0 and $18.00 are equal.

    Raises:
        ValueError: the reference has no number.
    """
    expected = last_number(reference)
    if expected is None:
        raise ValueError("the reference holds no number")
    return last_number(completion) == expected


def last_number(text: str) -> Decimal | None:
    """Return the final number of a text, None if it has none.

    Signs count; currency and per cent signs do not (50% is 50). Groups of three digits are thousands after a
    comma (1,234), after several points (1.234.567) and after a non-breaking space. If points and commas both
    occur, the last one is the decimal mark. A single point is a decimal mark (1.234), and so is a comma
    without a group of three after it (3,5). If these rules give no number, as for 1.2.3, the last part
    counts.
    """
    marks = [mark.end() for mark in _ANSWER.finditer(text)]
    numbers = list(_NUMBER.finditer(text, *marks[-1:]))
    return _value(numbers[0 if marks else -1]) if numbers else None


def _value(found: re.Match[str]) -> Decimal:
    plain = _plain(found["run"])
    if plain is None:
        return Decimal(re.split(rf"[.,{_SPACES}]", found["run"])[-1])
    value = Decimal(plain + (found["power"] or ""))
    return -value if found["minus"] or found["inner"] else value


def _plain(run: str) -> str | None:
    """Return the digits with at most one point; None if the groups do not form a number."""
    for pattern, separators, decimal in _WRITTEN:
        if pattern.fullmatch(run):
            kept = (character for character in run if character not in separators)
            return "".join("." if character in decimal else character for character in kept)
    return None
