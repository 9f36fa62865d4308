"""Check that tokens have a row in a model's embedding: a tokenizer may have more tokens than its model."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from capas.core.errors import CapasError, listed
from capas.core.files import read_json

SHOWN = 3  # tokens named in a message


def num_rows(folder: Path) -> int | None:
    """Return how many tokens a model's embedding has, or None if its config.json does not tell."""
    config = read_json(folder / "config.json")
    found = (config.get("text_config") or config).get("vocab_size")
    return found if isinstance(found, int) else None


def tokens_without_row(tokenizer: Tokenizer, rows: int) -> list[int]:
    """Return the ids of the tokens that the embedding lacks."""
    return sorted(i for i in tokenizer.get_vocab(with_added_tokens=True).values() if i >= rows)


def in_words(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return a list of tokens as text: '<|im_end|>' (id 1024), '<pad>' (id 1025) and 2 more."""
    return listed([f"{tokenizer.id_to_token(i)!r} (id {i})" for i in ids], SHOWN)


def check_ids(records: Iterable[Any], others: Sequence[int], folder: Path, tokenizer: Path) -> None:
    """Check that a model has a row for every token that it will be given.

    Args:
        records: the ids of each record, as lists or arrays.
        others: ids that are in no record, such as padding and end tokens.
        folder: the model's folder.
        tokenizer: the tokenizer's folder.

    Raises:
        CapasError: tokens have no row; the message names them.
    """
    rows = num_rows(folder)
    if rows is None:
        return
    beyond: set[int] = set()
    for given in (*records, others):
        ids = given if isinstance(given, list | tuple) else given.tolist()
        if max(ids, default=0) >= rows:
            beyond.update(i for i in ids if i >= rows)
    if beyond:
        named = in_words(sorted(beyond), Tokenizer.from_file(str(tokenizer / "tokenizer.json")))
        raise CapasError(
            f"the model's embedding has {rows} rows (config.json: vocab_size), for the ids 0 to "
            f"{rows - 1}, but the records or the chat template use {named}. Choose a chat_template "
            "and a model.pad_token whose tokens the model has. Or resize the embedding once "
            "(model.resize_token_embeddings(len(tokenizer))), save model and tokenizer with "
            "save_pretrained(FOLDER), and set model.model_name_or_path=FOLDER"
        )
