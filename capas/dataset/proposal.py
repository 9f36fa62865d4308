"""Propose how to read a file: its format, and its shape or its columns of question and answer."""

import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capas.core.errors import CapasError
from capas.dataset.files import KNOWN, File, expand
from capas.dataset.readers import read_rows
from capas.dataset.shapes import example, recognises
from capas.dataset.source import Source

# Names of columns, without accents, in English and Spanish; the first one in a file is used.
QUESTIONS = (
    *("question", "prompt", "instruction", "query", "request", "user", "message", "input"),
    *("ticket", "review", "sentence", "text", "body", "title", "subject"),
    *("pregunta", "consulta", "instruccion", "peticion", "mensaje", "entrada", "texto", "frase"),
)
ANSWERS = (
    *("answer", "response", "completion", "reply", "output", "assistant", "resolution", "solution"),
    *("label", "target", "category", "class", "intent", "sentiment", "topic", "queue"),
    *("summary", "chosen"),
    *("respuesta", "contestacion", "salida", "solucion", "etiqueta", "categoria", "resumen"),
)
CONTEXTS = ("context", "passage", "document", "article", "contexto", "documento")
_NUMBERS = ("no", "nr", "num", "number", "numero", "date", "fecha")  # of no text
SYSTEMS, IDS = ("system", "system_prompt"), ("id", "uid", "uuid", "key", "clave")


def format_of(file: Path) -> str:
    """Return dataset.path for a file: json, csv, parquet or text.

    Raises:
        CapasError: the file's suffix is unknown.
    """
    found = File(file.name, file.parent).format
    if found is None:
        raise CapasError(
            f"{file}: unknown format; the file name must end with {KNOWN}, each also with .gz "
            "or .zst appended"
        )
    return found


def columns_of(source: Source, root: Path) -> list[str]:
    """Return the columns of a source's first record, or none if the record is not an object.

    Raises:
        CapasError: the file cannot be read.
    """
    assert source.data_files is not None
    names = source.data_files if isinstance(source.data_files, list) else [str(source.data_files)]
    for file in expand(names, source.path, root):
        for row in read_rows(file, source.reading):
            return list(row.value) if isinstance(row.value, Mapping) else []
    return []


def propose_columns(there: Sequence[str], stated: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return shape and columns of `conf/dataset` for a file with these columns.

    The stated columns are kept if the file has them. A known shape needs no columns. A single column is plain
    text. Otherwise the names decide. If the names of exactly two columns are all unknown, the first is the
    question.

    Raises:
        CapasError: the columns of question and answer cannot be determined.
    """
    if stated and set(_flat(stated)) <= {*there}:
        return {"shape": "columns", "columns": dict(stated)}
    if recognises(dict.fromkeys(there)):
        return {"shape": "auto", "columns": None}
    if len(there) == 1:
        return {"shape": "columns", "columns": {"text": there[0]}}
    user = _first(there, QUESTIONS) or _first(there, CONTEXTS)
    assistant = _first(there, ANSWERS)
    if user is None and assistant is None and len(there) == 2:
        user, assistant = there
    if user is None or assistant is None or user == assistant:
        texts = [name for name in there if _first([name], (*IDS, *_NUMBERS)) is None]
        raise CapasError(
            "cannot tell which columns hold question and answer: "
            f"{', '.join(map(repr, there)) or 'none'}. Name them, for example: capas check FILE "
            f"{shlex.quote(f'dataset.columns={example(texts, user, assistant)}')}"
        )
    context = _first([name for name in there if name not in (user, assistant)], CONTEXTS)
    columns: dict[str, Any] = {"user": [user, context] if context else user, "assistant": assistant}
    for role, names in (("system", SYSTEMS), ("id", IDS)):
        if (name := _first(there, names)) and name not in _flat(columns):
            columns[role] = name
    return {"shape": "columns", "columns": columns}


def _flat(columns: Mapping[str, Any]) -> Iterator[str]:
    for names in columns.values():
        yield from [names] if isinstance(names, str) else names


def _first(there: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column with one of the names, or ending with one (customer_question), or None."""
    plain = {column: _plain(column) for column in there}
    for name in names:
        for column, written in plain.items():
            if written == name:
                return column
    for name in names:
        for column, written in plain.items():
            if written.endswith(f"_{name}"):
                return column
    return None


def _plain(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name.strip().casefold())
    kept = "".join(c for c in letters if not unicodedata.combining(c))
    return "_".join(kept.replace("-", " ").replace(".", " ").split())
