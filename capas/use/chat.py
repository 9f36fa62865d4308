"""Talk to the tuned model, and to its base for comparison.

    capas chat                      the workspace's result
    capas chat --run RUN            an MLflow run: run id or its beginning, run name, or DVC experiment
    capas chat --setting top_p      decode with a setting of conf/generation (default: the first)
    echo "set a timer" | capas chat      one answer per input line

The chat template, its end tokens, the system message and the tools are those of the training data (of the
first test record). If all records are single-turn, each question starts a new conversation. Commands between
the questions:

    /base           the base model's answer to the last question
    /setting NAME   decode with another setting; without NAME: list the settings
    /system TEXT    set the system message and start a new conversation; /system none: no system
                    message; without TEXT: print the current one
    /reset          start a new conversation
    /help           print this list
    /quit           or Ctrl-D

Exit code: 0 all questions were answered, 2 some were not, 130 stopped.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError
from capas.core.params import Params
from capas.core.records import TEXT
from capas.evaluation.prompts import DEFAULT_NEW_TOKENS
from capas.models.architecture import num_positions
from capas.use import tuned_model
from capas.use.tuned_model import Tuned

Message = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tuned_model.add_arguments(parser)
    parser.add_argument(
        "--setting", metavar="NAME", help="setting of generation.settings to decode with"
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="system message (default: the one used in training)"
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON file with a list of tools; [] for no tools"
    )
    parser.add_argument(
        "--history",
        action="store_true",
        help="keep the history even if the data is single-turn",
    )
    counts, seeds = tuned_model.bounded(int, 1, sys.maxsize), tuned_model.bounded(int, 0, 2**63 - 1)
    parser.add_argument(
        "--max-new-tokens",
        type=counts,
        metavar="N",
        help=(
            "maximum tokens of an answer (default: generation.max_new_tokens, or "
            f"{DEFAULT_NEW_TOKENS})"
        ),
    )
    parser.add_argument("--seed", type=seeds, default=0, help="seed for sampling")


def command(options: argparse.Namespace) -> int:
    from capas.use.served_model import Served

    with tuned_model.tuned(Path.cwd(), options.run) as source:
        served = Served(source.folder)
        talk = Talk(served, source, options)
        if sys.stdin.isatty():
            tuned_model.say(
                f"{source.name}, {talk.setting}. /base: the base model's answer, /quit: end, "
                "`capas chat -h`: help."
            )
            if not talk.keeps:
                tuned_model.say(
                    "Each question starts a new conversation, as in the training data "
                    "(--history keeps the history)."
                )
            if talk.tools:
                tuned_model.say(
                    f"The model is offered {len(talk.tools)} tools (--tools FILE for others)."
                )
        code = 0
        for line in _lines():
            try:
                going_on = talk.hear(line)
            except CapasError as error:
                tuned_model.say(f"capas: {error}")
                code = 0 if sys.stdin.isatty() else 2
                continue
            except KeyboardInterrupt:  # Ctrl-C ends the answer, not the program
                tuned_model.say("\n(stopped)")
                continue
            if not going_on:
                break
    return code


_HELP = (__doc__ or "").partition("questions:\n\n")[2].partition("\n\n")[0]


class Talk:
    """The conversation so far."""

    def __init__(self, served: Any, source: Tuned, options: argparse.Namespace) -> None:
        import torch

        self._served, self._settings = served, source.params.generation.settings
        set_there = source.params.generation.max_new_tokens
        self._max_new_tokens = options.max_new_tokens or set_there or DEFAULT_NEW_TOKENS
        self._system = served.facts["system"] if options.system is None else options.system
        self.tools = served.tools if options.tools is None else read_tools(options.tools)
        self._history: list[Message] = []
        facts = served.facts  # models published by an earlier capas lack the key multi_turn
        self.keeps = options.history or "multi_turn" not in facts or facts["multi_turn"]
        self.setting = ""
        self._choose(options.setting or next(iter(self._settings)))
        torch.manual_seed(options.seed)

    def hear(self, line: str) -> bool:
        """Answer a question or run a command, and return whether to continue.

        Raises:
            CapasError: no such command or setting, the template refuses the conversation, or it is longer
                than the model's context. The conversation stays as it was.
        """
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/"):
            if word:
                self._ask(line.strip())
            return True
        if word == "/quit":
            return False
        acts = {
            "/base": lambda: self._compare(),
            "/help": lambda: tuned_model.say(_HELP),
            "/reset": lambda: self._reset(),
            "/setting": lambda: self._set(rest.strip()),
            "/system": lambda: self._begin(rest.strip()),
        }
        if word not in acts:
            raise CapasError(f"there is no {word}; there are {', '.join([*acts, '/quit'])}")
        acts[word]()
        return True

    def _ask(self, text: str) -> None:
        role = self._served.facts["role"]
        if role == TEXT or not self.keeps:
            self._history.clear()
        messages = [*self._history, {"role": role, "content": text}]
        self._history = [*messages, {"role": "assistant", "content": self._answer(messages)}]

    def _compare(self) -> None:
        if not self._history:
            raise CapasError("no question has been asked yet")
        self._answer(self._history[:-1], base=True)

    def _reset(self) -> None:
        self._history.clear()
        tuned_model.say("New conversation.")

    def _set(self, name: str) -> None:
        self._choose(name)
        tuned_model.say(f"Decoding with the setting {name}.")

    def _choose(self, name: str) -> None:
        if name not in self._settings:
            what = f"generation.settings has no {name!r}" if name else f"now: {self.setting}"
            raise CapasError(f"{what}; there are {', '.join(self._settings)}")
        self.setting = name

    def _begin(self, system: str) -> None:
        if system:
            self._system = None if system == "none" else system
            self._history.clear()
        now = "none" if self._system is None else self._system
        tuned_model.say(f"System message{' of a new conversation' if system else ''}: {now}")

    def _answer(self, messages: list[Message], base: bool = False) -> str:
        """Write the answer to standard output as it is generated, and return it."""
        import torch

        from capas.evaluation.generation import generation_config

        before = (
            []
            if self._system is None or messages[0]["role"] == TEXT
            else [{"role": "system", "content": self._system}]
        )
        both = self._served.tuned
        ids = self._served.format.prompt_ids([*before, *messages], self.tools)
        model = both.model
        limit = num_positions(model.config)
        if limit is not None and len(ids) + self._max_new_tokens > limit:
            ways = [f"--max-new-tokens {limit - len(ids)}"] if len(ids) < limit else []
            ways.append(
                "/reset for a new conversation"
                if self._history and self.keeps
                else "shorten the question"
            )
            raise CapasError(
                f"the conversation has {len(ids)} tokens and its answer may have "
                f"{self._max_new_tokens}, but the model's context is {limit} tokens: "
                f"{', or '.join(ways)}"
            )
        settings: Params = self._settings[self.setting]
        config = generation_config(self._served.chat, self._max_new_tokens, **settings.without())
        inputs = torch.tensor([ids], device=model.device)
        streamer = _streamer(self._served)
        with torch.inference_mode(), both.base() if base else nullcontext(model) as answering:
            answering.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config,
                streamer=streamer,
            )
        return streamer.text


def read_tools(file: Path) -> list[Any] | None:
    """Return the tools in a JSON file, or None for an empty list.

    Raises:
        CapasError: the file cannot be read, or is not a JSON list of objects.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CapasError(f"--tools {file}: {error}") from None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise CapasError(
            f"--tools {file}: expected a JSON list of objects, as in a record's `tools`"
        )
    return found or None


def _streamer(served: Any) -> Any:
    """Return a streamer that writes an answer to stdout as it is generated; `text` is the answer so far."""
    from transformers.generation import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.text, self._ids, self._shown, self._is_prompt = "", list[int](), "", True

        def put(self, value: Any) -> None:
            if self._is_prompt:
                self._is_prompt = False
                return
            stops = served.chat["stop_token_ids"]
            self._ids += [i for i in value.flatten().tolist() if i not in stops]
            self.text = served.format.decode(self._ids)
            if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):  # an incomplete character
                self._show()

        def end(self) -> None:
            self._show()
            sys.stdout.write("\n")
            sys.stdout.flush()

        def _show(self) -> None:
            sys.stdout.write(self.text[len(self._shown) :])
            sys.stdout.flush()
            self._shown = self.text

    return Streamer()


def _lines() -> Iterator[str]:
    """Yield the lines that the user types, or the lines of standard input.

    Raises:
        CapasError: a line of standard input is not UTF-8.
    """
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise CapasError(
                    f"line {number} of standard input is not UTF-8 ({error.reason} at byte {error.start}): "
                    "convert it, e.g. iconv -f LATIN1 -t UTF-8 FILE"
                ) from None
        return
    import readline  # noqa: F401  gives input() line editing and a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            tuned_model.say("")
            return
