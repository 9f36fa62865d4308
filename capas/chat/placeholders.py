"""Replace contents and control tokens by stand-in characters while a template is rendered.

A mark stands for a content, so that its place is found in the rendered text. A template formats calls,
results, schemas and thoughts in its own way. Texts of control tokens inside them are hidden, character by
character, so that they are not mistaken for the template's own. No stand-in occurs in the record or in the
template, so every text can be restored exactly.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from capas.chat.messages import STRUCTURED, Message, Messages, Tools, split_thought
from capas.chat.template import RecordRefusal

_PRIVATE = ((0x100000, 0x10FFFE), (0xF0000, 0xFFFFE), (0xE000, 0xF900))  # rarest first
_ANY_PRIVATE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")


class Placeholders:
    """Stand-ins for one conversation.

    Args:
        texts: the texts of the control tokens.
        characters: the stand-in characters, as many as `count` returns.
    """

    def __init__(self, texts: Sequence[str], characters: Sequence[str]) -> None:
        self._open, self._close, *hidden = characters
        self._mark = re.compile(f"{self._open}(\\d+){self._close}")
        stand_ins = dict(zip(_alphabet(texts), hidden, strict=True))
        self._hidden = str.maketrans(stand_ins)
        self._shown = str.maketrans({hidden: shown for shown, hidden in stand_ins.items()})
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.characters = frozenset(characters)

    @staticmethod
    def count(texts: Sequence[str]) -> int:
        """Return how many stand-in characters these texts of control tokens need."""
        return 2 + len(_alphabet(texts))

    def mark(self, index: int) -> str:
        return f"{self._open}{index}{self._close}"

    def cut(self, text: str) -> tuple[list[str], list[int]]:
        """Return the texts between the marks, and the indices of the marks, which are one fewer."""
        parts = self._mark.split(text)
        return parts[::2], [int(index) for index in parts[1::2]]

    def has_mark(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def readable(self, text: str) -> str:
        """Return a text without stand-ins, for an error message."""
        return self.reveal(self._mark.sub(lambda found: f"{{content {found.group(1)}}}", text))

    def hide(self, value: Any) -> Any:
        """Return a JSON-like value with the texts of control tokens replaced; all lengths stay the same."""
        if isinstance(value, str):
            return self._controls.sub(lambda found: found.group().translate(self._hidden), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def protect(self, message: Mapping[str, Any]) -> Message:
        """Return a message without texts of control tokens in its structured parts.

        Its new key `thought` has the beginning of an answer's content, if that is a thought.
        """
        safe = {**message, **{k: self.hide(message[k]) for k in STRUCTURED if k in message}}
        if message["role"] == "tool":
            safe["content"] = self.hide(message["content"])
        thought, answer = split_thought(message)
        if thought:
            safe |= {"thought": self.hide(thought), "content": self.hide(thought) + answer}
        return safe

    def reveal(self, text: str) -> str:
        """Return a text with the hidden control tokens restored."""
        return text.translate(self._shown)


class PlaceholderSource:
    """A source of stand-ins, chosen for each conversation.

    Args:
        texts: the texts of the control tokens.
        template: the text of the template.
    """

    def __init__(self, texts: Iterable[str], template: str) -> None:
        self._texts, self._template = sorted(texts), frozenset(template)
        self.usual = self._make(frozenset())

    def choose(self, messages: Messages, tools: Tools) -> Placeholders:
        """Return stand-ins that occur nowhere in the conversation.

        Raises:
            RecordRefusal: the conversation leaves too few of Unicode's 137,470 private-use characters unused.
        """
        used = frozenset(
            chain.from_iterable(_ANY_PRIVATE.findall(t) for t in _texts([messages, tools]))
        )
        return self._make(used) if used & self.usual.characters else self.usual

    def _make(self, used: frozenset[str]) -> Placeholders:
        count = Placeholders.count(self._texts)
        private = chain.from_iterable(range(first, end) for first, end in _PRIVATE)
        free = (c for c in map(chr, private) if c not in used and c not in self._template)
        characters = list(islice(free, count))
        if len(characters) < count:
            raise RecordRefusal(
                f"the conversation uses {len(used):,} of Unicode's private-use characters; capas "
                f"needs {count} unused ones to separate contents from template text"
            )
        return Placeholders(self._texts, characters)


def mark_contents(
    messages: Messages, placeholders: Placeholders, padding: str = ""
) -> list[Message]:
    """Return the conversation with marks for contents, and one in an answer's first tool call.

    Blank contents stay, because templates test whether a content is empty. So do the results of tools, which
    templates rewrite.
    """
    marked = []
    for index, message in enumerate(messages):
        copy = dict(message)
        thought = message.get("thought", "")
        if message["role"] != "tool" and message["content"].removeprefix(thought).strip():
            copy["content"] = f"{thought}{padding}{placeholders.mark(index)}{padding}"
        if message.get("tool_calls"):
            mark = placeholders.mark(index + len(messages))
            copy["tool_calls"] = _mark_calls(message["tool_calls"], mark)
        marked.append(copy)
    return marked


def _mark_calls(calls: Sequence[Any], mark: str) -> list[Any]:
    first, *others = calls
    function = first.get("function", first)
    named = {**function, "name": mark + function["name"]}
    return [{**first, "function": named} if "function" in first else named, *others]


def _alphabet(texts: Iterable[str]) -> list[str]:
    return sorted(set(chain.from_iterable(texts)))


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            if not isinstance(item, int | float):
                yield from _texts(item)
