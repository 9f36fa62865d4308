"""What may be wrong with a record, and what is done about it: an error, or a policy that is counted."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from capas.errors import CapasError

MALFORMED, NO_ANSWER, EMPTY_ANSWER = "malformed", "no_answer", "empty_answer"
INVALID_TEXT, CONSECUTIVE, SYSTEM = "invalid_text", "consecutive_roles", "system_in_the_middle"
ERROR, DROP, REPLACE, MERGE, KEEP = "error", "drop", "replace", "merge", "keep"
WAYS_OUT = {
    MALFORMED: "drop",
    NO_ANSWER: "drop",
    EMPTY_ANSWER: "drop",
    INVALID_TEXT: "replace (by U+FFFD) or drop",
    CONSECUTIVE: "merge, keep or drop",
    SYSTEM: "keep or drop",
}
NUM_EXAMPLES = 20  # shown of each reason
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 4, 80, 80, 80


class Flaw(Exception):  # noqa: N818 (it stands as a value, too, where a row cannot be read)
    """A record is not as it must be: `field` says where in it, `text` what is wrong and how to mend it."""

    def __init__(self, kind: str, field: str, value: Any, text: str) -> None:
        super().__init__(text)
        self.kind, self.field, self.value, self.text = kind, field, value, text

    def __reduce__(self) -> Any:
        return Flaw, (self.kind, self.field, self.value, self.text)


def show(value: Any) -> str:
    """The value as Python writes it, shortened; however deep or long it is."""
    text = repr(value[:200]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """Halves of surrogate pairs as backslash escapes: no file could hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _seen(field: str, value: str) -> str:
    return f"{field} is {value}" if field else value


class Flaws:
    """The policies of `dataset.flaws`, and what they did so far."""

    def __init__(self, policies: Mapping[str, str], budget_fraction: float) -> None:
        self._policies, self._budget = dict(policies), budget_fraction
        self.num_read = 0
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def policy(self, kind: str) -> str:
        return self._policies[kind]

    def allows(self, flaw: Flaw, *repairs: str) -> bool:
        """Whether the policy of this kind is one of `repairs`, which is counted; otherwise raises `flaw`."""
        if self._policies[flaw.kind] not in repairs:
            raise flaw
        self.repaired[flaw.kind] += 1
        return True

    def leave_out(self, key: str) -> None:
        """Count a key that no stage uses; `key` is of the record, or 'messages[].key' of a message."""
        self.left_out[printable(key)] += 1

    def drop(self, flaw: Flaw, place: Mapping[str, Any], identity: str) -> None:
        """Leave the record at `place` out.

        Raises:
            CapasError: the policy is not to drop: file, line or record, id, field, value, the way out.
        """
        found = _seen(flaw.field, show(flaw.value))
        if self._policies[flaw.kind] != DROP:
            named = f" (id {identity!r})" if identity else ""
            raise CapasError(
                f"{location(place)}{named}: {found}: {flaw.text}.\nOr set "
                f"dataset.flaws.{flaw.kind} to {WAYS_OUT[flaw.kind]}; what is dropped must stay within "
                "dataset.flaw_budget_fraction"
            )
        self.dropped[flaw.kind] += 1
        shown = self.examples.setdefault(flaw.kind, [])
        if len(shown) < NUM_EXAMPLES:
            about = {"id": printable(identity), "field": flaw.field, "value": show(flaw.value)}
            shown.append({**place, **about, "why": flaw.text})

    def fresh(self) -> "Flaws":
        """The same policies, and nothing done yet."""
        return Flaws(self._policies, self._budget)

    def add(self, later: "Flaws") -> None:
        """Count what was done about later records as well."""
        self.num_read += later.num_read
        self.dropped += later.dropped
        self.repaired += later.repaired
        self.left_out += later.left_out
        for kind, found in later.examples.items():
            shown = self.examples.setdefault(kind, [])
            shown += found[: NUM_EXAMPLES - len(shown)]

    def check_budget(self) -> None:
        """Raises CapasError where more was dropped than `dataset.flaw_budget_fraction` allows."""
        num_dropped = self.dropped.total()
        if num_dropped > self._budget * self.num_read:
            counts = ", ".join(f"{kind} {count}" for kind, count in sorted(self.dropped.items()))
            first = [
                f"  {kind}: {location(e)}: {_seen(e['field'], e['value'])}: {e['why']}"
                for kind, shown in sorted(self.examples.items())
                for e in shown[:3]
            ]
            raise CapasError(
                f"{num_dropped} of {self.num_read} records were dropped ({counts}), more than "
                f"dataset.flaw_budget_fraction={self._budget:g} allows. Mend them, or raise the budget to at "
                f"least {num_dropped / self.num_read:.6g}. The first of them:\n" + "\n".join(first)
            )


def location(place: Mapping[str, Any]) -> str:
    """'data/own/x.csv, line 12', or 'owner/name, train record 3'."""
    return f"{place['file']}, {place['at']}"
