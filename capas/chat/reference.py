"""Compare a sample of records with transformers' formatting, in a folder like the tuned model's.

Servers build prompts with `AutoTokenizer.from_pretrained(folder).apply_chat_template(...)`. Its ids must be
those of the formatted records. Otherwise the model would be prompted in another format than it was trained
in.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capas.chat.audit import Sampled
from capas.chat.format import ChatFormat, first_difference
from capas.chat.template import fixed_clock
from capas.core.errors import CapasError

log = logging.getLogger("capas")
_ROOT = Path(__file__).parents[2]
_Request = dict[str, Any]  # messages, tools, add_generation_prompt


def compare(chat: ChatFormat, samples: Mapping[str, Sequence[Sampled]]) -> int:
    """Return the number of sampled records that were compared; 0 if transformers cannot load the folder.

    Raises:
        CapasError: the ids of a record differ; the message names the record and the first such token. Or
            transformers failed.
    """
    pairs = [(split, sampled) for split, of_split in samples.items() for sampled in of_split]
    requests, expected, whose = [], [], []
    for split, sampled in pairs:
        for ids, count, prompts in ((sampled.ids, None, False), (sampled.prompt_ids, -1, True)):
            if ids is not None:
                messages = chat.shown(sampled.messages[:count])
                requests.append(_request(messages, sampled.tools, prompts))
                expected.append(ids)
                whose.append((split, sampled.identity, "prompt" if prompts else "conversation"))
    found = _answers_of_transformers(chat, requests)
    if isinstance(found, str):
        log.warning(
            "the check against transformers was skipped: it cannot load this tokenizer: %s", found
        )
        return 0
    for (split, identity, part), ids, theirs in zip(whose, expected, found, strict=True):
        if ids != theirs:
            raise CapasError(
                f"{split} record {identity!r}, {part}: {_difference(ids, theirs, chat)}"
            )
    return len(pairs)


def _request(messages: list[Any], tools: Any, add_generation_prompt: bool) -> _Request:
    return {
        "conversation": messages,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }


def _difference(ours: list[int], theirs: list[int] | str, chat: ChatFormat) -> str:
    advice = (
        "Users of the tuned model would prompt it in another format than it was trained in. If the "
        "tokenizer's files disagree, save them again with "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER) and set "
        "model.model_name_or_path=OTHER. Otherwise please report this record"
    )
    if isinstance(theirs, str):
        return (
            f"transformers' apply_chat_template fails on the tokenizer's folder: {theirs}. {advice}"
        )
    at = first_difference(ours, theirs)

    def show(ids: list[int]) -> str:
        return (
            f"{chat.tokenizer.id_to_token(ids[at])!r} (id {ids[at]})"
            if at < len(ids)
            else "nothing"
        )

    return (
        f"its ids differ from those of transformers' apply_chat_template, first at token {at}: "
        f"{show(ours)} here, {show(theirs)} in transformers. {advice}"
    )


def _answers_of_transformers(
    chat: ChatFormat, requests: Sequence[_Request]
) -> list[list[int] | str] | str:
    """Return the result of `_answers`, from a separate process unless this one has imported transformers."""
    with TemporaryDirectory(prefix="capas-tokenizer-") as name:
        folder = Path(name)
        for file in chat.folder.iterdir():
            shutil.copyfile(file, folder / file.name)
        (folder / "chat_template.jinja").write_text(chat.template_text, encoding="utf-8")
        if "transformers" in sys.modules:
            return _answers(folder, chat.date_string, requests)
        given = json.dumps([str(folder), chat.date_string, requests])
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "capas.chat.reference"],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            input=given.encode(),
            capture_output=True,
            check=False,
        )
    if done.returncode:
        raise CapasError(
            "the records could not be compared with transformers: python -m capas.chat.reference ended "
            f"with exit code {done.returncode}: {done.stderr.decode(errors='replace').strip()[-2000:]}"
        )
    answers: list[list[int] | str] | str = json.loads(done.stdout)
    return answers


def _answers(
    folder: Path, date_string: str, requests: Iterable[_Request]
) -> list[list[int] | str] | str:
    """Return each conversation's ids, or the reason why transformers refuses it.

    Return only a reason if transformers cannot load the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001  a tokenizer's class may raise anything
        return f"{type(error).__name__}: {error}"
    clock = {"date_string": date_string, "strftime_now": fixed_clock(date_string)}
    found: list[list[int] | str] = []
    for request in requests:
        try:
            found.append(
                tokenizer.apply_chat_template(**request, **clock, tokenize=True, return_dict=False)
            )
        except Exception as error:  # noqa: BLE001  as above
            found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    # Tokenizers do not need torch, which takes seconds to import.
    sys.modules["torch"] = None  # type: ignore[assignment]
    given_folder, given_date, given_requests = json.load(sys.stdin)
    sys.stdout.write(json.dumps(_answers(Path(given_folder), given_date, given_requests)))
