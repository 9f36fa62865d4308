"""Encode conversations as token ids: a chat template's scaffold around contents encoded as plain text.

The ids are those of ``tokenizer.apply_chat_template``, with two intended differences. The text of a control
token in a content stays text. An answer begins with a token of its own, so that its prompt is a prefix of the
conversation. The labels are known by construction::

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Hello <|im_end|> \\n
         -100    -100 -100 -100  -100  -100     -100       -100    -100 Hello <|im_end|> -100
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from capas.chat.controls import Controls
from capas.chat.end_tokens import find_end_tokens
from capas.chat.labels import labels_of, trained_messages
from capas.chat.messages import (
    THOUGHT_END,
    THOUGHT_START,
    Message,
    Messages,
    Tools,
    has_own_scaffold,
    split_thought,
    spoken,
)
from capas.chat.placeholders import Placeholders, PlaceholderSource
from capas.chat.plan import Plan
from capas.chat.scaffold import Planner
from capas.chat.segments import Owned, SegmentEncoder
from capas.chat.template import RecordRefusal, Template, TemplateRefusal, place_system
from capas.chat.tokenizer import DEFAULT, SHAPE, TokenizerFiles, encode_plain
from capas.core.errors import CapasError
from capas.core.records import IGNORE_INDEX, TEXT

_QUESTION = {"role": "user", "content": "-"}
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
    """A formatted conversation; `input_ids` and `labels` have one entry per token."""

    input_ids: list[int]
    labels: list[int]  # the id itself, or IGNORE_INDEX for a token outside the loss
    num_prompt_tokens: int  # leading ids that are the prompt of the last answer
    num_trimmed: int = 0  # contents whose whitespace the template trims
    num_thoughts_dropped: int = 0  # thoughts of earlier answers that the template drops


class ChatFormat:
    """A chat template with its tokenizer, made by `load`."""

    def __init__(self, template: Template, files: TokenizerFiles, system: str) -> None:
        self._template, self._files, self._system = template, files, system
        written = self._written_tokens()
        self._check_known(written)
        controls = {t.content: t for t in files.added.values() if t.special or t.content in written}
        self._controls = Controls(controls)
        self._control_starts = "".join(sorted({text[0] for text in controls}))
        self.segments = SegmentEncoder(files, controls)
        self._placeholders = PlaceholderSource(controls, template.text)
        ends = find_end_tokens(self._render_placed, self._controls, self._placeholders.usual)
        self._planner = Planner(self._render_placed, self._controls, ends)
        self._plans: dict[Any, Plan] = {}
        control_ids = self.segments.control_ids
        self.end_token, self.end_tokens = ends.last, ends.every
        self.end_token_ids = [control_ids[token] for token in self.end_tokens]
        self.end_token_id = self.end_token_ids[0]
        self.bos_token_id = files.id_of("bos_token")
        ids = (files.id_of("pad_token"), files.id_of("eos_token"), self.end_token_id)
        self.pad_token_id: int = next(i for i in ids if i is not None)
        stops = [ids[2], ids[1], *(control_ids[token] for token in ends.stops)]
        self.stop_token_ids = list(dict.fromkeys(i for i in stops if i is not None))

    @classmethod
    def load(
        cls,
        template_text: str | None,
        tokenizer_dir: Path,
        date_string: str,
        system: str = "template",
        allowed_tokens: Collection[str] = (),
        path: str | None = None,
    ) -> "ChatFormat":
        """Return the chat format of a template's text and the tokenizer in a folder.

        Args:
            template_text: None for the tokenizer's own template.
            date_string: the date that a template gets if it reads today's date.
            system: template | fold | error, see `capas.chat.template.place_system`.
            allowed_tokens: control tokens that a content may contain.
            path: chat_template.path, for error messages. Without a text it also names one of the tokenizer's
                templates.

        Raises:
            CapasError: a file is missing or damaged; the template has a syntax error, writes control tokens
                that the tokenizer lacks, or does not end an answer.
        """
        files = TokenizerFiles(tokenizer_dir, allowed_tokens)
        text = template_text
        if text is None:
            text = files.chat_template((path or "").partition(":")[2] or DEFAULT)
        called = "the chat template" if path is None else f"the chat template ({path})"
        return cls(Template(text, files.named, date_string, called), files, system)

    def render(
        self, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """Return a conversation as the text that the model sees.

        Raises:
            RecordRefusal: the template or the policy for system messages refuses the conversation.
        """
        return self._render_placed(messages, add_generation_prompt, tools)

    def encode(
        self, messages: Messages, train_on: str = "assistant", tools: Tools = None
    ) -> Encoded:
        """Return the ids and labels of a conversation.

        Args:
            messages: role and content. Optional: input_ids, the content encoded as plain text; and train,
                where false keeps an answer out of the loss. A single message with the role text is encoded
                without a template, between bos_token and eos_token, and all of it is trained.
            train_on: assistant (every answer with its end token), last_assistant, or all (every token).
            tools: schemas of the tools that the model may call.

        Raises:
            CapasError: the template refuses or rewrites the conversation; the prompt of an answer to be
                trained is not a prefix of the conversation; an answer to be trained is empty; no answer is
                left to train on.
        """
        if messages and messages[0]["role"] == TEXT:
            return self._encode_text(messages[0])
        trained = trained_messages(messages, train_on)
        plan, owned, *lost = self._encode(messages, False, tools)
        if unasked := sorted(trained & plan.not_asked_for):
            raise RecordRefusal(self._not_asked_for(messages, unasked[0], tools))
        ids, labels = [i for i, _ in owned], labels_of(owned, trained, train_on)
        return Encoded(ids, labels, self._count_prompt(messages, owned, tools), *lost)

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Return the ids of the prompt for the next answer: the conversation and the generation prompt.

        For a plain text, these are all its ids but the last.

        Raises:
            CapasError: the template refuses or rewrites the conversation.
        """
        if messages and messages[0]["role"] == TEXT:
            return self._encode_text(messages[0]).input_ids[:-1]
        _, owned, *_ = self._encode(messages, True, tools)
        return [i for i, _ in owned]

    def _count_prompt(self, messages: Messages, owned: Owned, tools: Tools) -> int:
        """Return the number of ids in the prompt of the last answer, from which a generation would start.

        If a template joins several answers in one turn, it is the prompt of the whole turn.

        Raises:
            RecordRefusal: the prompt is not a prefix of the conversation.
        """
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        end = max((i for i, (_, owner) in enumerate(owned) if owner == last), default=-1) + 1
        first = last
        while True:
            prompt = self.prompt_ids(messages[:first], tools)
            one_turn = all(owner is not None for _, owner in owned[len(prompt) : end])
            if [i for i, _ in owned[: len(prompt)]] == prompt and one_turn:
                return len(prompt)
            if not first or messages[first - 1]["role"] != "assistant":
                raise RecordRefusal(self._not_asked_for(messages, last, tools))
            first -= 1

    def _not_asked_for(self, messages: Messages, index: int, tools: Tools) -> str:
        """Return the error message for an answer whose prompt is not a prefix of the conversation."""
        prompt = self.render(messages[:index], True, tools)
        whole = self.render(messages[: index + 1], False, tools)
        start = first_difference(prompt, whole)
        return (
            f"the prompt for message {index} (an answer) is not a prefix of the conversation: after "
            f"{whole[max(0, start - 30) : start]!r} the prompt goes on with "
            f"{prompt[start : start + 40]!r}, the conversation with {whole[start : start + 40]!r}. "
            "The model would be prompted in another format than it was trained in. If the template "
            "opens or closes a thought in the prompt, every answer needs a thought "
            "(reasoning_content, or <think> ... </think> in the content), or none may have one. If "
            "only earlier answers differ, set chat_template.train_on=last_assistant to leave them "
            "untrained"
        )

    def shown(self, messages: Messages) -> list[Message]:
        """Return a conversation as the template sees it."""
        return [spoken(message) for message in place_system(messages, self._system)]

    def encode_rendered(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        """Return the ids of rendered texts, each encoded whole with control tokens parsed.

        Args:
            inside: true for texts that do not begin the conversation.
        """
        return self._files.encode_parsing(texts, inside)

    def as_decoded(self, texts: Sequence[str]) -> list[str]:
        """Return texts as they are decoded from their ids; some tokenizers normalize."""
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
    def date_string(self) -> str:
        return self._template.date_string

    @property
    def folder(self) -> Path:
        """The tokenizer's folder."""
        return self._files.folder

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer for decoding and token names; it treats the text of a control token as plain text."""
        return self._files.build()

    def count_control_tokens(self, text: str) -> int:
        """Return how often control tokens occur in a text."""
        return sum(1 for _ in self._controls.pattern.finditer(text))

    def holds_control(self, text: str) -> bool:
        """Return whether a text contains the text of a control token."""
        for character in self._control_starts:  # most texts contain none of these
            if character in text:
                return self._controls.pattern.search(text) is not None
        return False

    @property
    def copies_contents(self) -> bool:
        """Return whether the template only copies contents: see `capas.chat.copying`."""
        return self._template.copies_contents

    def is_copied(self, messages: Messages) -> bool:
        """Return whether the template copies these contents as it copies others of the same pattern."""
        plan = self.plan(messages, add_generation_prompt=False)
        contents = plan.trim([message["content"] for message in messages])
        return plan.fill(contents) == self._render_placed(messages, False)

    def probes_sha256(self) -> str:
        """Return a digest of the ids of a few fixed conversations; it identifies the format."""
        probes = [{"role": role, "content": content} for role, content in _PROBES]
        system = {"role": "system", "content": "Answer in JSON."}
        ids = [self._try_probe(messages) for messages in (probes[:2], probes, [system, *probes])]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def example(self) -> Encoded:
        """Return a short conversation, encoded.

        It has a system message, several turns, or a thought, as far as the template supports them.
        """
        messages: list[Message] = [{"role": role, "content": c} for role, c in _EXAMPLE]
        thinking = {
            "role": "assistant",
            "content": f"<think>\nEasy.\n</think>\n\n{_EXAMPLE[-1][1]}",
        }
        for shown in (messages, messages[1:], messages[1:3]):
            with suppress(RecordRefusal):
                return self.encode(shown)
        return self.encode([messages[3], thinking])

    def _try_probe(self, messages: Messages) -> list[int] | None:
        try:
            return self.encode(messages).input_ids
        except CapasError:
            return None  # a refusal is part of the format's identity

    def _render_placed(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools = None
    ) -> str:
        placed = place_system(messages, self._system)
        return self._template.render(placed, add_generation_prompt, tools)

    def _written_tokens(self) -> set[str]:
        """Return the texts which the template writes and which look like control tokens."""
        answer = {"role": "assistant", "content": "-"}
        texts = [
            self._render_placed([_QUESTION], True),
            self._render_placed([_QUESTION, answer], False),
        ]
        if self._system != "error":
            with suppress(TemplateRefusal):  # a family without a system role
                system = {"role": "system", "content": "-"}
                texts.append(self._render_placed([system, _QUESTION, answer], False))
        return {token for text in texts for token in SHAPE.findall(text)}

    def _check_known(self, written: set[str]) -> None:
        known = {token.content for token in self._files.added.values()}
        lacking = sorted(written - known)
        if lacking:
            has = sorted(text for text in known if SHAPE.fullmatch(text))
            raise CapasError(
                f"the tokenizer in {self._files.folder} lacks control tokens that the chat template "
                f"writes: {', '.join(lacking)}. They would be split into ordinary tokens. Choose "
                "the chat_template of the model's own family; the tokenizer has: "
                f"{', '.join(has[:12]) or 'none'}"
            )

    def plan(self, messages: Messages, add_generation_prompt: bool) -> Plan:
        """Return the plan for conversations like this one, made once per pattern of roles.

        Raises:
            CapasError: the template refuses, drops or repeats a message, or leaves an answer open.
        """
        pattern = tuple(
            (m["role"], "" if m["content"].strip() else (m["content"],)) for m in messages
        )
        key = pattern, add_generation_prompt
        if key not in self._plans:
            usual = self._placeholders.usual
            self._plans[key] = self._planner.plan(messages, add_generation_prompt, usual)
        return self._plans[key]

    def _encode(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools
    ) -> tuple[Plan, Owned, int, int]:
        """Return the plan, the ids with owners, and the counts of trimmed contents and dropped thoughts."""
        dropped = 0
        if has_own_scaffold(messages, tools):
            stand_ins = self._placeholders.choose(messages, tools)
            safe = [stand_ins.protect(message) for message in messages]
            hidden = stand_ins.hide(tools)
            plan = self._planner.plan(safe, add_generation_prompt, stand_ins, hidden)
            if not add_generation_prompt:
                dropped = self._count_dropped_thoughts(messages, tools, stand_ins)
        else:
            plan = self.plan(messages, add_generation_prompt)
        answers = [split_thought(message)[1] for message in messages]
        contents = plan.trim(answers)
        rendered = self._render_placed(messages, add_generation_prompt, tools)
        if tools and rendered == self._render_placed(messages, add_generation_prompt):
            raise RecordRefusal(
                "the chat template drops the tools: this model family does not support tools"
            )
        if (filled := plan.fill(contents)) != rendered:
            raise RecordRefusal(_rewritten(filled, rendered))
        num_trimmed = sum(a != b for a, b in zip(contents, answers, strict=True))
        return plan, self.segments.encode(plan, contents, messages), num_trimmed, dropped

    def _count_dropped_thoughts(
        self, messages: Messages, tools: Tools, stand_ins: Placeholders
    ) -> int:
        """Return how many thoughts the template drops; many templates drop those of earlier turns.

        Raises:
            RecordRefusal: the template also drops the thought where its answer is the last.
        """
        marked = [_mark_thoughts(m, stand_ins, i, len(messages)) for i, m in enumerate(messages)]
        thinking = [(i, mark) for i, (_, marks) in enumerate(marked) for mark in marks]
        if not thinking:
            return 0
        copies = [message for message, _ in marked]
        text = self._render_placed(copies, False, tools)
        dropped = [(index, mark) for index, mark in thinking if mark not in text]
        for index, mark in dropped:
            with suppress(TemplateRefusal):  # a conversation may not end there
                if mark not in self._render_placed(copies[: index + 1], False, tools):
                    raise RecordRefusal(
                        "the chat template drops the thought (reasoning_content) of message "
                        f"{index}: this model family does not support thoughts. Choose a model "
                        "whose template does, write the thought into the content as <think> ... "
                        "</think>, or remove it"
                    )
        return len(dropped)

    def _encode_text(self, message: Mapping[str, Any]) -> Encoded:
        start, end = self._bounds_of_text()
        ids = [*self.segments.known_ids(message), end]
        return Encoded([*start, *ids], [IGNORE_INDEX] * len(start) + ids, len(start) + len(ids) - 1)

    def _bounds_of_text(self) -> tuple[list[int], int]:
        """Return the ids before a plain text, and the end token after it."""
        end = self._files.id_of("eos_token")
        if end is None:
            raise CapasError("the tokenizer has no eos_token, which must end a plain text")
        bos = self.bos_token_id
        return [] if bos is None or self._bos_opens_turns else [bos], end

    @property
    def allows_bos(self) -> bool:
        """Return whether a content may contain bos_token: see `chat_template.allowed_tokens`."""
        bos = self._files.named.get("bos_token")
        return bos is not None and bos not in self.segments.control_ids

    def count_bos(self, messages: Messages, tools: Tools = None) -> int:
        """Return how often bos_token occurs as a token in a rendered conversation."""
        bos = self._files.named["bos_token"]
        if messages[0]["role"] == TEXT:
            start, end = self._bounds_of_text()
            return sum(i == self.bos_token_id for i in (*start, end))
        if not self.allows_bos:
            stand_ins = self._placeholders.choose(messages, tools)
            messages = [dict(stand_ins.hide(message)) for message in messages]
            tools = stand_ins.hide(tools)
        return self._render_placed(messages, False, tools).count(bos)

    @property
    def doubles_bos(self) -> bool:
        """Return whether the template begins a conversation with two bos_token."""
        bos = self._files.named.get("bos_token")
        return bos is not None and self._render_placed([_QUESTION], True).startswith(2 * bos)

    @cached_property
    def _bos_opens_turns(self) -> bool:
        """Return whether bos_token begins turns; a plain text then gets none.

        If bos_token is an end token as well (GPT-2), a plain text gets one at both ends.
        """
        written = self._controls.names(self._render_placed([_QUESTION], True))
        later = [self.segments.control_ids[name] for name in written[1:]]
        ends = (self._files.id_of("eos_token"), *self.end_token_ids)
        return self.bos_token_id in later and self.bos_token_id not in ends


def _mark_thoughts(
    message: Mapping[str, Any], stand_ins: Placeholders, index: int, count: int
) -> tuple[Message, list[str]]:
    """Return the message with marks in place of its thoughts, and these marks."""
    copy, marks = dict(message), []
    if message["role"] == "assistant" and (message.get("reasoning_content") or "").strip():
        marks.append(stand_ins.mark(index))
        copy["reasoning_content"] = marks[-1]
    thought, answer = split_thought(message)
    text = thought.strip().removesuffix(THOUGHT_END).removeprefix(THOUGHT_START)
    if text.strip():
        marks.append(stand_ins.mark(index + count))
        copy["content"] = thought.replace(text.strip(), marks[-1], 1) + answer
    return copy, marks


def _rewritten(expected: str, rendered: str) -> str:
    start = first_difference(expected, rendered)
    return (
        "the chat template changes message content, or branches on it: expected "
        f"{expected[start : start + 40]!r} at character {start}, the template has "
        f"{rendered[start : start + 40]!r}; such a record cannot be masked safely"
    )


def first_difference(found: Sequence[Any], expected: Sequence[Any]) -> int:
    """Return the index of the first item that differs, or the length of the shorter sequence."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
