"""Handle records longer than `dataset.max_length`: raise an error, drop them, or cut them at a turn."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from capas.chat.format import Encoded
from capas.chat.messages import Message
from capas.core.errors import CapasError
from capas.core.ragged import Array
from capas.core.records import IGNORE_INDEX

Messages = list[Message]
Encode = Callable[[Messages], Encoded]


def count_supervised(encoded: Encoded) -> int:
    return sum(label != IGNORE_INDEX for label in encoded.labels)


@dataclass
class Overflow:
    """The policy for one split, and the counts of what it did.

    Args:
        policy: error | drop | truncate. Truncating keeps the turns up to the last answer that fits; if no
            answer fits, the record is dropped.
        budget_fraction: the fraction of the split's records that may be dropped or truncated before the stage
            fails.
    """

    split: str
    max_length: int
    policy: str
    budget_fraction: float
    end_token_ids: Collection[int]
    num_records: int = 0
    truncated: int = 0
    dropped: int = 0
    supervised_tokens_lost: int = 0
    stop_tokens_lost: int = 0
    longest: tuple[int, str] = (0, "")
    too_long: list[str] = field(default_factory=list)

    def see(self, lengths: Array) -> None:
        """Count records that fit, by their lengths."""
        self.num_records += len(lengths)

    def fit(
        self, identity: str, messages: Messages, encoded: Encoded, encode: Encode
    ) -> tuple[Messages, Encoded] | None:
        """Return the messages to keep and their encoding, or None if the record is dropped.

        Args:
            encode: a function that encodes the first messages of this record, up to an answer.
        """
        self.num_records += 1
        self.longest = max(self.longest, (len(encoded.input_ids), identity))
        if len(encoded.input_ids) <= self.max_length:
            return messages, encoded
        self.too_long.append(identity)
        kept = self._truncate(messages, encode) if self.policy == "truncate" else None
        left = kept[1] if kept else Encoded([], [], 0)
        self.supervised_tokens_lost += count_supervised(encoded) - count_supervised(left)
        self.stop_tokens_lost += self._count_stops(encoded) - self._count_stops(left)
        self.truncated += kept is not None
        self.dropped += kept is None
        return kept

    def _truncate(self, messages: Messages, encode: Encode) -> tuple[Messages, Encoded] | None:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for last in reversed(answers[:-1]):
            kept = messages[: last + 1]
            encoded = encode(kept)
            if len(encoded.input_ids) <= self.max_length:
                return kept, encoded
        return None

    def _count_stops(self, encoded: Encoded) -> int:
        return sum(label in self.end_token_ids for label in encoded.labels)

    @property
    def fraction(self) -> float:
        return len(self.too_long) / self.num_records if self.num_records else 0.0

    @property
    def is_within_budget(self) -> bool:
        return (
            not self.too_long if self.policy == "error" else self.fraction <= self.budget_fraction
        )


def check_overflow(splits: Iterable[Overflow]) -> None:
    """Check that no split has more overlong records than its policy allows.

    Raises:
        CapasError: a split has; the message covers all such splits.
    """
    beyond = [split for split in splits if not split.is_within_budget]
    if not beyond:
        return
    counts = ", ".join(f"{len(s.too_long)} of {s.num_records} {s.split} records" for s in beyond)
    longest, identity, split = max((*s.longest, s.split) for s in beyond)
    facts = (
        f"{counts} are longer than dataset.max_length={beyond[0].max_length} tokens; the longest has "
        f"{longest} ({split} record {identity!r})."
    )
    enough = f"dataset.overflow_budget_fraction={_round_up(max(s.fraction for s in beyond))}"
    if beyond[0].policy == "error":
        way_out = f"or dataset.overflow=drop or truncate with a budget ({enough})"
    else:
        allowed = f"{beyond[0].budget_fraction:.4g} of a split"
        facts += f" dataset.overflow={beyond[0].policy} is allowed for at most {allowed}."
        way_out = f"or {enough}"
    raise CapasError(f"{facts} Set dataset.max_length={longest} or more, {way_out}.")


def _round_up(fraction: float) -> float:
    """Round up to three decimals, so that the value suggested in an error message suffices."""
    return min(1.0, -(-fraction * 1000 // 1) / 1000)
