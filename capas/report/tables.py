"""Label the cells of tables with their column, so that a narrow screen can stack them."""

import re
from html import unescape

_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
_ROW = re.compile(r"<tr.*?</tr>", re.DOTALL)
_CELL = re.compile(r"<(td|th)\b([^>]*)>(.*?)</\1>", re.DOTALL)
_MARKUP = re.compile(r"<[^>]+>")


def label_cells(html: str) -> str:
    """Return the page with `data-h`, the text of the column's heading, in every cell below a heading.

    A row of only `th` cells is a heading, either of the table or of the rows that follow.
    """
    return _TABLE.sub(lambda table: _label_table(table.group()), html)


def _label_table(table: str) -> str:
    headings: list[str] = []

    def label_row(row: re.Match[str]) -> str:
        nonlocal headings
        cells = _CELL.findall(row.group())
        if all(tag == "th" for tag, _, _ in cells):
            headings = [_text(content) for _, _, content in cells]
            return row.group()
        column = iter(range(len(cells)))

        def label(cell: re.Match[str]) -> str:
            tag, attributes, content = cell.groups()
            number = next(column)
            name = headings[number] if number < len(headings) else ""
            data_attribute = f' data-h="{name}"' if tag == "td" and name else ""
            return f"<{tag}{attributes}{data_attribute}>{content}</{tag}>"

        return _CELL.sub(label, row.group())

    return _ROW.sub(label_row, table)


def _text(markup: str) -> str:
    """Return the words of a heading, escaped for an attribute."""
    words = unescape(_MARKUP.sub(" ", markup)).split()
    return " ".join(words).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
