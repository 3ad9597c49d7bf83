"""Where rows come from: built-in data, a JSONL file, a local ``datasets`` folder, or the Hugging Face hub.

Whatever the source, the result is the same: a list of dicts with the digest of its content, so that two
runs can be known to have seen the same rows. Local data never touches the network. All rows are held in
memory; streams are left out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.data import python_docs
from truetune.errors import UserError

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]

HELD_OUT_SPLITS = ("validation", "test")
"""Names of a split that is held out by convention, the preferred one first."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one split.

    digest:         SHA-256 of the rows in their order, whatever the file format that they came in.
    numbers:        of each row in its source, from 0: what faults and reports call it by.
    held_out_split: the source's own held-out split, other than this one, if it has any.
    """

    rows: list[Row]
    name: str
    digest: str
    numbers: Sequence[int]
    held_out_split: str | None = None

    @classmethod
    def of(
        cls,
        rows: Iterable[Row],
        name: str,
        held_out_split: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Rows:
        kept = list(rows)
        digest = hashlib.sha256()
        for row in kept:
            digest.update(canonical(row) + b"\n")
        numbers = range(len(kept)) if numbers is None else numbers
        return cls(kept, name, digest.hexdigest(), numbers, held_out_split)

    def at(self, places: Iterable[int], name: str | None = None, held_out_split: str | None = None) -> Rows:
        """The rows at ``places``, which keep their numbers."""
        places = list(places)
        rows, numbers = [self.rows[i] for i in places], [self.numbers[i] for i in places]
        return Rows.of(rows, name or self.name, held_out_split, numbers)

    def __len__(self) -> int:
        return len(self.rows)


def canonical(row: Row) -> bytes:
    """The row as JSON with sorted keys: equal for equal rows, wherever they came from."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def load(source: str, split: str = "train") -> Rows:
    """All rows of one split of a source.

    ``source`` is "python-docs", a .jsonl file, a folder that ``datasets`` wrote or can read, or a hub id
    (``owner/name``, or ``owner/name:config``). Raises UserError if it is none of them, if it cannot be
    read, or if it has no such split or no rows.
    """
    loaded = SOURCES[kind(source)](source, split)
    if not loaded.rows:
        raise UserError(f"{loaded.name} has no rows; give a source or a split that has some")
    return loaded


def kind(source: str) -> str:
    """Which key of ``SOURCES`` reads this source. Raises UserError if plainly none can."""
    path = Path(source).expanduser()
    if source in BUILT_IN:
        return "built-in"
    if path.is_dir():
        return "folder"
    if path.suffix == ".jsonl" and path.is_file():
        return "file"
    if path.is_file():
        raise UserError(
            f"{source} is not a .jsonl file; convert it, for example with "
            'datasets.load_dataset("csv", data_files=...)["train"].to_json("data.jsonl")'
        )
    like_built_in = "/" not in source and difflib.get_close_matches(source, BUILT_IN, cutoff=0.7)
    if not _HUB_ID.fullmatch(source) or path.suffix == ".jsonl" or like_built_in:
        raise UserError(f"there is no data at {source!r}{_advice(source)}")
    return "hub"


def _built_in(source: str, split: str) -> Rows:
    splits, read = BUILT_IN[source]
    held_out = _check_split(source, split, splits)
    return Rows.of(read(split), f"{source} ({split})", held_out)


def _file(source: str, split: str) -> Rows:
    """A path that ends in .jsonl: one JSON object a line."""
    _check_split(source, split, ("train",))
    read: list[Row] = []
    with Path(source).expanduser().open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if row := _json_object(line, f"{source}:{number}"):
                read.append(row)
    return Rows.of(read, source)


def _json_object(line: bytes, where: str) -> Row | None:
    """The object on one line; None if the line is blank."""
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text) if text else None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as fault:
        raise UserError(
            f"{where} is not JSON ({fault.msg} at column {fault.colno}); put exactly one JSON object on each line"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(f"{where} nests values or writes digits without end; remove this line") from None
    if text and (not isinstance(row, dict) or not row):
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise UserError(f"{where} is no JSON object with columns but {shown}; put one on each line")
    return row


def _folder(source: str, split: str) -> Rows:
    """A folder that datasets' save_to_disk wrote, or one with .jsonl, .csv or .parquet files."""
    import datasets

    path = Path(source).expanduser()
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    try:
        found = (datasets.load_from_disk if saved else datasets.load_dataset)(str(path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as fault:
        raise UserError(
            f"the folder {source} holds no data that can be read ({_first_line(fault)}); give a folder "
            "written by datasets' save_to_disk, or one with .jsonl, .csv or .parquet files"
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
    return Rows.of(chosen.to_list(), f"{source} ({split})", held_out)


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
    local = [str(Path(source).parent / p.name) for p in beside if p.is_dir() or p.suffix == ".jsonl"]
    meant = difflib.get_close_matches(source, [*BUILT_IN, *local], n=1, cutoff=0.6)
    guess = f"did you mean {meant[0]!r}? " if meant else ""
    return f"; {guess}give python-docs, a .jsonl file, a datasets folder, or a hub id that can be reached"


def _first_line(fault: Exception) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(fault).__name__


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
