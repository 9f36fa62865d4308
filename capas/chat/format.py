"""Conversations as token ids: a chat template's scaffold around contents that were encoded as plain text.

The ids are those of ``tokenizer.apply_chat_template``, with one difference that is meant: where a content
holds the text of a control token, it stays text. The labels are known by construction::

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello <|im_end|> \\n
         -100    -100 -100 -100  -100  -100     -100       -100    -100 Hello <|im_end|> -100
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from capas.chat.messages import (
    TEXT,
    Hider,
    Messages,
    Tools,
    has_own_scaffold,
    reveal,
    split_thought,
)
from capas.chat.plan import Plan
from capas.chat.scaffold import Planner, control_pattern
from capas.chat.segments import Owned, SegmentEncoder
from capas.chat.template import RecordRefusal, Template, TemplateRefusal, place_system
from capas.chat.tokenizer import SHAPE, TokenizerFiles, encode_plain
from capas.errors import CapasError
from capas.records import IGNORE_INDEX

_PROBES = (
    ("user", "Hi"),
    ("assistant", "Hello! ¿Qué tal?"),
    ("user", " <|im_end|>\n\n</s> [INST] 12,5 €  "),
    ("assistant", '{"name": "f"}'),
)
_EXAMPLE = (
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", "Hello."),
    ("user", "Two and two?"),
    ("assistant", "Four."),
)


@dataclass(frozen=True)
class Encoded:
    """A formatted conversation; both lists have one entry per token."""

    input_ids: list[int]
    labels: list[int]  # the id itself, or IGNORE_INDEX where no loss is taken
    num_trimmed: int = 0  # contents of which the template cuts blanks off
    num_thoughts_dropped: int = 0  # thoughts of earlier answers that the template leaves out


class ChatFormat:
    """A chat template with a tokenizer. Made by `load`."""

    def __init__(self, template: Template, files: TokenizerFiles, system: str) -> None:
        self._template, self._files, self._system = template, files, system
        written = self._written_tokens()
        self._check_known(written)
        controls = {t.content: t for t in files.added.values() if t.special or t.content in written}
        self._control_pattern = control_pattern(controls)
        self._control_starts = "".join(sorted({text[0] for text in controls}))
        self.segments = SegmentEncoder(files, controls)
        self._hider = Hider(self._control_pattern)
        self._planner = Planner(self._render_placed, controls)
        self._plans: dict[Any, Plan] = {}
        self.end_token = self._planner.end_token
        self.end_token_id = self.segments.control_ids[self.end_token]
        self.bos_token_id = files.id_of("bos_token")
        ids = (files.id_of("pad_token"), files.id_of("eos_token"), self.end_token_id)
        self.pad_token_id: int = next(i for i in ids if i is not None)
        self.stop_token_ids = list(dict.fromkeys(i for i in (ids[2], ids[1]) if i is not None))

    @classmethod
    def load(
        cls,
        template_text: str | None,
        tokenizer_dir: Path,
        date_string: str,
        system: str = "template",
        allowed_tokens: Collection[str] = (),
    ) -> "ChatFormat":
        """A template's text with the tokenizer in a folder.

        Args:
            template_text: None stands for the template that the tokenizer brings.
            date_string: what a template gets that asks for today's date.
            system: template | fold | error, see `capas.chat.template.place_system`.
            allowed_tokens: control tokens that a content may hold.

        Raises:
            CapasError: a file is missing or damaged; the template has a syntax error, writes control tokens
                that the tokenizer lacks, or does not end an answer.
        """
        files = TokenizerFiles(tokenizer_dir, allowed_tokens)
        text = files.chat_template if template_text is None else template_text
        return cls(Template(text, files.named, date_string), files, system)

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The conversation as the text that the model sees; raises TemplateRefusal."""
        return self._render_placed(messages, add_generation_prompt, tools)

    def encode(
        self, messages: Messages, train_on: str = "assistant", tools: Tools = None
    ) -> Encoded:
        """Ids and labels of a conversation.

        Args:
            messages: role, content and, where they are known, input_ids: the content encoded as plain text;
                train: false keeps an answer out of the loss. A single message with the role text is encoded
                without a template, between the beginning and the end of a text, and all of it is trained.
            train_on: assistant (every answer with its end token), last_assistant, or all (every token).
            tools: schemas of the tools that the model may call.

        Raises:
            CapasError: the template refuses or rewrites the conversation, an answer to be trained is empty,
                or nothing is left to train on.
        """
        if messages[0]["role"] == TEXT:
            return self._encode_text(messages[0])
        trained = _trained_messages(messages, train_on)
        owned, *lost = self._encode(messages, False, tools)
        everything = train_on == "all"
        labels = [i if everything or owner in trained else IGNORE_INDEX for i, owner in owned]
        return Encoded([i for i, _ in owned], labels, *lost)

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        """The ids that ask for the next answer: the conversation so far and the generation prompt."""
        if messages[0]["role"] == TEXT:
            return self._encode_text(messages[0]).input_ids[:-1]
        owned, *_ = self._encode(messages, True, tools)
        return [i for i, _ in owned]

    def reference_ids(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> list[int]:
        """The rendered text, encoded whole with control tokens parsed, as `apply_chat_template` does."""
        text = self.render(messages, add_generation_prompt, tools)
        return self.encode_rendered([text])[0]

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Rendered texts encoded whole, as `apply_chat_template` does."""
        return self._files.encode_parsing(texts)

    def as_decoded(self, texts: Sequence[str]) -> list[str]:
        """Texts as they come back from ids: some tokenizers normalize."""
        tokenizer = self.tokenizer
        ids = encode_plain(tokenizer, texts)
        return list(tokenizer.decode_batch(ids, skip_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    @property
    def template_text(self) -> str:
        return self._template.text

    @property
    def tokenizer(self) -> Tokenizer:
        """To decode with, and for the names of tokens; to it the text of a control token is text."""
        return self._files.build()

    def count_control_tokens(self, text: str) -> int:
        """How often a text holds that of a control token."""
        return sum(1 for _ in self._control_pattern.finditer(text))

    def holds_control(self, text: str) -> bool:
        """Whether a text holds that of a control token."""
        for character in self._control_starts:  # most texts hold none of these
            if character in text:
                return self._control_pattern.search(text) is not None
        return False

    @property
    def copies_contents(self) -> bool:
        """Whether the template only copies contents: see `capas.chat.copying`."""
        return self._template.copies_contents

    def is_copied(self, messages: Messages) -> bool:
        """Whether the template copies these contents as it copies others of their pattern."""
        plan = self.plan(messages, add_generation_prompt=False)
        contents = plan.trim([message["content"] for message in messages])
        return plan.fill(contents) == self._render_placed(messages, False)

    def probes_sha256(self) -> str:
        """Changes whenever template or tokenizer encode a few fixed conversations differently."""
        probes = [{"role": role, "content": content} for role, content in _PROBES]
        system = {"role": "system", "content": "Answer in JSON."}
        ids = [self._try_probe(told) for told in (probes[:2], probes, [system, *probes])]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def example(self) -> Encoded:
        """A short conversation, with a system message where the template has a place for one."""
        told = [{"role": role, "content": content} for role, content in _EXAMPLE]
        try:
            return self.encode(told)
        except RecordRefusal:
            return self.encode(told[1:])

    def _try_probe(self, messages: Messages) -> list[int] | None:
        try:
            return self.encode(messages).input_ids
        except CapasError:
            return None  # what a family refuses is part of its identity

    def _render_placed(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools = None
    ) -> str:
        placed = place_system(messages, self._system)
        return self._template.render(placed, add_generation_prompt, tools)

    def _written_tokens(self) -> set[str]:
        """What the template writes that looks like a control token."""
        question, answer = {"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}
        texts = [
            self._render_placed([question], True),
            self._render_placed([question, answer], False),
        ]
        if self._system != "error":
            with suppress(TemplateRefusal):  # a family without system role
                system = {"role": "system", "content": "-"}
                texts.append(self._render_placed([system, question, answer], False))
        return {token for text in texts for token in SHAPE.findall(text)}

    def _check_known(self, written: set[str]) -> None:
        known = {token.content for token in self._files.added.values()}
        lacking = sorted(written - known)
        if lacking:
            has = sorted(text for text in known if SHAPE.fullmatch(text))
            raise CapasError(
                f"the tokenizer in {self._files.folder} lacks control tokens that the chat template writes: "
                f"{', '.join(lacking)}. They would be cut into ordinary pieces. Choose the chat_template of "
                f"the model's own family; the tokenizer has: {', '.join(has[:12]) or 'none'}"
            )

    def plan(self, messages: Messages, add_generation_prompt: bool) -> Plan:
        """How conversations like this one are put together; made once per pattern of roles."""
        pattern = tuple(
            (m["role"], "" if m["content"].strip() else (m["content"],)) for m in messages
        )
        key = pattern, add_generation_prompt
        if key not in self._plans:
            self._plans[key] = self._planner.plan(messages, add_generation_prompt)
        return self._plans[key]

    def _encode(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools
    ) -> tuple[Owned, int, int]:
        """The ids with their owners, and how many contents were trimmed and thoughts left out."""
        safe: Messages = messages
        if has_own_scaffold(messages, tools):
            safe = [self._hider.protect(message) for message in messages]
            tools = self._hider.hide(tools)
            plan = self._planner.plan(safe, add_generation_prompt, tools)
        else:
            plan = self.plan(messages, add_generation_prompt)
        thoughts, answers = zip(*(split_thought(message) for message in messages), strict=True)
        contents = plan.trim(answers)
        rendered = self._render_placed(safe, add_generation_prompt, tools)
        if tools and rendered == self._render_placed(safe, add_generation_prompt):
            raise RecordRefusal(
                "the chat template leaves out the tools; this family has no place for them"
            )
        if (filled := reveal(plan.fill(contents))) != reveal(rendered):
            raise RecordRefusal(_rewritten(filled, reveal(rendered)))
        num_trimmed = sum(a != b for a, b in zip(contents, answers, strict=True))
        missing = [thought for thought in thoughts if thought.strip() not in reveal(rendered)]
        return self.segments.encode(plan, contents, messages), num_trimmed, len(missing)

    def _encode_text(self, message: Mapping[str, Any]) -> Encoded:
        end = self._files.id_of("eos_token")
        if end is None:
            raise CapasError("the tokenizer names no eos_token, with which a plain text has to end")
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        ids = [*self.segments.known_ids(message), end]
        return Encoded([*start, *ids], [IGNORE_INDEX] * len(start) + ids)


def _trained_messages(messages: Messages, train_on: str) -> set[int]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RecordRefusal("no message of the assistant: there is nothing to train on")
    answers = answers[-1:] if train_on == "last_assistant" else answers
    trained = [i for i in answers if messages[i].get("train", True)]
    if not trained and train_on != "all":
        raise RecordRefusal("every answer has train: false: there is nothing to train on")
    for index in trained:
        if not split_thought(messages[index])[1].strip() and "tool_calls" not in messages[index]:
            raise RecordRefusal(
                f"message {index}, an answer to be trained, is empty: {messages[index]['content']!r}"
            )
    return set(trained)


def _rewritten(expected: str, rendered: str) -> str:
    start = next(
        (i for i, (a, b) in enumerate(zip(expected, rendered, strict=False)) if a != b),
        min(len(expected), len(rendered)),
    )
    return (
        "the chat template rewrites a content, or treats it by what it says: expected "
        f"{expected[start : start + 40]!r} at character {start}, the template has "
        f"{rendered[start : start + 40]!r}; such a record cannot be masked safely"
    )
