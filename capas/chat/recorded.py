"""Load the chat format of data/formatted, for stages that read or format conversations in it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capas.chat.format import ChatFormat
from capas.core.errors import CapasError
from capas.core.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def recorded_format(formatted: Path, tokenizer: Path) -> ChatFormat:
    """Return the chat format of this run: its template with its tokenizer.

    Args:
        formatted: the folder data/formatted.
        tokenizer: the folder data/models/tokenizer.

    Raises:
        CapasError: template and tokenizer now give other ids than when the records were formatted.
    """
    text = (formatted / "chat_template.jinja").read_text(encoding="utf-8")
    chat = read_chat(formatted)
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


def read_chat(formatted: Path) -> dict[str, Any]:
    """Return chat.json of data/formatted: special tokens, end tokens, settings of the template."""
    return read_json(formatted / "chat.json")


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load the tokenizer in `folder`, without transformers."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))
