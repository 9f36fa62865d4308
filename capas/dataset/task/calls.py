"""Generate the embedded task: English and Spanish requests, each answered with one function call in JSON.

One record, which travels through every stage::

    system     Turn the request into one function call in JSON.
    user       Could you wake me up at 7:30 on Monday?
    assistant  {"name": "set_alarm", "arguments": {"time": "07:30", "day": "monday"}}

Some conversations have two requests: the assistant asks for a missing slot (``ask``), or the user
corrects one (``fix``). The test split has five kinds of records, the same number of each. They differ in
the parts that are held out from training:

============  ==============================================================================
seen          nothing is held out: training's phrasings and values in a new request
values        every open value (names, titles, texts, times, numbers) is held out
phrasings     the phrasing is held out
combinations  a pair is held out, whose two parts training has separately (see `Combination`)
both          phrasings and values are held out
============  ==============================================================================
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from capas.dataset.task import phrases
from capas.dataset.task.requests import (
    Arguments,
    Combination,
    ValueSource,
    closed_slot,
    draw_ask,
    draw_fix,
    draw_request,
)
from capas.dataset.task.values import draw_value

KINDS = ("seen", "values", "phrasings", "combinations", "both")
COMBINATION_SORTS = ("opening", "currencies", "dialog")
MULTI_TURN_SHARE = 0.3

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A whole conversation, with the parts to which the hold-out rules apply."""

    function: str
    language: str
    turns: str
    messages: list[Message]
    phrasings: tuple[str, ...]
    values: tuple[str | int, ...]
    combinations: tuple[Combination, ...]


def write_call(function: str, arguments: Arguments) -> str:
    """Return the completion to be learned: one JSON object, with the arguments in the function's order."""
    ordered = {name: arguments[name] for name in phrases.FUNCTIONS[function]}
    return json.dumps({"name": function, "arguments": ordered}, ensure_ascii=False)


def draw_conversation(
    rng: Random, held_out_values: bool, held_out_phrasings: bool | None
) -> Conversation:
    """Return one conversation of the task, with any combinations."""
    language = rng.choice(phrases.LANGUAGES)
    draw: ValueSource = partial(draw_value, held_out=held_out_values)
    turns = rng.choice(("ask", "fix")) if rng.random() < MULTI_TURN_SHARE else "single"
    corrections: tuple[str, ...] = ()
    if turns == "ask":
        request, question, answer = draw_ask(rng, language, draw, held_out_phrasings)
        talk = [request.text, question, answer]
        final = request.arguments
    elif turns == "fix":
        request, final, *correction = draw_fix(rng, language, draw, held_out_phrasings)
        talk = [request.text, write_call(request.function, request.arguments), correction[1]]
        corrections = (correction[0],)
    else:
        function = rng.choice(list(phrases.FUNCTIONS))
        request = draw_request(rng, function, language, draw, held_out_phrasings)
        talk, final = [request.text], request.arguments
    talk.append(write_call(request.function, final))
    return Conversation(
        request.function,
        language,
        turns,
        write_messages(talk),
        (request.phrasing, *corrections),
        list_values(request.function, request.arguments, final),
        request.combinations,
    )


def write_messages(talk: list[str]) -> list[Message]:
    """Return the system message, followed by user and assistant messages in turn."""
    roles = ("user", "assistant")
    return [
        {"role": "system", "content": phrases.SYSTEM},
        *({"role": roles[index % 2], "content": text} for index, text in enumerate(talk)),
    ]


def list_values(function: str, *calls: Arguments) -> tuple[str | int, ...]:
    """Return the values of the open slots in one or more calls, each value once."""
    slots = [slot for slot in phrases.FUNCTIONS[function] if not closed_slot(slot)]
    return tuple(dict.fromkeys(arguments[slot] for arguments in calls for slot in slots))


def draw_kind(rng: Random, kind: str) -> Conversation:
    """Return one conversation of a kind; for ``combinations``, all sorts of pairs are equally likely."""
    sort = rng.choice(COMBINATION_SORTS)
    while True:
        drawn = draw_conversation(rng, kind in ("values", "both"), kind in ("phrasings", "both"))
        held_out = {pair.sort for pair in drawn.combinations if pair.held_out}
        if held_out == ({sort} if kind == "combinations" else set()):
            return drawn


def normalise(conversation: Conversation) -> str:
    """Return a conversation's text without case, spaces and punctuation; it is equal for copies."""
    text = " / ".join(message["content"] for message in conversation.messages[1:])
    return " ".join(re.findall(r"\w+|/", text.casefold()))


def generate_conversations(
    seed: int, num_train: int, num_validation: int, num_test_per_kind: int
) -> Iterator[tuple[str, str, Conversation]]:
    """Yield (split, kind, conversation); no conversation occurs twice, not even in different splits."""
    shares = [("train", "seen", num_train), ("validation", "seen", num_validation)]
    shares += [("test", kind, num_test_per_kind) for kind in KINDS]
    known: set[str] = set()
    for split, kind, count in shares:
        rng = Random(f"{seed}/{split}/{kind}")  # a string seed is hashed with sha512 on any machine
        for _ in range(count):
            drawn = draw_kind(rng, kind)
            while normalise(drawn) in known:
                drawn = draw_kind(rng, kind)
            known.add(normalise(drawn))
            yield split, kind, drawn


def generate_records(
    seed: int, num_train: int, num_validation: int, num_test_per_kind: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the records of the three splits, a pure function of the arguments.

    Each record is ``{"id", "messages", "metadata": {"kind", "language", "function", "turns"}}``. The test
    split has `num_test_per_kind` records of every kind in `KINDS`.
    """
    records: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    counts: Counter[str] = Counter()
    generated = generate_conversations(seed, num_train, num_validation, num_test_per_kind)
    for split, kind, drawn in generated:
        prefix = f"{split}-{kind}" if split == "test" else split
        metadata = {
            "kind": kind,
            "language": drawn.language,
            "function": drawn.function,
            "turns": drawn.turns,
        }
        name = f"{prefix}-{counts[prefix]:05d}"
        counts[prefix] += 1
        records[split].append({"id": name, "messages": drawn.messages, "metadata": metadata})
    return records
