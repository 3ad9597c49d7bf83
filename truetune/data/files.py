"""Rows of files, read when they are asked for, so that only their places are in memory.

JSONL and CSV are read by byte offset, a value at a time, so that nothing is unified or guessed: arguments of tool calls
may differ from row to row, and every cell of a CSV is text. Parquet goes through ``datasets``, which maps it into
memory. A file of JSON (one list of objects, or in fact lines of them) of the first kind is held in memory whole. A file
of text is one row. Left out: compressed files, other delimiters than commas, tables without a header.
"""

from __future__ import annotations

import csv
import io
import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from truetune.errors import UserError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]

_AT_ONCE = 256
"""Rows of a table that are made Python values together."""
_LONGEST_CELL = 2**31 - 1


class Stored(Sequence[Row]):
    """Rows that are not in memory. What reads many does so with ``read``, in the order of ``places``."""

    @abstractmethod
    def read(self, places: Iterable[int]) -> Iterator[Row]: ...

    def __getitem__(self, place: int) -> Row:  # type: ignore[override]  # no slices
        if not 0 <= place < len(self):
            raise IndexError(place)
        return next(self.read([place]))

    def __iter__(self) -> Iterator[Row]:
        return self.read(range(len(self)))


class Records(Stored):
    """Rows of a text file by where their bytes begin and end. ``parse`` makes a row of them, or raises UserError that
    begins with its second argument."""

    def __init__(self, path: Path, spans: Sequence[tuple[int, int]], parse: Callable[[bytes, str], Row]) -> None:
        self._path, self._parse = path, parse
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        with self._path.open("rb") as file:
            for place in places:
                begin, end = map(int, self._spans[place])
                file.seek(begin)
                yield self._parse(file.read(end - begin), f"{self._path}: row {place} (the first is 0)")


class Table(Stored):
    """Rows of a ``datasets`` table, which is mapped into memory."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        left = iter(places)
        while some := list(islice(left, _AT_ONCE)):
            yield from self._table[some].to_pylist()


class Texts(Stored):
    """One row {"text"} per file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        for place in places:
            yield {"text": _text(self._paths[place])}


class Joined(Stored):
    """The rows of several parts, end to end."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        for part, some in groupby(places, key=lambda place: bisect_right(self._starts, place) - 1):
            yield from read(self._parts[part], (place - self._starts[part] for place in some))


class Picked(Stored):
    """Some of the rows of another store."""

    def __init__(self, rows: Stored, places: Sequence[int]) -> None:
        self._rows, self._places = rows, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, places: Iterable[int]) -> Iterator[Row]:
        return self._rows.read(int(self._places[place]) for place in places)


def read(rows: Sequence[Row], places: Iterable[int]) -> Iterator[Row]:
    """The rows at ``places``, wherever they are kept."""
    return rows.read(places) if isinstance(rows, Stored) else (rows[place] for place in places)


def jsonl(path: Path) -> Sequence[Row]:
    spans, begin = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if _json_line(line, f"{path}:{number}"):
                spans.append((begin, begin + len(line)))
            begin += len(line)
    return Records(path, spans, _json_row)


def _json_row(line: bytes, where: str) -> Row:
    row = _json_line(line, where)
    if row is None:
        raise UserError(f"{where} has changed since the file was opened; start again")
    return row


def _json_line(line: bytes, where: str) -> Row | None:
    """The object on one line; None if the line is blank."""
    text = _decoded(line, where).strip()
    return _columns(_json(text, where, "put exactly one JSON object on each line"), where) if text else None


def json_list(path: Path) -> Sequence[Row]:
    """A list of objects; where the file does not begin with a bracket, its lines are objects."""
    with path.open("rb") as file:
        if not file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return jsonl(path)
    rows = _json(_text(path), str(path), "write one list of objects")
    return [_columns(row, f"{path}: row {i} (the first is 0)") for i, row in enumerate(rows)]


def _json(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as fault:
        line = f"line {fault.lineno}, " if fault.lineno > 1 else ""
        raise UserError(f"{where} is not JSON ({fault.msg} at {line}column {fault.colno}); {advice}") from None
    except (RecursionError, ValueError):
        raise UserError(f"{where} nests values or writes digits without end; remove this line") from None


def _columns(row: Any, where: str) -> Row:
    if isinstance(row, dict) and row:
        return row
    text = json.dumps(row, ensure_ascii=False)
    shown = text if len(text) <= 40 else text[:37] + "..."
    raise UserError(f"{where} is no JSON object with columns but {shown}; put one on each line")


def table(path: Path) -> Sequence[Row]:
    """CSV with a header, all of whose cells are text."""
    csv.field_size_limit(_LONGEST_CELL)
    spans = []
    with path.open("rb") as file:
        lines = _Lines(file, str(path))
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        while True:
            begin, first = lines.end, lines.number + 1
            try:
                cells = next(reader, None)
            except csv.Error as fault:
                raise UserError(f"{path}:{first} is no line of CSV ({fault}); quote its cells") from None
            if cells is None:
                break
            if not cells:  # a blank line
                continue
            if not header:
                header = _header(cells, str(path))
            elif len(cells) != len(header):
                raise UserError(
                    f"{path}:{first} has {len(cells)} cells, and the header {len(header)}; quote cells that hold "
                    "commas or line breaks"
                )
            else:
                spans.append((begin, lines.end))

    def parse(record: bytes, where: str) -> Row:
        found = next(csv.reader(io.StringIO(_decoded(record, where), newline=""), strict=True))
        return dict(zip(header, found, strict=True))

    return Records(path, spans, parse)


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) < len(cells) or not all(cells):
        raise UserError(f"the first line of {where} does not name each column once; write a header")
    return cells


class _Lines:
    """The lines of a file as text, with the number of the last and the byte after it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.number = self.end = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            self.end += len(line)
            yield _decoded(line, f"{self._name}:{self.number}")


def parquet(path: Path) -> Sequence[Row]:
    import datasets

    try:
        return Table(datasets.Dataset.from_parquet(str(path)))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as fault:
        told = str(fault.__cause__ or fault).strip().splitlines() or [type(fault).__name__]
        raise UserError(f"{path} is no Parquet that can be read ({told[0].rstrip('.')}); write it again") from fault


def _text(path: Path) -> str:
    return _decoded(path.read_bytes(), str(path))


def _decoded(found: bytes, where: str) -> str:
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8; save the file as UTF-8") from None


TABLES: dict[str, Callable[[Path], Sequence[Row]]] = {
    ".jsonl": jsonl,
    ".json": json_list,
    ".csv": table,
    ".parquet": parquet,
}
"""What reads a file of rows, by the end of its name."""

TEXTS = (".txt", ".md")
"""Ends of the names of files that are one row of text each."""
