"""reports/mask.html: real records, token by token, with what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from capas.chat import ChatFormat
from capas.pieces import Piece, cut
from capas.records import IGNORE_INDEX, Record

TEMPLATE = Path(__file__).parent / "page" / "mask.html.jinja"
FIRST_RECORDS = 3


@dataclass
class Sampler:
    """Keeps the records of a split that a person would want to look at, few in memory.

    The first ones, the longest, the one with most turns, the first that holds the text of a control token.
    """

    chat: ChatFormat
    _kept: dict[str, tuple[Record, Record]] = field(default_factory=dict)
    _count: int = 0

    def see(self, formatted: Record, source: Record) -> None:
        self._count += 1
        if self._count <= FIRST_RECORDS:
            self._kept[f"record {self._count}"] = formatted, source
        self._keep_largest("the longest", formatted, source, lambda f, s: len(f["input_ids"]))
        self._keep_largest("most turns", formatted, source, lambda f, s: len(s["messages"]))
        if "control tokens as text" not in self._kept and any(
            self.chat.count_control_tokens(message["content"]) for message in source["messages"]
        ):
            self._kept["control tokens as text"] = formatted, source

    def _keep_largest(self, why: str, formatted: Record, source: Record, size: Any) -> None:
        if why not in self._kept or size(formatted, source) > size(*self._kept[why]):
            self._kept[why] = formatted, source

    def chosen(self) -> list[tuple[str, Record, Record]]:
        """(why, formatted, source), no record twice."""
        seen: set[str] = set()
        rows = []
        for why, (formatted, source) in self._kept.items():
            if formatted["id"] not in seen:
                seen.add(formatted["id"])
                rows.append((why, formatted, source))
        return rows


def write_mask_page(
    file: Path,
    samples: Mapping[str, Sequence[tuple[str, Record, Record]]],
    facts: Mapping[str, Any],
    chat: ChatFormat,
) -> None:
    """Args: samples, per split: `Sampler.chosen`; facts: reports/format.json."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        splits={
            split: [_view(why, formatted, source, chat) for why, formatted, source in chosen]
            for split, chosen in samples.items()
        },
    )
    file.write_text(page, encoding="utf-8")


def _view(why: str, formatted: Record, source: Record, chat: ChatFormat) -> dict[str, Any]:
    """A record as the page shows it."""
    tokenizer = chat.parsing_tokenizer
    labels = formatted["labels"]
    pieces = cut(tokenizer, formatted["input_ids"])
    return {
        "id": formatted["id"],
        "why": why,
        "metadata": formatted["metadata"],
        "num_tokens": len(labels),
        "num_supervised": sum(label != IGNORE_INDEX for label in labels),
        "lines": _lines([_box(piece, labels, tokenizer) for piece in pieces]),
    }


def _box(piece: Piece, labels: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    trained = [labels[position] != IGNORE_INDEX for position in piece.positions]
    names = " ".join(f"{i} {tokenizer.id_to_token(i)}" for i in piece.ids)
    return {
        "text": piece.text,
        "trained": any(trained),
        "control": piece.control,
        "num": len(piece.ids),
        "title": f"position {piece.positions[0]}, id {names}",
    }


def _lines(boxes: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Broken where the text is: after a token that ends with a line break."""
    lines: list[list[dict[str, Any]]] = [[]]
    for box in boxes:
        lines[-1].append(box)
        if box["text"].endswith("\n"):
            lines.append([])
    return [line for line in lines if line]
