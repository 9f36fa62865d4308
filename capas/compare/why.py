"""Find the training records near a test record that only one of two results was trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from capas.compare.sides import Row, Side, read_table
from capas.core.records import RAW, before_last_answer, evenly_spaced, read_records
from capas.evaluation.nearest import nearest_prompts
from capas.evaluation.prompts import read_questions

TRAIN, TEST = "data/raw/train.parquet", "data/raw/test.parquet"
FORMATTED_TRAIN = "data/formatted/train.parquet"
A, B = "A", "B"
_NUM_BESIDE = 2000


class Near(NamedTuple):
    """A training record that only one side (`only`) was trained on, and its similarity to a test record."""

    only: str
    record_id: str
    question: str
    answer: str
    similarity: float


class _Trained(NamedTuple):
    record_id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Training:
    """The training records that only A and that only B was trained on.

    Attributes:
        missing: the sides whose records are not on this machine; the other fields are then empty.
    """

    only_a: list[_Trained]
    only_b: list[_Trained]
    num_same: int
    missing: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return bool(self.only_a or self.only_b)

    def nearest(self, questions: Sequence[str]) -> list[list[Near]]:
        """Find, for each question, the nearest record of each side that the other side lacks."""
        found: list[list[Near]] = [[] for _ in questions]
        for only, records, others in ((A, self.only_a, self.only_b), (B, self.only_b, self.only_a)):
            if not records or not questions:
                continue
            # Words are weighted by rarity. Adding the other side's texts gives both sides the same weights.
            beside = [record.question for record in evenly_spaced(others, _NUM_BESIDE)]
            queries = [*questions, *beside]
            neighbours = nearest_prompts(queries, [record.question for record in records])
            for near, neighbour in zip(found, neighbours, strict=False):
                record = records[neighbour.index]
                near.append(Near(only, *record, neighbour.similarity))
        return [sorted(near, key=lambda one: -one.similarity) for near in found]


def differing_training(a: Side, b: Side) -> Training:
    """Compare the records that two models were trained on, ignoring the records' ids."""
    if _same_files(a, b):
        return Training([], [], 0)
    missing = [letter for letter, side in ((A, a), (B, b)) if side.outputs.find(TRAIN) is None]
    if missing:
        return Training([], [], 0, tuple(missing))
    one, other = (_trained(side) for side in (a, b))
    return Training(
        [record for key, record in one.items() if key not in other],
        [record for key, record in other.items() if key not in one],
        len(one.keys() & other.keys()),
    )


def questions_of(pairs: Sequence[tuple[Row, Row]], b: Side, a: Side) -> dict[str, str]:
    """Return {id: question} of test records, read from data/raw, or else the prompt as far as it is known."""
    ids = {after["id"] for _, after in pairs}
    for side in (b, a):
        if file := side.outputs.find(TEST):
            found = read_questions(file, ids)
            if found.keys() == ids:
                return found
    return {after["id"]: after["prompt"] or "" for _, after in pairs}


def _same_files(a: Side, b: Side) -> bool:
    """Return whether both have the same data set and kept the same records of it."""
    for name in ("data/raw", "data/formatted"):
        one, other = (side.outputs.md5.get(name) for side in (a, b))
        if one is None or one != other:
            return False
    return True


def _trained(side: Side) -> Mapping[tuple[str, str], _Trained]:
    """Return {(conversation, tools): record} of the training records that format kept."""
    raw = side.outputs.find(TRAIN)
    assert raw is not None
    kept = _kept(side.outputs.find(FORMATTED_TRAIN))
    found = {}
    for record in read_records(raw, RAW):
        if kept is not None and record["id"] not in kept:
            continue
        spoken = [(m["role"], m["content"], m["extra"], m["train"]) for m in record["messages"]]
        key = (json.dumps(spoken), record["tools"])
        prompt = before_last_answer(record["messages"])
        question = "\n".join(m["content"] for m in prompt if m["role"] != "system")
        rest = record["messages"][len(prompt) :]
        answer = rest[0]["content"] if rest else ""
        found[key] = _Trained(record["id"], question, answer)
    return found


def _kept(file: Path | None) -> set[str] | None:
    """Return the ids in a formatted split; None if it is not here, and all records count."""
    return None if file is None else {*read_table(file, ["id"])["id"].to_pylist()}
