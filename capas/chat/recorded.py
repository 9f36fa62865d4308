"""The chat format that data/formatted was made with, for stages that format more in it."""

from pathlib import Path

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError
from capas.core.files import read_json


def recorded_format(formatted: Path, tokenizer: Path) -> ChatFormat:
    """The template of this run with its tokenizer.

    Args:
        formatted: data/formatted.
        tokenizer: data/models/tokenizer.

    Raises:
        CapasError: template and tokenizer encode other ids now than when the records were formatted.
    """
    text = (formatted / "chat_template.jinja").read_text(encoding="utf-8")
    chat = read_json(formatted / "chat.json")
    found = ChatFormat.load(
        text, tokenizer, chat["date_string"], chat["system"], chat["allowed_tokens"]
    )
    if found.probes_sha256() != chat["probes_sha256"]:
        raise CapasError(
            f"{formatted}/chat_template.jinja and {tokenizer} no longer give the token ids in "
            f"{formatted}: the model would be prompted in another format than it was trained in. "
            "Run `dvc repro`."
        )
    return found
