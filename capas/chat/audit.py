"""Check formatted records a second time, independently of the plan from which they were made.

Every record is checked: it begins with the prompt of its last answer, and training starts where that prompt
ends; every trained span ends with an end token; bos_token, with which some families begin every turn, occurs
as often as the template writes it. In a sample of the records, the ids of prompt and conversation must be
those of the rendered texts, and the trained tokens must decode to the answers.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from capas.chat.batch import Formatted, Key
from capas.chat.expected import reference_ids
from capas.chat.format import ChatFormat, Encoded, first_difference
from capas.chat.messages import Message, Tools, has_own_scaffold
from capas.chat.template import RecordRefusal
from capas.core.errors import CapasError
from capas.core.ragged import Array, any_in_row, gather
from capas.core.records import TEXT

CHECKED_FIRST, CHECKED_EVERY = 200, 250  # the sample: a split's first 200 records, then every 250th
NUM_SAMPLED = 20  # records per split that are kept to be compared with transformers
_DEFECT = "This is a defect of capas or of the chat template; please report it with this record."
_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True)
class Sampled:
    """A sampled record with the ids that `apply_chat_template` should give for it.

    `ids` and `prompt_ids` are None where the two differ on purpose, because an answer begins with a token of
    its own (see `reference_ids`). `prompt_ids` is also None if the last answer has no prompt.
    """

    identity: str
    messages: list[Message]
    tools: Tools
    ids: list[int] | None
    prompt_ids: list[int] | None


class Audit:
    """An audit of one split, whose batches are checked in order."""

    def __init__(self, chat: ChatFormat, train_on: str) -> None:
        self._chat, self._train_on = chat, train_on
        self._seen = 0
        self.num_checked = 0
        self._leads = self._find_leads()
        self._num_begun: dict[Key, int] = {}
        self.sample: list[Sampled] = []

    def check(self, split: str, formatted: Formatted) -> None:
        """Check a batch of formatted records.

        Raises:
            CapasError: a record is wrong; the message names the first one.
        """
        if not len(formatted.columns.rows):
            return
        for problem, wrong in self._problems(formatted).items():
            if wrong.any():
                place = int(np.flatnonzero(wrong)[0])
                raise CapasError(
                    f"{split} record {formatted.identity(place)!r}: {problem}. {_DEFECT}"
                )
        self._check_sample(split, formatted)

    def _problems(self, formatted: Formatted) -> dict[str, Array]:
        columns, chat = formatted.columns, self._chat
        ids, trained = columns.ids.values, columns.trained.values
        starts, last = columns.ids.starts, columns.ids.offsets[1:] - 1
        goes_on = np.append(trained[1:], False)
        goes_on[last] = False
        ends = trained & ~goes_on
        # The model need not write an end token that does not stop generation.
        unwritten = [i for i in chat.end_token_ids if i not in chat.stop_token_ids]
        following = np.append(ids[1:], -1)
        following[last] = -1
        ended = np.isin(ids, chat.stop_token_ids) | np.isin(following, unwritten)
        prompts = columns.prompts
        common = np.minimum(prompts.lengths, columns.ids.lengths)
        found, expected = (
            gather(ids, starts, common),
            gather(prompts.values, prompts.starts, common),
        )
        differs = any_in_row(found.values != expected.values, expected.offsets)
        after = trained[np.minimum(starts + common, last)]
        problems = {
            "no token of the record is trained": ~np.logical_or.reduceat(trained, starts),
            "a trained stretch ends without an end token": np.logical_or.reduceat(
                ends & ~ended, starts
            ),
        }
        if self._train_on == "all":
            del problems["a trained stretch ends without an end token"]
        if chat.bos_token_id is not None:
            begun = np.add.reduceat((ids == chat.bos_token_id).astype(np.int64), starts)
            several = begun > (ids[starts] == chat.bos_token_id)  # also after the first position
            for place in np.flatnonzero(several).tolist():
                several[place] = begun[place] != self._count_begun(formatted, place)
            problems["the number of bos_token differs from the rendered text"] = several
        problems["the prompt of its last answer is not a prefix of the record"] = differs | (
            prompts.lengths >= columns.ids.lengths
        )
        problems["training of its last answer does not begin where the prompt ends"] = (
            _last_is_trained(formatted) & ~after
        )
        return problems

    def _count_begun(self, formatted: Formatted, place: int) -> int:
        """Return how often the template writes bos_token around the contents of a record."""
        row = int(formatted.columns.rows[place])
        key = None if row in formatted.singles else formatted.source.key(row)
        if key is None or self._chat.allows_bos:
            return self._chat.count_bos(formatted.messages(place), formatted.tools(place))
        if key not in self._num_begun:
            self._num_begun[key] = self._chat.count_bos(formatted.messages(place))
        return self._num_begun[key]

    def _check_sample(self, split: str, formatted: Formatted) -> None:
        places = [
            place
            for place in range(len(formatted.columns.rows))
            if (self._seen + place < CHECKED_FIRST or (self._seen + place) % CHECKED_EVERY == 0)
            and not formatted.held[place]
            and formatted.messages(place)[0]["role"] != TEXT
        ]
        self._seen += len(formatted.columns.rows)
        conversations = [(formatted.messages(place), formatted.tools(place)) for place in places]
        texts = [self._chat.render(messages, False, tools) for messages, tools in conversations]
        encoded = self._chat.encode_rendered(texts)
        for place, expected, (messages, tools) in zip(places, encoded, conversations, strict=True):
            whose, prompted = f"{split} record {formatted.identity(place)!r}", _prompted(messages)
            found = formatted.columns.ids.row(place).tolist()
            prompt = formatted.columns.prompts.row(place).tolist()
            alike = self._compare(whose, "its ids", found, expected, messages, False, tools)
            if prompted:
                text = self._chat.render(prompted, True, tools)
                ids = self._chat.encode_rendered([text])[0]
                same = self._compare(whose, "its prompt's ids", prompt, ids, prompted, True, tools)
            if len(self.sample) < NUM_SAMPLED:
                kept = found if alike else None, prompt if prompted and same else None
                self.sample.append(Sampled(formatted.identity(place), messages, tools, *kept))
        self._check_trained_texts(split, formatted, places)
        self.num_checked += len(places)

    def _compare(
        self, record: str, called: str, found: list[int], expected: list[int], *shown: Any
    ) -> bool:
        """Return whether the ids equal those of the rendered text, encoded whole.

        If they do not, they must equal `reference_ids`.

        Args:
            shown: arguments of `reference_ids`.

        Raises:
            CapasError: the ids equal neither.
        """
        if found == expected:
            return True
        expected = reference_ids(self._chat, *shown)
        if found != expected:
            raise CapasError(f"{record}: {_difference(found, expected, self._chat, called)}")
        return False

    def _check_trained_texts(self, split: str, formatted: Formatted, places: list[int]) -> None:
        """Check that the trained spans decode to the answers, with the template's text before each, if any.

        Raises:
            CapasError: a record's trained tokens decode to something else.
        """
        if self._train_on == "all":
            return
        answers = {
            place: self._answers(formatted.messages(place))
            for place in places
            if not has_own_scaffold(formatted.messages(place), formatted.tools(place))
        }
        flat = [answer for of_record in answers.values() for answer in of_record]
        bare = iter([self._bare(text) for text in self._chat.as_decoded(flat)])
        for place, of_record in answers.items():
            wanted = [next(bare) for _ in of_record]
            found = self._trained_texts(formatted, place)
            if "".join(found) != "".join(wanted) and not self._with_leads(found, wanted):
                raise CapasError(
                    f"{split} record {formatted.identity(place)!r}: the trained tokens decode to "
                    f"{''.join(found)[:200]!r}, but the answers are {''.join(wanted)[:200]!r}. "
                    f"{_DEFECT}"
                )

    def _answers(self, messages: list[Message]) -> list[str]:
        answers = [m["content"] for m in messages if m["role"] == "assistant" and m["train"]]
        return answers[-1:] if self._train_on == "last_assistant" else answers

    def _trained_texts(self, formatted: Formatted, place: int) -> list[str]:
        """Return the text of each trained span, without whitespace and end tokens."""
        ids = formatted.columns.ids.row(place)
        trained = formatted.columns.trained.row(place)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(np.int8), [0]])))
        stretches = [ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
        return [self._without_end(stretch) for stretch in stretches]

    def _without_end(self, ids: list[int]) -> str:
        return self._bare(self._chat.decode([i for i in ids if i not in self._chat.end_token_ids]))

    def _with_leads(self, found: list[str], wanted: list[str]) -> bool:
        return len(found) == len(wanted) and all(
            text in {lead + answer for lead in self._leads}
            for text, answer in zip(found, wanted, strict=True)
        )

    def _find_leads(self) -> set[str]:
        """Return the texts that the model writes before an answer, found in a conversation of two answers."""
        messages: list[Message] = [
            {"role": role, "content": content}
            for role, content in zip(
                ("user", "assistant") * 2, ("a", "bcd", "e", "fgh"), strict=True
            )
        ]
        # Some families allow one turn only, or treat the last one differently.
        for shown in (messages, messages[:2]):
            with suppress(RecordRefusal):
                return self._leads_of(self._chat.encode(shown))
        return {""}

    def _leads_of(self, encoded: Encoded) -> set[str]:
        trained = [
            i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == i
        ]
        text = self._without_end(trained)
        first, _, rest = text.partition("bcd")
        return {"", first, rest.partition("fgh")[0]}

    def _bare(self, text: str) -> str:
        return _BLANKS.sub("", text.replace("▁", ""))


def _last_is_trained(formatted: Formatted) -> Array:
    """Return [records] bool: whether the last answer of each record is trained."""
    source, rows = formatted.source, formatted.columns.rows
    trained = np.array(source.trained, bool)[np.array(source.last_answers, np.int64)[rows]]
    for place, row in enumerate(rows.tolist()):
        if row in formatted.singles:
            trained[place] = formatted.singles[row].messages[-1].get("train", True)
    return trained


def _prompted(messages: list[Message]) -> list[Message]:
    """Return the messages before the last answer.

    Return no messages if another answer comes right before it: both may be one turn.
    """
    before = messages[:-1]
    return [] if before and before[-1]["role"] == "assistant" else before


def _difference(found: list[int], expected: list[int], chat: ChatFormat, called: str) -> str:
    at = first_difference(found, expected)

    def show(ids: list[int]) -> str:
        near = ids[max(0, at - 3) : at + 5]
        return " ".join(f"{i}={chat.tokenizer.id_to_token(i)!r}" for i in near)

    return (
        f"{called} differ from the ids of the rendered text from token {at} on: the tokenizer "
        "treats message boundaries in a way that capas does not support. Please report it with "
        f"this record.\n  message by message: {show(found)}\n  rendered text:      {show(expected)}"
    )
