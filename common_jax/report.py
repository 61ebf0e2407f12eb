"""Tables of results as aligned text for terminals and logs, and as Markdown for documents."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path

from common_jax.files import write_atomic

MISSING = "-"

Columns = Sequence[str | tuple[str, str]]


def format_table(rows: Sequence[Mapping], columns: Columns, *, title: str | None = None) -> str:
    """Text table: a line per row, numbers flush right, texts flush left, no trailing blanks.

        format_table(rows, ["head", ("accuracy", ".3f"), "images"], title="Scenes")

    columns: keys of the rows in the order wanted, or (key, format). Floats without a format show
    four digits; a missing key, None or NaN shows "-". A key that no row has raises ValueError.
    """
    table, numeric = _cells(rows, columns)
    widths = [max(len(line[c]) for line in table) for c in range(len(numeric))]
    lines = [_align(line, widths, numeric) for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(([title] if title else []) + lines)


def format_markdown_table(
    rows: Sequence[Mapping], columns: Columns, *, title: str | None = None
) -> str:
    """The same table in Markdown, aligned in its source too; bars in cells are escaped."""
    table, numeric = _cells(rows, columns)
    table = [[cell.replace("|", "\\|") for cell in line] for line in table]
    widths = [max(3, *(len(line[c]) for line in table)) for c in range(len(numeric))]
    lines = [
        "| " + " | ".join(_pad(*cell) for cell in zip(line, widths, numeric)) + " |"
        for line in table
    ]
    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(([f"**{title}**", ""] if title else []) + lines)


def write_markdown_table(
    rows: Sequence[Mapping], columns: Columns, path, *, title: str | None = None
) -> Path:
    """Writes format_markdown_table to `path` in one step; returns the path."""
    text = format_markdown_table(rows, columns, title=title)
    write_atomic(path, (text + "\n").encode())
    return Path(path)


def _cells(rows, columns: Columns) -> tuple[list[list[str]], list[bool]]:
    """(header and rows as texts, whether each column is one of numbers)."""
    if isinstance(columns, str) or not columns:
        raise ValueError(f"columns is {columns!r}; give a list of keys or (key, format) pairs")
    pairs = [(column, None) if isinstance(column, str) else column for column in columns]
    rows = [{key: _unwrap(value) for key, value in row.items()} for row in rows]
    known = {key for row in rows for key in row}
    for key, _ in pairs:
        if rows and key not in known:
            raise ValueError(f"no row has the column {key!r}; rows have {sorted(map(str, known))}")
    numeric = [any(_is_number(row.get(key)) for row in rows) for key, _ in pairs]
    table = [[_one_line(key) for key, _ in pairs]]
    table += [[_show(row.get(key), form) for key, form in pairs] for row in rows]
    return table, numeric


def _unwrap(value):
    """Arrays of one number, as metrics come from a device, become that number."""
    return value.item() if getattr(value, "shape", None) == () else value


def _show(value, form: str | None) -> str:
    if value is None or (_is_number(value) and math.isnan(value)):
        return MISSING
    if not _is_number(value):
        return _one_line(value)
    if form is None:
        form = "d" if isinstance(value, numbers.Integral) else ".4g"
    return format(value, form)


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _one_line(value) -> str:
    return " ".join(str(value).split())


def _align(line, widths, numeric) -> str:
    return "  ".join(_pad(*cell) for cell in zip(line, widths, numeric)).rstrip()


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
