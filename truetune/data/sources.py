"""Where rows come from: built-in data, a file, a folder of files, a ``datasets`` folder, or the Hugging Face hub.

Whatever the source, the result is the same: a sequence of dicts with the digest of its content, so that two runs can
be known to have seen the same rows. Local data never touches the network. How files are read is in
``truetune.data.files``. Left out: streams, which have no order to come back to.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from truetune.data import files, python_docs
from truetune.data.files import Joined, Picked, Row, Stored, Table, Texts
from truetune.errors import UserError

if TYPE_CHECKING:
    import datasets

HELD_OUT_SPLITS = ("validation", "test")
"""Names of a split that is held out by convention, the preferred one first."""

SPLIT_OF = {
    word: split
    for split, words in {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }.items()
    for word in words
}
"""Words in the path of a file of rows that tell its split; without one it is "train"."""

NO_TEXTS = re.compile(r"(readme|license|licence|notice|changelog)\b", re.IGNORECASE)
"""Files of text that tell of a folder and are no rows of it, where it has others."""


@dataclass(frozen=True)
class Rows:
    """Rows of one split.

    rows:           in memory (a list), or read when they are asked for (``files.Stored``).
    numbers:        of each row in its source, from 0: what faults and reports call it by.
    held_out_split: the source's own held-out split, other than this one, if it has any.
    source:         what the rows were called before some were left out: that by which their numbers hold.
    """

    rows: Sequence[Row]
    name: str
    numbers: Sequence[int] | np.ndarray
    held_out_split: str | None = None
    source: str = ""

    @classmethod
    def of(cls, rows: Iterable[Row], name: str, held_out_split: str | None = None) -> Rows:
        kept = rows if isinstance(rows, Stored) else list(rows)
        return cls(kept, name, range(len(kept)), held_out_split, source=name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows in their order, whatever the file format that they came in."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(canonical(row) + b"\n")
        return digest.hexdigest()

    def at(self, places: Iterable[int], name: str | None = None, held_out_split: str | None = None) -> Rows:
        """The rows at ``places``, which keep their numbers."""
        places = list(places)
        rows = Picked(self.rows, places) if isinstance(self.rows, Stored) else [self.rows[i] for i in places]
        numbers = np.asarray(self.numbers)[places]
        return Rows(rows, name or self.name, numbers, held_out_split, self.source)

    def __len__(self) -> int:
        return len(self.rows)


def canonical(row: Row) -> bytes:
    """The row as JSON with sorted keys: equal for equal rows, wherever they came from."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def load(source: str, split: str = "train") -> Rows:
    """All rows of one split of a source.

    ``source`` is "python-docs", a file (``files.TABLES``, ``files.TEXTS``), a folder that ``datasets`` wrote, a folder
    of files, or a hub id (``owner/name``, or ``owner/name:config``). Raises UserError if it is none of them, if it
    cannot be read, or if it has no such split or no rows.
    """
    loaded = SOURCES[kind(source)](source, split)
    if not len(loaded):
        raise UserError(f"{loaded.name} has no rows; give a source or a split that has some")
    return loaded


def distinct(named: Sequence[tuple[str, str]]) -> list[str]:
    """A short name for each of several (source, split), all different; the same for a path and where it leads."""
    parts = [Path(source).expanduser().resolve().parts if _is_path(source) else (source,) for source, _ in named]
    names = []
    for mine, (_, split) in zip(parts, named, strict=True):
        others = [other for other in parts if other != mine]
        length = next(n for n in range(1, len(mine) + 1) if not any(other[-n:] == mine[-n:] for other in others))
        name = "/".join(mine[-length:])
        names.append(f"{name} ({split})" if parts.count(mine) > 1 else name)
    return names


def _is_path(source: str) -> bool:
    return source not in BUILT_IN and Path(source).expanduser().exists()


def kind(source: str) -> str:
    """Which key of ``SOURCES`` reads this source. Raises UserError if plainly none can."""
    path = Path(source).expanduser()
    if source in BUILT_IN:
        return "built-in"
    if path.is_dir():
        return "folder"
    if path.is_file() and path.suffix in KNOWN:
        return "file"
    if path.is_file():
        packed = path.suffix in (".gz", ".zip", ".zst", ".bz2", ".xz")
        advice = "unpack it" if packed else "convert it, for example to .jsonl, with one JSON object on each line"
        raise UserError(f"{source} is no file of rows ({', '.join(KNOWN)}); {advice}")
    like_built_in = "/" not in source and difflib.get_close_matches(source, BUILT_IN, cutoff=0.7)
    if not _HUB_ID.fullmatch(source) or path.suffix in KNOWN or like_built_in:
        raise UserError(f"there is no data at {source!r}{_advice(source)}")
    return "hub"


def _built_in(source: str, split: str) -> Rows:
    splits, read = BUILT_IN[source]
    held_out = _check_split(source, split, splits)
    return Rows.of(read(split), f"{source} ({split})", held_out)


def _file(source: str, split: str) -> Rows:
    """A file of rows (.jsonl, .json, .csv, .parquet), or of text (.txt, .md), which is one row."""
    _check_split(source, split, ("train",))
    return Rows.of(_rows_of([Path(source).expanduser()]), source)


def _rows_of(paths: Sequence[Path]) -> Sequence[Row]:
    """The rows of files, in the order of the files."""
    if all(path.suffix in files.TEXTS for path in paths):
        return Texts(paths)
    parts = [files.TABLES[path.suffix](path) for path in paths]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _folder(source: str, split: str) -> Rows:
    """A folder that datasets' save_to_disk wrote, or one with files of rows, or with texts, one row each."""
    path = Path(source).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(source, path, split)
    found = _files_of(path)
    if not found:
        raise UserError(
            f"the folder {source} holds no data that can be read; give a folder written by datasets' save_to_disk, or "
            f"one with files of rows ({', '.join(KNOWN)})"
        )
    splits: dict[str, list[Path]] = {}
    for file in found:
        text = file.suffix in files.TEXTS  # a tree of texts may well have a folder that is called "test"
        splits.setdefault("train" if text else _split_of(file.relative_to(path)), []).append(file)
    held_out = _check_split(source, split, splits)
    return Rows.of(_rows_of(splits[split]), f"{source} ({split})", held_out)


def _files_of(folder: Path) -> list[Path]:
    """The files of rows in a folder and those within it, by their path; hidden ones are left out.

    Raises UserError if some are tables and some are texts.
    """
    inside = sorted((p.relative_to(folder) for p in folder.rglob("*")), key=lambda p: p.as_posix())
    known = [p for p in inside if p.suffix in KNOWN and not any(part.startswith(".") for part in p.parts)]
    known = [p for p in known if (folder / p).is_file() and p.name not in _ABOUT]
    tables = [p for p in known if p.suffix in files.TABLES]
    texts = [p for p in known if p.suffix in files.TEXTS]
    if tables:
        texts = [p for p in texts if not NO_TEXTS.match(p.name)]
    if tables and texts:
        raise UserError(
            f"the folder {folder} holds rows ({tables[0]}) and texts ({texts[0]}); move one kind to another folder, or "
            "name both under data.sources"
        )
    return [folder / p for p in tables or texts]


def _split_of(path: Path) -> str:
    """The split that the path of a file names, its last word first."""
    words = re.findall("[a-z]+", path.with_suffix("").as_posix().lower())
    return next((SPLIT_OF[word] for word in reversed(words) if word in SPLIT_OF), "train")


def _saved(source: str, path: Path, split: str) -> Rows:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as fault:
        raise UserError(
            f"the folder {source} holds no data that can be read ({_first_line(fault)}); give a folder "
            "written by datasets' save_to_disk, or one with files of rows"
        ) from fault
    splits = {"train": found} if isinstance(found, datasets.Dataset) else found
    return _from_splits(splits, source, split)


def _hub(source: str, split: str) -> Rows:
    """A data set on the Hugging Face hub: owner/name, or owner/name:config."""
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as fault:
        raise UserError(
            f"{source!r} is no local data and could not be had from the hub ({_first_line(fault)}){_advice(source)}"
        ) from fault
    return _from_splits(found, source, split)


def _from_splits(splits: Mapping[str, datasets.Dataset], source: str, split: str) -> Rows:
    held_out = _check_split(source, split, list(splits))
    chosen = splits[split]
    return Rows.of(Table(chosen), f"{source} ({split})", held_out)


def _check_split(source: str, split: str, splits: Iterable[str]) -> str | None:
    """The held-out split among ``splits``. Raises UserError if ``split`` is not one of them."""
    splits = list(splits)
    if split not in splits:
        raise UserError(f"{source} has no split {split!r}; choose among: {', '.join(splits)}")
    return next((s for s in HELD_OUT_SPLITS if s in splits and s != split), None)


def _advice(source: str) -> str:
    """The end of a sentence about a source that was not found: what the user may have meant."""
    folder = Path(source).expanduser().parent
    beside = folder.iterdir() if folder.is_dir() else ()
    local = [str(Path(source).parent / p.name) for p in beside if p.is_dir() or p.suffix in KNOWN]
    meant = difflib.get_close_matches(source, [*BUILT_IN, *local], n=1, cutoff=0.6)
    guess = f"did you mean {meant[0]!r}? " if meant else ""
    return f"; {guess}give python-docs, a file ({', '.join(KNOWN)}), a folder, or a hub id that can be reached"


def _first_line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(fault).__name__


KNOWN = (*files.TABLES, *files.TEXTS)
"""Ends of the names of files that are read."""
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # what datasets writes beside rows
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")

BUILT_IN: dict[str, tuple[tuple[str, ...], Callable[[str], list[Row]]]] = {
    "python-docs": (python_docs.SPLITS, python_docs.rows),
}

SOURCES: dict[str, Callable[[str, str], Rows]] = {
    "built-in": _built_in,
    "file": _file,
    "folder": _folder,
    "hub": _hub,
}
