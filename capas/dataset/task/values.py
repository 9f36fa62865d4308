"""Draw the values of the embedded task from a seed: names, titles, texts, times and numbers.

A value is a frame (``lunch with {person}``) filled with atoms: real words, or words invented syllable by
syllable. A model therefore has to copy values and cannot learn a list. Whether an atom is held out never
changes and does not depend on the seed. A held-out value has held-out atoms only, any other value has none.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from random import Random
from string import Formatter

from capas.dataset.task.words import FRAMES, NUMBER_RANGES, WORDS

HELD_OUT_SHARE = 4  # one atom in four is held out
INVENTED_SHARE = 0.6  # of the names of people and places are invented

# Parts of invented words, separated by spaces; "_" is the empty part.
_PARTS = {
    "onset": "b br c ch cl d dr f fl g gr h j k l m n p pl r s st t tr v z",
    "vowel": "a e i o u a e o ia io ea ei",
    "joint": "b c d l ll m n r rr s t v nd rt st",
    "coda": "_ _ _ l n r s m",
    "person": "a o e ana ela ina ito eta ario iel ian is on en y ix or elle",
    "surname": "ez era osa ano ini son man berg well ard etti ales ova sky ton er ado",
    "city": "a o ia ville ton bury ford eda osa ona ina burg field ara ena mar land stad",
    "brand": "a o ix ex al ora ino ena is us eo",
}
PARTS = {kind: text.replace("_", "").split(" ") for kind, text in _PARTS.items()}
INVENTED_KINDS = ("person", "surname", "city", "brand")  # kinds of atoms: proper names


@cache
def is_held_out(atom: str) -> bool:
    """Return whether an atom (a word, a number, a time ``HH:MM``, a pair ``a|b``) is held out of training."""
    return hashlib.sha256(atom.casefold().encode()).digest()[0] % HELD_OUT_SHARE == 0


@cache
def split_words(words: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    """Return the words that are held out, or those that are not, in their order."""
    return tuple(word for word in words if is_held_out(word) == held_out)


def draw(rng: Random, make: Callable[[], str], held_out: bool) -> str:
    """Return an atom of `make` that is held out, or one that is not; `make` is called until it fits."""
    while True:
        atom = make()
        if is_held_out(atom) == held_out:
            return atom


def invent_word(rng: Random, kind: str | None = None) -> str:
    """Return an invented word: one to three syllables and, for a `kind` of name, one of its endings."""
    word = rng.choice(PARTS["onset"]) + rng.choice(PARTS["vowel"])
    for _ in range(rng.choice((0, 0, 1) if kind else (0, 1, 1, 2))):
        word += rng.choice(PARTS["coda"]) + rng.choice(PARTS["onset"]) + rng.choice(PARTS["vowel"])
    if kind is None:
        return word + rng.choice(PARTS["coda"])
    ending = rng.choice(PARTS[kind])
    joint = rng.choice(PARTS["joint" if ending[0] in "aeiou" else "coda"])
    return (word + joint + ending).capitalize()


def draw_atom(rng: Random, kind: str, language: str, held_out: bool) -> str:
    """Return one atom of a frame: a real word or, for most proper names, an invented one."""
    invented = kind in INVENTED_KINDS and (kind not in WORDS or rng.random() < INVENTED_SHARE)
    if invented:
        return draw(rng, lambda: invent_word(rng, kind), held_out)
    return rng.choice(split_words(WORDS[kind][language], held_out))


def fill_frame(rng: Random, frame: str, language: str, held_out: bool) -> str:
    """Fill every ``{kind}`` of a frame with an atom of that kind."""
    kinds = [field for _, field, _, _ in Formatter().parse(frame) if field]
    return frame.format(**{kind: draw_atom(rng, kind, language, held_out) for kind in kinds})


def draw_number(rng: Random, low: int, high: int, held_out: bool) -> int:
    """Return an integer from `low` to `high`."""
    return int(draw(rng, lambda: str(rng.randint(low, high)), held_out))


def draw_time(rng: Random, held_out: bool) -> str:
    """Return a time of day ``HH:MM`` on the 24-hour clock, in steps of five minutes."""
    return draw(rng, lambda: f"{rng.randint(0, 23):02d}:{rng.randrange(0, 60, 5):02d}", held_out)


def draw_value(rng: Random, slot: str, language: str, held_out: bool) -> str | int:
    """Return a value for an open slot of the task, as written in the call."""
    if slot == "time":
        return draw_time(rng, held_out)
    if slot in NUMBER_RANGES:
        return draw_number(rng, *NUMBER_RANGES[slot], held_out)
    return fill_frame(rng, rng.choice(FRAMES[slot][language]), language, held_out)
