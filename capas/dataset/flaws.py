"""Define the flaws of records, and apply and count their policies: an error, a drop or a repair."""

import logging
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from capas.core.errors import CapasError

MALFORMED, NO_ANSWER, EMPTY_ANSWER = "malformed", "no_answer", "empty_answer"
INVALID_TEXT, CONSECUTIVE, SYSTEM = "invalid_text", "consecutive_roles", "system_in_the_middle"
ASSISTANT_FIRST = "assistant_first"
BAD_JSON, BAD_ROW, MISSING_COLUMN = "bad_json", "bad_row", "missing_column"
NOT_TEXT, UNKNOWN_ROLE, EMPTY_QUESTION = "not_text", "unknown_role", "empty_question"
BAD_CALL, UNCLEAR_TRAINING = "bad_call", "unclear_training"
ERROR, DROP, REPLACE, MERGE, KEEP, SKIP = "error", "drop", "replace", "merge", "keep", "skip"
WAYS_OUT = {
    MALFORMED: "drop",
    BAD_JSON: "drop",
    BAD_ROW: "drop",
    MISSING_COLUMN: "drop",
    NOT_TEXT: "drop",
    UNKNOWN_ROLE: "drop",
    EMPTY_QUESTION: "keep or drop",
    BAD_CALL: "drop",
    UNCLEAR_TRAINING: "drop",
    NO_ANSWER: "drop",
    EMPTY_ANSWER: "drop",
    INVALID_TEXT: "replace (by U+FFFD) or drop",
    CONSECUTIVE: "merge, keep or drop",
    SYSTEM: "keep or drop",
    ASSISTANT_FIRST: "skip (the messages before the first user message) or drop",
}
log = logging.getLogger("capas")
NUM_EXAMPLES = 20  # examples kept per kind
NUM_PLACES = 5  # places listed per kind in an error
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 4, 80, 80, 80


class Flaw(Exception):  # noqa: N818 (also used as a value, for a row that cannot be read)
    """A flaw of a record: `field` is its place in the record, `text` says what is wrong and how to fix it."""

    def __init__(self, kind: str, field: str, value: Any, text: str) -> None:
        super().__init__(text)
        self.kind, self.field, self.value, self.text = kind, field, value, text

    def __reduce__(self) -> Any:
        return Flaw, (self.kind, self.field, self.value, self.text)


def show(value: Any) -> str:
    """Return the shortened repr of a value, whatever its depth and length."""
    text = repr(value[:200]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """Return a text with lone surrogates as backslash escapes, because no file can contain them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _seen(field: str, value: str) -> str:
    return f"{field} is {value}" if field else value


class Flaws:
    """The policies of `dataset.flaws`, and counts of what they did.

    A kind without a policy of its own (null) uses that of `malformed`.
    """

    def __init__(self, policies: Mapping[str, str | None], budget_fraction: float) -> None:
        self._policies, self._budget = dict(policies), budget_fraction
        self.num_read = 0
        self.refused: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def policy(self, kind: str) -> str:
        return self._policies[kind] or self._policies[MALFORMED] or ERROR

    def allows(self, flaw: Flaw, *repairs: str) -> bool:
        """Count a repair if the policy for this kind of flaw is one of `repairs`, and return True.

        Raises:
            Flaw: the policy is another one.
        """
        if self.policy(flaw.kind) not in repairs:
            raise flaw
        self.repaired[flaw.kind] += 1
        return True

    def leave_out(self, key: str, count: int = 1) -> None:
        """Count a key that no stage uses: `key` of a record, or 'messages[].key' of a message."""
        self.left_out[printable(key)] += count

    def refuse(self, flaw: Flaw, place: Mapping[str, Any], identity: str) -> None:
        """Count the record at `place` as dropped or, if the policy is not drop, as an error for `check`."""
        counts = self.dropped if self.policy(flaw.kind) == DROP else self.refused
        counts[flaw.kind] += 1
        shown = self.examples.setdefault(flaw.kind, [])
        if len(shown) < NUM_EXAMPLES:
            about = {"id": printable(identity), "field": flaw.field, "value": show(flaw.value)}
            shown.append({**place, **about, "why": flaw.text})

    def fresh(self) -> "Flaws":
        """Return the same policies with all counts at zero."""
        return Flaws(self._policies, self._budget)

    def add(self, later: "Flaws") -> None:
        """Add the counts and examples of later records."""
        self.num_read += later.num_read
        self.refused += later.refused
        self.dropped += later.dropped
        self.repaired += later.repaired
        self.left_out += later.left_out
        for kind, found in later.examples.items():
            shown = self.examples.setdefault(kind, [])
            shown += found[: NUM_EXAMPLES - len(shown)]

    def log_dropped(self) -> None:
        """Log the counts of dropped and repaired records and of unused keys."""
        if self.dropped:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.dropped.items()))
            log.info("%d records dropped: %s", self.dropped.total(), counts)
        if self.repaired:
            kinds = sorted(self.repaired.items())
            counts = ", ".join(f"{kind} {count} ({self.policy(kind)})" for kind, count in kinds)
            log.info("repaired: %s", counts)
        if self.left_out:
            counts = ", ".join(f"{key} {count}" for key, count in self.left_out.most_common())
            log.info("unused columns and keys, with their counts: %s", counts)

    def check(self) -> None:
        """Check that no flaw is an error and that the dropped records are within the budget.

        Raises:
            CapasError: a flaw is an error, with every such kind in the message; or too many were dropped.
        """
        if self.refused:
            raise CapasError(self._refusal())
        num_dropped = self.dropped.total()
        if num_dropped > self._budget * self.num_read:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.dropped.items()))
            first = [
                f"  {kind}: {sentence(example)}"
                for kind, shown in sorted(self.examples.items())
                for example in shown[:3]
            ]
            raise CapasError(
                f"{num_dropped} of {self.num_read} records were dropped ({counts}), more than "
                f"dataset.flaw_budget_fraction={self._budget:g} allows. Fix the records, or raise "
                f"the budget to at least {num_dropped / self.num_read:.6g}. The first:\n"
                + "\n".join(first)
            )

    def _refusal(self) -> str:
        """Return the error message: every kind with its count, its first record, and further places."""
        kinds = [kind for kind in WAYS_OUT if kind in self.refused]
        budget = "dropped records count against dataset.flaw_budget_fraction"
        if self.refused.total() == 1:
            way_out = f"Or set dataset.flaws.{kinds[0]} to {WAYS_OUT[kinds[0]]}; {budget}"
            return f"{sentence(self.examples[kinds[0]][0])}.\n{way_out}"
        lines = [f"{self.refused.total()} of {self.num_read} records cannot be used:"]
        for kind in kinds:
            first, *others = self.examples[kind][:NUM_PLACES]
            lines.append(f"  {kind} {self.refused[kind]}: {sentence(first)}.")
            if others:
                more = "" if self.refused[kind] <= NUM_PLACES else ", ..."
                lines.append(f"    Likewise {'; '.join(map(location, others))}{more}")
            lines.append(f"    Or set dataset.flaws.{kind} to {WAYS_OUT[kind]}")
        return "\n".join([*lines, f"Fix the records; {budget}."])


def sentence(example: Mapping[str, Any]) -> str:
    """Return a sentence with a record's place, the value found, the reason why it is a flaw, and the fix."""
    named = f" (id {example['id']!r})" if example["id"] else ""
    return (
        f"{location(example)}{named}: {_seen(example['field'], example['value'])}: {example['why']}"
    )


def location(place: Mapping[str, Any]) -> str:
    """Return a place as text: 'data/own/x.csv, line 12', or 'owner/name, train record 3'."""
    return f"{place['file']}, {place['at']}"
