"""Documents as columns, in memory or mapped from files, so that their number costs no memory.

The tokens of all documents stand end to end in one array, their targets in another, and so on; a ``Document`` is a view
that is made when it is asked for. On disk a column is a flat file of its dtype, and a manifest, written last, has the
size and the SHA-256 of each: what does not match it is no store, and is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from truetune.data.batch import Document
from truetune.errors import UserError

COLUMNS: dict[str, type] = {
    "tokens": np.int32,
    "targets": np.bool_,
    "weights": np.float32,  # empty where no document has any
    "lengths": np.int64,
    "rows": np.int64,
    "ends": np.int64,
    "end_counts": np.int64,
}
PER_TOKEN = ("tokens", "targets", "weights")
MANIFEST, REPORT = "manifest.json", "report.json"
MEMORY = 1 << 20
"""Tokens above which documents go to disk."""
_STALE, _UNUSED = 86_400, 30 * 86_400
"""Seconds after which what a killed process left half written is removed, and a store that nobody has read."""


class Kept(Sequence[Document]):
    """Documents that are made when they are asked for, by ``at`` of a place from 0."""

    @abstractmethod
    def at(self, place: int) -> Document: ...

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self.at(i) for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.at(place % len(self))


class Documents(Kept):
    """``columns`` are those of ``COLUMNS``; tokens, targets and weights may be mapped from files."""

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.columns = columns
        self.lengths = columns["lengths"]
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._end_starts = np.concatenate([[0], np.cumsum(columns["end_counts"])])

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Documents:
        weighed = any(d.weights is not None for d in documents)
        parts: dict[str, list[Any]] = {
            "tokens": [d.tokens for d in documents],
            "targets": [d.targets for d in documents],
            "weights": [_weights(d) for d in documents] if weighed else [],
            "ends": [d.ends for d in documents],
        }
        columns: dict[str, np.ndarray] = {}
        for name, found in parts.items():
            columns[name] = np.concatenate([np.zeros(0, COLUMNS[name]), *found]).astype(COLUMNS[name])
        columns["lengths"] = np.array([len(d) for d in documents], dtype=np.int64)
        columns["rows"] = np.array([d.row for d in documents], dtype=np.int64)
        columns["end_counts"] = np.array([len(d.ends) for d in documents], dtype=np.int64)
        return cls(columns)

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        weighed = any(part.weighed for part in parts)
        columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in COLUMNS if name != "weights"}
        columns["weights"] = np.concatenate([p.weights for p in parts]) if weighed else parts[0].columns["weights"]
        return cls(columns)

    @property
    def weighed(self) -> bool:
        return len(self.columns["weights"]) > 0

    @property
    def weights(self) -> np.ndarray:
        """Of every token, whether or not it has one of its own."""
        return self.columns["weights"] if self.weighed else np.ones(len(self.columns["tokens"]), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, place: int) -> Document:
        here = slice(*self._starts[place : place + 2])
        tokens, targets, weights = (self.columns[name][here] for name in PER_TOKEN)
        ends = self.columns["ends"][slice(*self._end_starts[place : place + 2])]
        row = int(self.columns["rows"][place])
        weighed = self.weighed and bool((weights != 1).any())  # of a document without weights all are 1
        return Document(tokens, targets, row, tuple(ends.tolist()), weights if weighed else None)


def _weights(document: Document) -> np.ndarray:
    return np.ones(len(document), dtype=np.float32) if document.weights is None else document.weights


class EndToEnd(Kept):
    """The documents of several parts, one part after another."""

    def __init__(self, parts: Sequence[Sequence[Document]]) -> None:
        self.parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, place: int) -> Document:
        part = bisect_right(self._starts, place) - 1
        return self.parts[part][place - self._starts[part]]


def end_to_end(parts: Sequence[Sequence[Document]]) -> Sequence[Document]:
    return parts[0] if len(parts) == 1 else EndToEnd(parts)


def lengths(documents: Sequence[Document]) -> np.ndarray:
    """Tokens of each document: int64 [N]."""
    match documents:
        case Documents():
            return documents.lengths
        case EndToEnd():
            return np.concatenate([lengths(part) for part in documents.parts])
    return np.array([len(d) for d in documents], dtype=np.int64)


# On disk.


def stored(folder: Path) -> tuple[Documents, dict[str, Any]] | None:
    """The documents in ``folder`` and their report; None unless every byte is there as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
        if set(files) != {*COLUMNS, REPORT} or any(_seal(folder / name) != files[name] for name in files):
            return None
        with suppress(OSError):  # a cache that may only be read
            (folder / MANIFEST).touch()
        return _mapped(folder), json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError, TypeError):
        return None


def _mapped(folder: Path) -> Documents:
    columns = {}
    for name, dtype in COLUMNS.items():
        file = folder / name
        mapped = name in PER_TOKEN and file.stat().st_size > 0
        columns[name] = np.memmap(file, dtype, "r") if mapped else np.fromfile(file, dtype)
    return Documents(columns)


def _seal(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        return [file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


class Spool:
    """Takes documents up, and keeps them in memory until there are many.

    folder: what they are written to, beside which they are gathered; None keeps all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._waiting: list[Documents] = []
        self._tokens = 0
        self._scratch: Path | None = None
        self._weighed = False

    def add(self, documents: Documents) -> None:
        self._waiting.append(documents)
        self._tokens += len(documents.columns["tokens"])
        if self._folder and self._tokens > MEMORY:
            self._write(self._folder)

    def _write(self, folder: Path) -> None:
        if self._scratch is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._tidy(folder.parent)
            self._scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="."))
        some = Documents.joined(self._waiting)
        weighed = self._weighed or some.weighed
        if weighed and not self._weighed:  # the first that have weights: those before them count 1
            done = self._scratch / "tokens"
            ones = np.ones((done.stat().st_size if done.exists() else 0) // 4, dtype=np.float32)
            ones.tofile(self._scratch / "weights")
        self._weighed = weighed
        for name in COLUMNS:
            with (self._scratch / name).open("ab") as file:
                (some.weights if name == "weights" and weighed else some.columns[name]).tofile(file)
        self._waiting, self._tokens = [], 0

    @staticmethod
    def _tidy(cache: Path) -> None:
        for pattern, age in ((".*", _STALE), (f"*/{MANIFEST}", _UNUSED)):
            for found in cache.glob(pattern):
                if found.stat().st_mtime < time.time() - age:
                    shutil.rmtree(found.parent if found.name == MANIFEST else found, ignore_errors=True)

    def done(self) -> Documents:
        """All documents that were added."""
        if self._scratch is None or self._folder is None:
            return Documents.joined(self._waiting)
        if self._waiting:
            self._write(self._folder)
        return _mapped(self._scratch)

    def keep(self, documents: Documents, report: dict[str, Any]) -> Documents:
        """Make the files a store that ``stored`` finds; the documents, now of that."""
        if self._scratch is None or self._folder is None:
            return documents
        (self._scratch / REPORT).write_text(json.dumps(report), encoding="utf-8")
        files = {name: _seal(self._scratch / name) for name in (*COLUMNS, REPORT)}
        (self._scratch / MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        del documents  # no file is open while its folder is moved
        shutil.rmtree(self._folder, ignore_errors=True)  # one that was damaged
        try:
            self._scratch.rename(self._folder)
        except OSError:
            if not (found := stored(self._folder)):  # else another process was first
                raise
            return found[0]
        self._scratch = None
        return _mapped(self._folder)

    def lend(self, documents: Documents) -> Documents:
        """The documents, whose files vanish with them."""
        if self._scratch is not None:
            weakref.finalize(documents, shutil.rmtree, self._scratch, ignore_errors=True)
            self._scratch = None
        return documents

    def close(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def spooled(folder: Path | None) -> Iterator[Spool]:
    """A spool that leaves nothing behind but what was kept or lent. Raises UserError for a disk that takes no more."""
    spool = Spool(folder)
    try:
        yield spool
    except OSError as error:
        raise UserError(
            f"tokenised documents cannot be kept in {folder.parent if folder else 'memory'} "
            f"({error.strerror or error}); free some space there, or name another folder in TRUETUNE_CACHE"
        ) from error
    finally:
        spool.close()
