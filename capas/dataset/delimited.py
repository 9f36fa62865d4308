"""Read CSV and TSV rows with their line numbers; separator, quote and escape are detected unless set."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TextIO

from capas.core.errors import CapasError
from capas.dataset.files import File
from capas.dataset.flaws import BAD_ROW, Flaw, printable, show
from capas.dataset.rows import Row
from capas.dataset.text import Lines, Reading

SEPARATORS = (",", ";", "\t", "|")
NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a |"}
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 200, 2**18


@dataclass(frozen=True)
class Dialect:
    """A CSV dialect: separator, quote, and the escape before a quote in a cell (None: quotes are doubled)."""

    separator: str
    quote: str
    escape: str | None

    def reader(self, lines: Any) -> Any:
        return csv.reader(
            lines,
            delimiter=self.separator,
            quotechar=self.quote,
            escapechar=self.escape,
            doublequote=self.escape is None,
            strict=True,
        )


def read_table(text: TextIO, file: File, reading: Reading) -> Iterator[Row]:
    """Yield the rows of a table, whose first line that is not blank names the columns.

    A column without a name is called by its number, without its empty cells; no shape uses it.

    Raises:
        CapasError: the header cannot be read, or the separator is ambiguous.
    """
    csv.field_size_limit(2**31 - 1)
    lines = Lines(text, file.name, reading.max_record_characters)
    stated = _skip_to_header(lines, file)
    dialect = _find_dialect(lines, file, replace(reading, separator=reading.separator or stated))
    file.read_as["separator"] = dialect.separator
    reader = dialect.reader(lines)
    header = _header(reader, lines, file.name)
    while True:
        lines.begin()
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            flaw = Flaw(BAD_ROW, "", lines.last.rstrip("\r\n"), f"the row is not CSV: {error}")
            yield Row(file.name, "line", start, flaw)
            continue
        if cells:
            yield Row(file.name, "line", start, _row(header, cells, dialect))


def _skip_to_header(lines: Lines, file: File) -> str | None:
    """Skip blank lines and Excel's `sep=;`, and return the separator it states, or None.

    Raises:
        CapasError: the file is empty.
    """
    separator = None
    while ahead := lines.peek(1, 1):
        line = ahead[0].strip("\r\n").strip('"')
        if separator is None and line.lower().startswith("sep=") and len(line) == 5:
            separator = line[4]
        elif ahead[0].strip():
            return separator
        next(lines)
    raise CapasError(f"{file.name} is empty; its first line must name the columns")


def _find_dialect(lines: Lines, file: File, reading: Reading) -> Dialect:
    sample = lines.peek(_SAMPLE_LINES, _SAMPLE_CHARACTERS)
    if len(sample) == _SAMPLE_LINES or sum(map(len, sample)) >= _SAMPLE_CHARACTERS:
        sample = sample[:-1] or sample  # the last line may be cut off, and with it its record
    fitting: dict[Dialect, float] = {}
    for dialect in _possible(sample, file, reading):
        width, fraction = _fit(dialect, sample)
        if width > 1 and dialect.separator not in {d.separator for d in fitting if fitting[d] == 1}:
            fitting[dialect] = fraction
    if not fitting:
        return next(_possible(sample, file, reading))
    best = [d for d, fraction in fitting.items() if fraction == max(fitting.values())]
    separators = dict.fromkeys(d.separator for d in best)
    if len(separators) > 1:
        raise CapasError(
            f"{file.name}, line {lines.number + 1}: the separator of {show(sample[0].rstrip())} is "
            f"ambiguous: {' or '.join(NAMES.get(s, s) for s in separators)}. Set it, e.g. "
            f"dataset.reading.separator='{best[0].separator}'"
        )
    return best[0]


def _possible(sample: list[str], file: File, reading: Reading) -> Iterator[Dialect]:
    """Yield the dialect that is set, or all dialects in use, the most common first."""
    tab = ("\t",) if file.suffix == ".tsv" else SEPARATORS
    for separator in (reading.separator,) if reading.separator else tab:
        cells = sample[0].strip().split(separator)
        single = all(len(c) > 1 and c.strip()[:1] == c.strip()[-1:] == "'" for c in cells)
        quote = reading.quote or ("'" if single else '"')
        backslash = ("\\",) if any(f"\\{quote}" in line for line in sample) else ()
        for escape in (reading.escape,) if reading.escape else (None, *backslash):
            yield Dialect(separator, quote, escape)


def _fit(dialect: Dialect, sample: list[str]) -> tuple[int, float]:
    """Return the number of columns, and the fraction of rows with as many cells."""
    reader = dialect.reader(sample)
    try:
        width = len(next(reader, []))
    except csv.Error:
        return 0, 0.0
    num_rows = num_fitting = 0
    while True:
        try:
            cells = next(reader, None)
        except csv.Error:
            num_rows += 1
            continue
        if cells is None:
            return width, num_fitting / num_rows if num_rows else 1.0
        num_rows += bool(cells)
        num_fitting += len(cells) == width


def _header(reader: Any, lines: Lines, name: str) -> list[str]:
    try:
        header = [cell.strip() for cell in next(reader)]
    except csv.Error as error:
        raise CapasError(
            f"{name}, line {lines.number}: the header {show(lines.last.rstrip())} cannot be parsed: "
            f"{error}. Fix its quotes, or set dataset.reading.separator and dataset.reading.quote"
        ) from None
    if any(printable(column) != column for column in header):
        raise CapasError(
            f"{name}, line {lines.number}: {show(header)} is not UTF-8; save the file as UTF-8, or "
            "set dataset.reading.encoding"
        )
    if not any(header):
        raise CapasError(
            f"{name}, line {lines.number}: the header {show(header)} has no column names"
        )
    twice = {column for column in header if column and header.count(column) > 1}
    if twice:
        raise CapasError(
            f"{name}, line {lines.number}: column names must be unique; duplicated: "
            f"{', '.join(sorted(map(repr, twice)))}"
        )
    return header


def _row(header: list[str], cells: list[str], dialect: Dialect) -> Any:
    if len(cells) != len(header):
        separator = NAMES.get(dialect.separator, dialect.separator)
        text = (
            f"the row has {len(cells)} cells but the header {len(header)} columns; quote cells that "
            f"contain {separator}"
        )
        return Flaw(BAD_ROW, "", cells, text)
    named = [column or f"column {i} (without a name)" for i, column in enumerate(header, 1)]
    return {
        name: cell
        for name, column, cell in zip(named, header, cells, strict=True)
        if column or cell
    }
