"""The embedded task: English and Spanish requests, each answered with one function call in JSON.

One record, as it travels through every stage::

    system     Turn the request into one function call in JSON.
    user       Could you wake me up at 7:30 on Monday?
    assistant  {"name": "set_alarm", "arguments": {"time": "07:30", "day": "monday"}}

Some conversations have two requests: the assistant asks for a slot that is missing (``ask``), or the
user corrects one (``fix``). The test split has five kinds of records, as many of each, which differ in
what training never showed:

============  ==============================================================================
seen          nothing: phrasings and values of training in a new request
values        every open value (names, titles, texts, times, numbers) is held out
phrasings     the phrasing is held out
combinations  a pair is held out whose two parts training shows apart (see `Combination`)
both          held-out phrasings and held-out values
============  ==============================================================================
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

from capas import phrases
from capas.values import draw_value, is_held_out

KINDS = ("seen", "values", "phrasings", "combinations", "both")
TURNS = ("single", "ask", "fix")
MULTI_TURN_SHARE = 0.3
PLAIN_SHARE = 0.2  # of the requests, typed without capitals and full stop
OPTIONAL_SHARE = 0.6  # of the requests that could name a day do

Arguments = dict[str, str | int]
Message = dict[str, str]
ValueSource = Callable[[Random, str, str], str | int]  # (rng, slot, language) -> value


@dataclass(frozen=True)
class Combination:
    """Two parts of a request that training shows, but only apart when the pair is held out.

    `sort` is ``opening`` (phrasing, opening), ``currencies`` (from, to) or ``dialog`` (function, turns
    and language).
    """

    sort: str
    first: str
    second: str

    @property
    def held_out(self) -> bool:
        return is_held_out(f"{self.sort}|{self.first}|{self.second}")


COMBINATION_SORTS = ("opening", "currencies", "dialog")


@dataclass(frozen=True)
class Request:
    """One thing that a user wants, said once: the call that answers it, and what it was made of."""

    function: str
    language: str
    arguments: Arguments
    text: str
    phrasing: str
    combinations: tuple[Combination, ...]


@dataclass(frozen=True)
class Conversation:
    """A whole conversation, with the parts that the hold-out rules speak about."""

    function: str
    language: str
    turns: str
    messages: list[Message]
    phrasings: tuple[str, ...]
    values: tuple[str | int, ...]
    combinations: tuple[Combination, ...]


def write_call(function: str, arguments: Arguments) -> str:
    """The completion that training teaches: one JSON object, arguments in the order of the function."""
    ordered = {name: arguments[name] for name in phrases.FUNCTIONS[function]}
    return json.dumps({"name": function, "arguments": ordered}, ensure_ascii=False)


def closed_slot(slot: str) -> str | None:
    """The table of `phrases.CLOSED` that holds a slot's values; None for an open slot."""
    if slot in ("from", "to"):
        return "currency"
    return slot if slot in phrases.CLOSED else None


def draw_arguments(rng: Random, function: str, language: str, draw: ValueSource) -> Arguments:
    """Arguments of a call: open values from `draw`, closed ones from their table, all different."""
    arguments: Arguments = {}
    for slot in phrases.FUNCTIONS[function]:
        table = closed_slot(slot)
        if table is None:
            arguments[slot] = draw(rng, slot, language)
        else:
            values = [value for value in phrases.CLOSED[table] if value not in arguments.values()]
            arguments[slot] = rng.choice(values)
    return arguments


def say_value(slot: str, value: str | int, language: str) -> str:
    """How a user says a value: ``"07:30"`` is said ``7:30``, ``"kitchen"`` is said ``la cocina``."""
    table = closed_slot(slot)
    if table is not None:
        return phrases.CLOSED[table][str(value)][language]
    if slot == "time":
        hours, minutes = str(value).split(":")
        return f"{int(hours)}:{minutes}"
    return str(value)


def fill_phrasing(rng: Random, phrasing: str, language: str, arguments: Arguments) -> str:
    """Fills the slots. Where an optional day is left out, `arguments` are changed to today."""

    def choose(match: re.Match[str]) -> str:
        if rng.random() < OPTIONAL_SHARE:
            return match.group(1)
        arguments["day"] = "today"
        return ""

    text = re.sub(r"\[(.*?)\]", choose, phrasing)
    said = {slot: say_value(slot, value, language) for slot, value in arguments.items()}
    return contract_articles(text.format(**said), language)


def contract_articles(text: str, language: str) -> str:
    """Spanish says ``del`` for ``de el`` and ``al`` for ``a el``."""
    if language != "es":
        return text
    return re.sub(r"\b(de|a) el\b", lambda match: {"de": "del", "a": "al"}[match.group(1)], text)


def capitalise(text: str) -> str:
    """Upper case for the first letter, past an opening question mark."""
    start = 1 if text.startswith("¿") else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def punctuate(text: str) -> str:
    """A sentence as careful users write it."""
    return capitalise(text if text.endswith("?") else f"{text}.")


def say_request(
    rng: Random, core: str, function: str, language: str, form: str, opening: str
) -> str:
    """Puts opening, closing, capitals and punctuation around the core of a request."""
    asks = opening in phrases.QUESTION_OPENINGS
    polite = "please" in opening or "por favor" in opening
    if function != "send_message" and form != "question" and not polite:  # a text runs to the end
        core += rng.choice(phrases.CLOSINGS[language])
    if rng.random() < PLAIN_SHARE:
        return opening + core
    if not asks and form != "question":
        return punctuate(opening + core)
    if language == "en":
        return capitalise(f"{opening}{core}?")
    return capitalise(f"¿{opening}{core}?" if asks else f"{opening}¿{core}?")


def list_phrasings(function: str, language: str, held_out: bool | None) -> list[tuple[str, str]]:
    """Pairs (form, phrasing) of training, held out, or, for None, all."""
    forms = phrases.PHRASINGS[function][language]
    sides = (False, True) if held_out is None else (held_out,)
    return [(form, text) for form in forms for side in sides for text in forms[form][side]]


def draw_request(
    rng: Random, function: str, language: str, draw: ValueSource, held_out: bool | None
) -> Request:
    """One complete request; `held_out` says which phrasings to use (None: all of them)."""
    arguments = draw_arguments(rng, function, language, draw)
    form, phrasing = rng.choice(list_phrasings(function, language, held_out))
    opening = rng.choice(phrases.OPENINGS[language][form])
    core = fill_phrasing(rng, phrasing, language, arguments)
    combinations = []
    if opening:
        combinations.append(Combination("opening", phrasing, opening))
    if "from" in arguments:
        pair = str(arguments["from"]), str(arguments["to"])
        combinations.append(Combination("currencies", *pair))
    text = say_request(rng, core, function, language, form, opening)
    return Request(function, language, arguments, text, phrasing, tuple(combinations))


def choose(rng: Random, sides: tuple[Sequence[str], Sequence[str]], held_out: bool | None) -> str:
    """One phrasing of (training, held out), of either when `held_out` is None."""
    pool = [*sides[0], *sides[1]] if held_out is None else sides[held_out]
    return rng.choice(pool)


def say_bare(slot: str, value: str | int, language: str) -> str:
    """A value said on its own: ``at 7:30``, ``10 minutos``, ``Ana``."""
    said = say_value(slot, value, language)
    return phrases.BARE[language].get(slot, "{}").format(said)


def open_values(function: str, arguments: Arguments) -> tuple[str | int, ...]:
    """The arguments that come from no closed table."""
    return tuple(arguments[slot] for slot in phrases.FUNCTIONS[function] if not closed_slot(slot))


def draw_ask(
    rng: Random, language: str, draw: ValueSource, held_out: bool | None
) -> tuple[Request, str, str]:
    """A request without its main slot, the question that it raises and the user's answer."""
    function = rng.choice(list(phrases.MISSING))
    slot, texts = phrases.MISSING[function]
    question, sides = texts[language]
    phrasing = choose(rng, sides, held_out)
    arguments = draw_arguments(rng, function, language, draw)
    if "day" in arguments:
        arguments["day"] = "today"
    dialog = Combination("dialog", function, f"ask|{language}")
    request = Request(function, language, arguments, punctuate(phrasing), phrasing, (dialog,))
    answer = say_bare(slot, arguments[slot], language)
    return request, question, answer if rng.random() < PLAIN_SHARE else punctuate(answer)


def draw_fix(
    rng: Random, language: str, draw: ValueSource, held_out: bool | None
) -> tuple[Request, Arguments, str, str]:
    """A request, the arguments as the user then corrects them, and the correction: phrasing, text."""
    function = rng.choice(list(phrases.CORRECTED))
    slot = phrases.CORRECTED[function]
    request = draw_request(rng, function, language, draw, held_out)
    corrected = dict(request.arguments)
    while corrected[slot] == request.arguments[slot]:
        corrected[slot] = draw(rng, slot, language)
    phrasing = choose(rng, phrases.CORRECTIONS[language], held_out)
    text = punctuate(phrasing.format(value=say_bare(slot, corrected[slot], language)))
    dialog = Combination("dialog", function, f"fix|{language}")
    request = replace(request, combinations=(*request.combinations, dialog))
    return request, corrected, phrasing, text


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def draw_conversation(
    rng: Random, held_out_values: bool, held_out_phrasings: bool | None
) -> Conversation:
    """One conversation of the task, without regard to its combinations."""
    language = rng.choice(phrases.LANGUAGES)
    draw: ValueSource = partial(draw_value, held_out=held_out_values)
    turns = rng.choice(("ask", "fix")) if rng.random() < MULTI_TURN_SHARE else "single"
    told: list[Message] = [say("system", phrases.SYSTEM)]
    said: tuple[str, ...] = ()
    if turns == "ask":
        request, question, answer = draw_ask(rng, language, draw, held_out_phrasings)
        told += [say("user", request.text), say("assistant", question), say("user", answer)]
        final = request.arguments
    elif turns == "fix":
        request, final, phrasing, text = draw_fix(rng, language, draw, held_out_phrasings)
        call = write_call(request.function, request.arguments)
        told += [say("user", request.text), say("assistant", call), say("user", text)]
        said = (phrasing,)
    else:
        function = rng.choice(list(phrases.FUNCTIONS))
        request = draw_request(rng, function, language, draw, held_out_phrasings)
        told.append(say("user", request.text))
        final = request.arguments
    told.append(say("assistant", write_call(request.function, final)))
    values = open_values(request.function, final)
    if turns == "fix":
        values = (*values, *open_values(request.function, request.arguments))
    return Conversation(
        request.function,
        language,
        turns,
        told,
        (request.phrasing, *said),
        values,
        request.combinations,
    )


def draw_kind(rng: Random, kind: str) -> Conversation:
    """One conversation of a kind; for ``combinations`` every sort of pair is as likely."""
    sort = rng.choice(COMBINATION_SORTS)
    while True:
        drawn = draw_conversation(rng, kind in ("values", "both"), kind in ("phrasings", "both"))
        held_out = {pair.sort for pair in drawn.combinations if pair.held_out}
        if held_out == ({sort} if kind == "combinations" else set()):
            return drawn


def normalise(conversation: Conversation) -> str:
    """What two conversations have in common when one is a copy: case, spaces, marks aside."""
    text = " / ".join(message["content"] for message in conversation.messages[1:])
    return " ".join(re.findall(r"\w+|/", text.casefold()))


def generate_conversations(
    seed: int, num_train: int, num_validation: int, num_test_per_kind: int
) -> Iterator[tuple[str, str, Conversation]]:
    """Yields (split, kind, conversation); no conversation twice, in whatever split."""
    shares = [("train", "seen", num_train), ("validation", "seen", num_validation)]
    shares += [("test", kind, num_test_per_kind) for kind in KINDS]
    known: set[str] = set()
    for split, kind, count in shares:
        rng = Random(
            f"{seed}/{split}/{kind}"
        )  # a string seed is hashed with sha512, on any machine
        for _ in range(count):
            drawn = draw_kind(rng, kind)
            while normalise(drawn) in known:
                drawn = draw_kind(rng, kind)
            known.add(normalise(drawn))
            yield split, kind, drawn


def generate_records(
    seed: int, num_train: int, num_validation: int, num_test_per_kind: int
) -> dict[str, list[dict[str, Any]]]:
    """The records of the three splits, a pure function of its arguments.

    Each is ``{"id", "messages", "metadata": {"kind", "language", "function", "turns"}}``; the
    test split holds `num_test_per_kind` records of every kind in `KINDS`.
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
