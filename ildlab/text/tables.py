"""Rows of tables: which column is the text, which rows have none, and no number or mark taken for a text.

The first rows choose the column: the one asked for; else "text"; else the only one that holds strings, where nearly
all rows have it and it reads as text does. Whatever is doubtful is refused, since a student would learn ids by heart.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ildlab.errors import TextError
from ildlab.files import open_text

_LOOKED = 500  # rows that choose the column


@dataclass
class Tally:
    """Rows that were read, and those of them that were left out: null, absent or empty where the text should be."""

    rows: int = 0
    empty: int = 0

    def note(self, source: str) -> str:
        """What a person is told of it; nothing where all rows hold text."""
        told = f"{self.empty:,} of {self.rows:,} rows of {source} hold no text, and were left out."
        return told if self.empty else ""


@contextmanager
def expecting(kind: str, file: Path) -> Iterator[None]:
    """Name the file in whatever a reader of text, JSON, gzip or parquet says of one that it cannot read."""
    try:
        yield
    except (ValueError, EOFError, OSError, NotImplementedError, RecursionError, zlib.error) as error:
        raise TextError(f"{file} cannot be read as {kind}: {error}.") from error


def jsonl_texts(file: Path, wanted: str | None, tally: Tally) -> Iterator[str]:
    """Texts of a .jsonl or .jsonl.gz file; a row's number is its line's."""
    with expecting("JSON lines (one JSON value a line)", file), open_text(file) as lines:
        yield from texts_of(file, _values(lines), wanted, tally)


def _values(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"row {number}: {getattr(error, 'msg', error)}") from error


def parquet_texts(file: Path, wanted: str | None, tally: Tally) -> Iterator[str]:
    """Texts of a .parquet file, of which the other columns are not read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise TextError(f"Reading {file} needs pyarrow: pip install 'ildlab[data]'.") from error
    with expecting("parquet", file), pq.ParquetFile(file) as table:
        types = {field.name: field.type for field in table.schema_arrow}
        types = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in types.items()}
        texts = [name for name, kind in types.items() if kind in (pa.string(), pa.large_string(), pa.null())]
        first = next(table.iter_batches(_LOOKED, columns=texts), None)
        if first is None:
            return
        # What the schema says is no text is not read, and stands there as a number.
        rows = [dict.fromkeys(types, 0) | row for row in (first.to_pylist() if texts else [{}])]
        column = _column(file, rows, wanted)
        values = (value for batch in table.iter_batches(columns=[column]) for value in batch.column(0).to_pylist())
        yield from texts_of(file, enumerate(values, 1), None, tally)


def texts_of(where: object, rows: Iterator[tuple[int, Any]], wanted: str | None, tally: Tally) -> Iterator[str]:
    """Yield the text of each numbered row, which is a str, a dict with one, or None; rows without are counted.

    Raises TextError where no column or another than the one asked for holds text, or a value is something else.
    """
    first = list(islice(rows, _LOOKED))
    named, column = [row for _, row in first if isinstance(row, dict)], None
    for number, row in chain(first, rows):
        if isinstance(row, dict):
            column = _column(where, named or [row], wanted) if column is None else column
            row = row.get(column)
        if not isinstance(row, str | None):
            place = "" if column is None else f" in {column!r}"
            raise TextError(f"Row {number} of {where} holds {type(row).__name__}{place} where text was expected.")
        tally.rows += 1
        if row and not row.isspace():
            yield row
        else:
            tally.empty += 1


def _column(where: object, rows: list[dict[str, Any]], wanted: str | None) -> str:
    """Choose the column to read by the first rows of a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    strings = {name: [v for row in rows if isinstance(v := row.get(name), str)] for name in names}
    strings = {name: values for name, values in strings.items() if values}
    held = f"these hold text: {', '.join(strings)}" if strings else "no column holds text"
    name = "text" if wanted is None else wanted
    if name in names:
        # Nulls may be texts further on.
        if name in strings or all(row.get(name) is None for row in rows):
            return name
        raise TextError(f"The column {name!r} of {where} does not hold text; {held}. Name another by text_column=.")
    if wanted is not None:
        first = f" in its first {_LOOKED} rows" if len(rows) == _LOOKED else ""
        raise TextError(f"{where} has no column {name!r}{first}; it has {', '.join(names) or 'none'}.")
    if len(strings) == 1:
        [(name, values)] = strings.items()
        many = len(values) >= 0.9 * len(rows)
        if many and sum(map(_reads_as_text, values)) * 2 >= len(values):
            return name
        held = f"only {name!r} holds strings, such as {values[0][:40]!r}, and "
        held += "they do not read as text" if many else f"{len(values)} of {len(rows)} rows have it"
    raise TextError(f"Say which column of {where} to read (text_column=...): {held}.")


def _reads_as_text(value: str) -> bool:
    """Whether there are three words, or ten letters of a script that may have no spaces: ids, dates, links are not."""
    words = (word for word in value[:1000].split() if sum(map(str.isalpha, word)) > 1)
    return len(list(islice(words, 3))) == 3 or sum(c > "\u0250" and c.isalpha() for c in value[:1000]) >= 10
