"""Read general questions, which show what a model forgot while it learned a task.

{"id": "general-en-01", "messages": [{"role": "user", "content": "What is the capital of Portugal?"},
                                     {"role": "assistant", "content": "The capital of Portugal is Lisbon."}]}
"""

import json
from pathlib import Path
from typing import Any

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError


def format_questions(file: Path, chat: ChatFormat) -> list[dict[str, Any]]:
    """Return the conversations of a JSONL file as formatted records; answers with their end token are scored.

    Returns:
        [records], each with id, metadata ("{}"), reference, input_ids and labels.

    Raises:
        CapasError: a line is not a conversation, the template refuses it, or the file is empty.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [_formatted(f"{file}, line {i}", line, chat) for i, line in enumerate(lines, 1)]
    if not records:
        raise CapasError(f"{file} is empty. Restore it: git checkout {file}")
    return records


def _formatted(place: str, line: str, chat: ChatFormat) -> dict[str, Any]:
    try:
        record = json.loads(line)
        name, messages = record["id"], record["messages"]
        reference = messages[-1]["content"]
        encoded = chat.encode([{"role": m["role"], "content": m["content"]} for m in messages])
    except (ValueError, TypeError, LookupError) as error:
        raise CapasError(
            f"{place} is not a conversation with id and messages: {type(error).__name__}: {error}"
        ) from None
    except CapasError as error:
        raise CapasError(f"{place}: {error}") from None
    ids = {"input_ids": encoded.input_ids, "labels": encoded.labels}
    return {"id": name, "metadata": "{}", "reference": reference, **ids}
