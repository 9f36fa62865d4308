"""What formatted records must be: looked at once more, without the plan that they came from.

Of every record: one beginning of text, something to train on, an end token behind every trained stretch. Of a
sample: the ids of the rendered text, as from `apply_chat_template`, and the trained text of the answers.
"""

import re

import numpy as np

from capas.chat.batch import Formatted
from capas.chat.format import ChatFormat
from capas.chat.messages import TEXT, Message, has_own_scaffold
from capas.errors import CapasError
from capas.ragged import Array

CHECKED_FIRST, CHECKED_EVERY = 200, 250  # records of a split that are in the sample
_DEFECT = "This is a defect of capas or of the chat template; please report it with this record."
_BLANKS = re.compile(r"\s+")


class Audit:
    """Looks at the batches of one split, in order."""

    def __init__(self, chat: ChatFormat, train_on: str) -> None:
        self._chat, self._train_on = chat, train_on
        self._seen = 0
        self.num_checked = 0
        self._leads = self._find_leads()

    def check(self, split: str, formatted: Formatted) -> None:
        """Raises CapasError, naming the first record in which something is wrong."""
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
        stops = np.isin(ids, [chat.end_token_id, *chat.stop_token_ids])
        problems = {
            "no token of it is trained": ~np.logical_or.reduceat(trained, starts),
            "a trained stretch ends without an end token": np.logical_or.reduceat(
                ends & ~stops, starts
            ),
        }
        if self._train_on == "all":
            del problems["a trained stretch ends without an end token"]
        if chat.bos_token_id is not None:
            found = np.add.reduceat((ids == chat.bos_token_id).astype(np.int64), starts)
            problems["the beginning of a text stands in it more than once"] = found > 1
            inside = np.append(False, ids[1:] == chat.bos_token_id)
            inside[starts] = False
            problems["the beginning of a text stands inside it"] = np.logical_or.reduceat(
                inside, starts
            )
        return problems

    def _check_sample(self, split: str, formatted: Formatted) -> None:
        places = [
            place
            for place in range(len(formatted.columns.rows))
            if (self._seen + place < CHECKED_FIRST or (self._seen + place) % CHECKED_EVERY == 0)
            and not formatted.held[place]
            and formatted.messages(place)[0]["role"] != TEXT
        ]
        self._seen += len(formatted.columns.rows)
        texts = [
            self._chat.render(formatted.messages(p), False, formatted.tools(p)) for p in places
        ]
        for place, expected in zip(places, self._chat.encode_rendered(texts), strict=True):
            found = formatted.columns.ids.row(place).tolist()
            if found != expected:
                problem = _difference(found, expected, self._chat)
                raise CapasError(f"{split} record {formatted.identity(place)!r}: {problem}")
        self._check_trained_texts(split, formatted, places)
        self.num_checked += len(places)

    def _check_trained_texts(self, split: str, formatted: Formatted, places: list[int]) -> None:
        """Every trained stretch is what a template puts before an answer, the answer, and its end token."""
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
                    f"{split} record {formatted.identity(place)!r}: the trained tokens say "
                    f"{''.join(found)[:200]!r}, and the answers are {''.join(wanted)[:200]!r}. {_DEFECT}"
                )

    def _answers(self, messages: list[Message]) -> list[str]:
        answers = [m["content"] for m in messages if m["role"] == "assistant" and m["train"]]
        return answers[-1:] if self._train_on == "last_assistant" else answers

    def _trained_texts(self, formatted: Formatted, place: int) -> list[str]:
        """Without blanks and end tokens."""
        ids = formatted.columns.ids.row(place)
        trained = formatted.columns.trained.row(place)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(np.int8), [0]])))
        stretches = [ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
        return [self._without_end(stretch) for stretch in stretches]

    def _without_end(self, ids: list[int]) -> str:
        return self._bare(self._chat.decode([i for i in ids if i != self._chat.end_token_id]))

    def _with_leads(self, found: list[str], wanted: list[str]) -> bool:
        return len(found) == len(wanted) and all(
            text in {lead + answer for lead in self._leads}
            for text, answer in zip(found, wanted, strict=True)
        )

    def _find_leads(self) -> set[str]:
        """What the template lets the model write before an answer, seen in a conversation of two answers."""
        told: list[Message] = [
            {"role": role, "content": content}
            for role, content in zip(
                ("user", "assistant") * 2, ("a", "bcd", "e", "fgh"), strict=True
            )
        ]
        encoded = self._chat.encode(told)
        trained = [
            i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == i
        ]
        text = self._without_end(trained)
        first, _, rest = text.partition("bcd")
        return {"", first, rest.partition("fgh")[0]}

    def _bare(self, text: str) -> str:
        return _BLANKS.sub("", text.replace("▁", ""))


def _difference(found: list[int], expected: list[int], chat: ChatFormat) -> str:
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )

    def show(ids: list[int]) -> str:
        near = ids[max(0, at - 3) : at + 5]
        return " ".join(f"{i}={chat.tokenizer.id_to_token(i)!r}" for i in near)

    return (
        f"its ids are not those of the rendered text, from token {at} on; the tokenizer does something at "
        "the borders of messages that capas does not know. Please report it with this record.\n"
        f"  message by message: {show(found)}\n  rendered text:      {show(expected)}"
    )
