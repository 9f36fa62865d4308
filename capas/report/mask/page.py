"""Write reports/mask.html and mask.es.html: real records, token by token, with trained tokens marked."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from tokenizers import Tokenizer

from capas.chat.batch import Formatted
from capas.chat.format import ChatFormat
from capas.core.language import Language
from capas.core.records import IGNORE_INDEX, Record
from capas.report.mask.pieces import Piece, cut

WORDS = Path(__file__).parent
FIRST_RECORDS = 3
_BOXES = Environment(autoescape=True).from_string((WORDS / "boxes.html.jinja").read_text("utf-8"))
_SHOWN = {" ": "·", "\n": "↵", "\t": "⇥"}


@dataclass
class Sampler:
    """A collector of those records of a split that a person would want to look at; it keeps few in memory.

    It keeps the first records, the longest, the one with most messages, and the first whose text contains a
    control token.
    """

    chat: ChatFormat
    _first: list[tuple[Record, Record]] = field(default_factory=list)
    _kept: dict[str, tuple[Record, Record]] = field(default_factory=dict)

    def look(self, formatted: Formatted) -> None:
        """Look at the next batch of the split."""
        if not len(formatted.held):
            return
        places = [*range(FIRST_RECORDS - len(self._first)), int(np.argmax(formatted.held))]
        places += [
            int(np.argmax(formatted.columns.ids.lengths)),
            int(np.argmax(formatted.num_messages)),
        ]
        for place in dict.fromkeys(places):
            if place < len(formatted.held):
                record = formatted.records.slice(place, 1).to_pylist()[0]
                self.see(record, {"messages": formatted.messages(place)})

    def see(self, formatted: Record, source: Record) -> None:
        """Look at a formatted record and its messages."""
        if len(self._first) < FIRST_RECORDS:
            self._first.append((formatted, source))
        self._keep_largest("longest", formatted, source, lambda f, s: len(f["input_ids"]))
        self._keep_largest("most_messages", formatted, source, lambda f, s: len(s["messages"]))
        if "control_tokens" not in self._kept and any(
            self.chat.count_control_tokens(message["content"]) for message in source["messages"]
        ):
            self._kept["control_tokens"] = formatted, source

    def _keep_largest(
        self, why: str, formatted: Record, source: Record, size: Callable[[Record, Record], int]
    ) -> None:
        if why not in self._kept or size(formatted, source) > size(*self._kept[why]):
            self._kept[why] = formatted, source

    def chosen(self) -> list[tuple[str, Record, Record]]:
        """Return (first | longest | most_messages | control_tokens, formatted, source), no record twice."""
        rows: dict[str, tuple[str, Record, Record]] = {}
        first = [("first", pair) for pair in self._first]
        for why, (formatted, source) in (*first, *self._kept.items()):
            rows.setdefault(formatted["id"], (why, formatted, source))
        return list(rows.values())


def write_mask_pages(
    files: Mapping[str, Path],
    samples: Mapping[str, Sequence[tuple[str, Record, Record]]],
    facts: Mapping[str, Any],
    chat: ChatFormat,
) -> None:
    """Write self-contained pages.

    Args:
        files: {language code: page}.
        samples: {split: the result of `Sampler.chosen`}.
        facts: the content of reports/format.json.
        chat: the format that wrote the records.
    """
    views = {
        split: [
            view(why, formatted, source, chat, facts["train_on"])
            for why, formatted, source in chosen
        ]
        for split, chosen in samples.items()
    }
    for code, file in files.items():
        language = Language(WORDS, code, {**facts, "end_token": chat.end_token, "samples": views})
        file.write_text(language.render("mask.html.jinja"), encoding="utf-8")


def view(
    why: str, formatted: Record, source: Record, chat: ChatFormat, train_on: str
) -> dict[str, Any]:
    """Return a record as the pages show it: lines of boxes, counts, and a verdict on its mask."""
    tokenizer = chat.tokenizer
    ids, labels = formatted["input_ids"], formatted["labels"]
    pieces = cut(tokenizer, ids)
    boxes = [_box(piece, labels, tokenizer) for piece in pieces]
    return {
        "id": formatted["id"],
        "why": why,
        "num_tokens": len(ids),
        "num_trained": sum(label != IGNORE_INDEX for label in labels),
        "num_messages": len(source["messages"]),
        "lines": [
            {"boxes": _html(line), "trained": any(box["trained"] for box in line)}
            for line in _lines(boxes)
        ],
        "verdict": _verdict(
            _trained_texts(pieces, labels), source["messages"], chat.end_tokens, train_on
        ),
    }


def _html(boxes: Sequence[dict[str, Any]]) -> Markup:
    """Return boxes as HTML, which all languages share: they are most of a page."""
    return Markup(_BOXES.render(boxes=boxes).rstrip())


def _box(piece: Piece, labels: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    names = " + ".join(f"id {i} {tokenizer.id_to_token(i)}" for i in piece.ids)
    return {
        "runs": list(_runs(piece.text)),
        "breaks": piece.text.endswith("\n"),
        "trained": any(labels[position] != IGNORE_INDEX for position in piece.positions),
        "control": piece.control,
        "ids": " ".join(map(str, piece.ids)),
        "title": f"#{piece.positions[0]} · {names}",
    }


def _runs(text: str) -> Iterator[tuple[bool, str]]:
    """Yield (whether it stands for invisible characters, the text to show)."""
    for hidden, characters in groupby(text, _is_hidden):
        shown = [_SHOWN.get(c, f"U+{ord(c):04X}") if hidden else c for c in characters]
        yield hidden, "".join(shown)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp", "Co")


def _lines(boxes: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield lines of boxes, broken after line breaks and where training begins or ends.

    All boxes of a line are then trained, or none is.
    """
    line: list[dict[str, Any]] = []
    for box in boxes:
        turns = bool(line) and box["trained"] != line[-1]["trained"]
        if turns and not (box["breaks"] and line[-1]["trained"] and line[-1]["control"]):
            yield line
            line = []
        line.append(box)
        if box["breaks"]:
            yield line
            line = []
    if line:
        yield line


def _trained_texts(pieces: Sequence[Piece], labels: Sequence[int]) -> list[str]:
    """Return the text of every stretch of trained tokens."""
    stretches = groupby(pieces, lambda piece: labels[piece.positions[-1]] != IGNORE_INDEX)
    return ["".join(piece.text for piece in stretch) for trained, stretch in stretches if trained]


def _verdict(
    found: Sequence[str],
    messages: Sequence[Mapping[str, Any]],
    end_tokens: Sequence[str],
    train_on: str,
) -> str:
    """Return all, exact, blanks or different: the trained text compared with answers and end token."""
    if train_on == "all":
        return "all"
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m.get("train", True)]
    wanted = answers[-1:] if train_on == "last_assistant" else answers
    trained = [_without_end(text, end_tokens) for text in found]
    if None not in trained and trained == wanted:
        return "exact"
    bare = [None if text is None else text.strip() for text in trained]
    return "blanks" if bare == [text.strip() for text in wanted] else "different"


def _without_end(text: str, end_tokens: Sequence[str]) -> str | None:
    """Return the text without its end token, or None if it has none."""
    return next((text.removesuffix(end) for end in end_tokens if text.endswith(end)), None)
