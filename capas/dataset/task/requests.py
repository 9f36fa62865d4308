"""Write requests of the embedded task in a user's words, from their arguments.

``{"time": "07:30", "day": "monday"}`` becomes "Could you wake me up at 7:30 on Monday?": a phrasing with
its slots filled, an opening, a closing, and the punctuation of careful or hurried users.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from capas.dataset.task import phrases
from capas.dataset.task.values import is_held_out

PLAIN_SHARE = 0.2  # of requests are typed without capitals and full stop
OPTIONAL_SHARE = 0.6  # of requests with an optional day name it

Arguments = dict[str, str | int]
ValueSource = Callable[[Random, str, str], str | int]  # (rng, slot, language) -> value


@dataclass(frozen=True)
class Combination:
    """A pair of parts of a request; if it is held out, training has its parts only separately.

    `sort` is ``opening`` (phrasing, opening), ``currencies`` (from, to) or ``dialog`` (function, turns
    and language).
    """

    sort: str
    first: str
    second: str

    @property
    def held_out(self) -> bool:
        return is_held_out(f"{self.sort}|{self.first}|{self.second}")


@dataclass(frozen=True)
class Request:
    """One request of a user, with the call that answers it and the parts it was made of."""

    function: str
    language: str
    arguments: Arguments
    text: str
    phrasing: str
    combinations: tuple[Combination, ...]


def closed_slot(slot: str) -> str | None:
    """Return the table of `phrases.CLOSED` with a slot's values, or None for an open slot."""
    if slot in ("from", "to"):
        return "currency"
    return slot if slot in phrases.CLOSED else None


def draw_arguments(rng: Random, function: str, language: str, draw: ValueSource) -> Arguments:
    """Return the arguments of a call: open values from `draw`, closed ones from their table, no two equal."""
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
    """Return a value in a user's words: ``7:30`` for ``"07:30"``, ``la cocina`` for ``"kitchen"``."""
    table = closed_slot(slot)
    if table is not None:
        return phrases.CLOSED[table][str(value)][language]
    if slot == "time":
        hours, minutes = str(value).split(":")
        return f"{int(hours)}:{minutes}"
    return str(value)


def fill_phrasing(rng: Random, phrasing: str, language: str, arguments: Arguments) -> str:
    """Fill the slots of a phrasing; if an optional day is left out, `arguments` are changed to today."""

    def choose(match: re.Match[str]) -> str:
        if rng.random() < OPTIONAL_SHARE:
            return match.group(1)
        arguments["day"] = "today"
        return ""

    text = re.sub(r"\[(.*?)\]", choose, phrasing)
    spoken = {slot: say_value(slot, value, language) for slot, value in arguments.items()}
    return contract_articles(text.format(**spoken), language)


def contract_articles(text: str, language: str) -> str:
    """Return a text with Spanish contractions: ``del`` for ``de el``, ``al`` for ``a el``."""
    if language != "es":
        return text
    return re.sub(r"\b(de|a) el\b", lambda match: {"de": "del", "a": "al"}[match.group(1)], text)


def capitalise(text: str) -> str:
    """Return a text with its first letter in upper case, after an opening question mark."""
    start = 1 if text.startswith("¿") else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def punctuate(text: str) -> str:
    """Return a sentence as careful users write it, with a capital and a final mark."""
    return capitalise(text if text.endswith("?") else f"{text}.")


def say_request(
    rng: Random, core: str, function: str, language: str, form: str, opening: str
) -> str:
    """Return a request: its core with opening, closing, capitals and punctuation."""
    asks = opening in phrases.QUESTION_OPENINGS
    polite = "please" in opening or "por favor" in opening
    if function != "send_message" and form != "question" and not polite:  # a text ends the request
        core += rng.choice(phrases.CLOSINGS[language])
    if rng.random() < PLAIN_SHARE:
        return opening + core
    if not asks and form != "question":
        return punctuate(opening + core)
    if language == "en":
        return capitalise(f"{opening}{core}?")
    return capitalise(f"¿{opening}{core}?" if asks else f"{opening}¿{core}?")


def list_phrasings(function: str, language: str, held_out: bool | None) -> list[tuple[str, str]]:
    """Return pairs (form, phrasing): the held-out ones, those of training, or all if `held_out` is None."""
    forms = phrases.PHRASINGS[function][language]
    sides = (False, True) if held_out is None else (held_out,)
    return [(form, text) for form in forms for side in sides for text in forms[form][side]]


def draw_request(
    rng: Random, function: str, language: str, draw: ValueSource, held_out: bool | None
) -> Request:
    """Return one complete request; `held_out` selects the phrasings (None: all of them)."""
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
    """Return one phrasing of (training, held out), from both if `held_out` is None."""
    pool = [*sides[0], *sides[1]] if held_out is None else sides[held_out]
    return rng.choice(pool)


def say_bare(slot: str, value: str | int, language: str) -> str:
    """Return a value in a user's words, on its own: ``at 7:30``, ``10 minutos``, ``Ana``."""
    spoken = say_value(slot, value, language)
    return phrases.BARE[language].get(slot, "{}").format(spoken)


def draw_ask(
    rng: Random, language: str, draw: ValueSource, held_out: bool | None
) -> tuple[Request, str, str]:
    """Return a request without its main slot, the assistant's question, and the user's answer."""
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
    """Return a request, the corrected arguments, and the user's correction: its phrasing and its text."""
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
