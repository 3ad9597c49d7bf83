"""Rows to documents, with an account of every token; and rows to parts that share no row.

The account is a conservation law: the targets that the rows held are those of the documents plus those that
truncation cut. A run is refused when truncation would cut more than a stated share of them.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from truetune.data import formats
from truetune.data.batch import Document
from truetune.data.chat import Renderer
from truetune.data.documents import Documents, lengths, spooled, stored
from truetune.data.messages import place
from truetune.data.rendering import Account, Portion, Shape, identity, portions
from truetune.data.sources import Row, Rows, canonical
from truetune.errors import UserError


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the rows. Lengths are in tokens of the documents, after truncation.

    digest:      of the rows; template: of the chat template, None where bare text was rendered.
    truncated:   rows longer than max_length, dropped ones among them.
    targets_cut: targets lost to that, those of dropped rows among them. Every other target is in
                 ``targets``: the rows held ``targets + targets_cut``.
    dropped:     rows by the reason why they are no document.
    notes:       rows by what had to be done to render them, or what the template added.
    empty:       answers of the documents without a visible character, of which only the end is learned.
    document_digest: SHA-256 of the documents' tokens, targets and weights.
    """

    source: str
    format: str
    digest: str
    template: str | None
    rows: int
    documents: int
    tokens: int
    targets: int
    truncated: int
    targets_cut: int
    dropped: dict[str, int]
    notes: dict[str, int]
    shortest: int
    median: float
    mean: float
    longest: int
    tokens_by_role: dict[str, int]
    targets_by_role: dict[str, int]
    empty: int
    document_digest: str


DOCUMENTS = 2
"""Version of what makes documents of rows: raise it when the same rows would become others."""
CHANGING = ("strftime_now", "random", "lipsum")
"""Words in a chat template that may render the same row otherwise another day; others that hold them pay for it."""


def tokenize(
    rows: Rows,
    form: str,
    renderer: Renderer,
    cut_limit: float,
    weight: str | None = "weight",
    cache: Path | None = None,
) -> tuple[Documents, DataReport]:
    """The documents of the rows, in their order. ``form`` is a key of ``FORMATS`` or "auto"; ``weight`` a column.

    cache: a folder where many documents are kept, and found again for the same rows and renderer; without it they are
    all in memory.
    Raises UserError, naming the source and the row, for a row that is not of the format; if truncation
    cuts more than ``cut_limit`` (a share) of the targets; if no row has anything to learn.
    """
    if form == "auto":
        form = formats.detect(rows.rows[0])
    shape = Shape(form, weight)
    key = _key(rows, shape, renderer, cut_limit)
    if cache and (found := stored(cache / key)):
        return found[0], DataReport(**found[1] | {"source": rows.name})
    account, digest = Account(), hashlib.sha256()
    with spooled(cache / key if cache else None) as spool:
        with closing(rendered(rows, shape, renderer)) as made:
            for documents, part, _ in made:
                account.add(part)
                fingerprint(documents, digest)
                spool.add(documents)
        documents = spool.done()
        targets = int(np.count_nonzero(documents.columns["targets"]))
        require_sound(rows, account, targets, renderer, cut_limit)
        report = report_of(rows, form, renderer, account, documents.lengths, targets, digest.hexdigest())
        if any(word in renderer.template for word in CHANGING):
            return spool.lend(documents), report
        return spool.keep(documents, asdict(report)), report


def rendered(rows: Rows, shape: Shape, renderer: Renderer) -> Generator[Portion, None, None]:
    """The rows' portions in their order. Raises UserError, naming the source and the row, for a row that is refused."""
    try:
        yield from portions(zip(map(int, rows.numbers), rows.rows, strict=True), len(rows), shape, renderer)
    except UserError as fault:
        raise UserError(f"{rows.source}: {fault}") from fault


def _key(rows: Rows, shape: Shape, renderer: Renderer, cut_limit: float) -> str:
    """SHA-256 of all that the documents and their report depend on, but for the rows' name."""
    numbers = hashlib.sha256(np.asarray(rows.numbers, dtype=np.int64).tobytes()).hexdigest()
    facts = {
        "version": DOCUMENTS,
        "rows": rows.digest,
        "numbers": numbers,
        "shape": shape,
        "cut_limit": cut_limit,
        "renderer": identity(renderer),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def report_of(
    rows: Rows, form: str, renderer: Renderer, account: Account, found: np.ndarray, targets: int, digest: str
) -> DataReport:
    """``found``: the documents' lengths; ``targets``: of all of them; ``digest``: by ``fingerprint``."""
    some = found if len(found) else np.zeros(1, dtype=np.int64)  # none is refused, and told of before
    return DataReport(
        source=rows.name,
        format=form,
        digest=rows.digest,
        template=renderer.template_digest if account.chat else None,
        rows=len(rows),
        documents=len(found),
        tokens=int(found.sum()),
        targets=targets,
        truncated=account.truncated,
        targets_cut=int(account.cut.sum()),
        dropped=dict(account.dropped),
        notes=dict(account.notes),
        shortest=int(some.min()),
        median=float(np.median(some)),
        mean=float(some.mean()),
        longest=int(some.max()),
        tokens_by_role=dict(account.tokens_by_role),
        targets_by_role=dict(account.targets_by_role),
        empty=account.empty,
        document_digest=digest,
    )


def require_sound(rows: Rows, account: Account, targets: int, renderer: Renderer, cut_limit: float) -> None:
    """Raises UserError if no target is left, if a row is too long where that is an error, or if truncation cuts too
    much, with the least max_length that would not."""
    max_length = renderer.max_length
    if renderer.too_long == "error" and account.first_too_long is not None:
        raise UserError(
            f"{rows.source}: {place(account.first_too_long)} is one of {account.truncated} with more than "
            f"{max_length} tokens, which data.too_long calls an error; set data.max_length to {account.longest}, or "
            "data.too_long to truncate, drop or split"
        )
    cut = int(account.cut.sum())
    held = cut + targets
    if renderer.too_long == "truncate" and cut > cut_limit * held:
        from_here = account.cut[::-1].cumsum()[::-1]  # targets that are cut from this position on
        enough = int(np.flatnonzero(from_here > int(cut_limit * held))[-1]) + 1
        raise UserError(
            f"data.max_length {max_length} would cut {cut / held:.1%} of the target tokens of {rows.name}, in "
            f"{account.cut_rows} of {len(rows)} rows, where data.cut_limit allows {cut_limit:.1%}; set "
            f"data.max_length to {enough} or raise data.cut_limit"
        )
    if not targets:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in account.dropped.items())
        raise UserError(f"no row of {rows.name} has anything to learn ({reasons}); give other data")


def together(reports: Sequence[DataReport], documents: Sequence[Sequence[Document]]) -> DataReport:
    """One account of several sources; of a single one its own."""
    if len(reports) == 1:
        return reports[0]
    joined: dict[str, Any] = {}
    for field in fields(DataReport):
        values = [getattr(report, field.name) for report in reports]
        if all(isinstance(value, dict) for value in values):
            joined[field.name] = _total(map(Counter, values))
        elif all(isinstance(value, int) for value in values):
            joined[field.name] = sum(values)
    found = np.concatenate([lengths(part) for part in documents])
    return DataReport(
        **joined
        | {
            "source": " + ".join(report.source for report in reports),
            "format": ", ".join(dict.fromkeys(report.format for report in reports)),
            "digest": _joint_digest(report.digest for report in reports),
            "template": next((report.template for report in reports if report.template), None),
            "shortest": int(found.min()),
            "median": float(np.median(found)),
            "mean": float(found.mean()),
            "longest": int(found.max()),
            "document_digest": _joint_digest(report.document_digest for report in reports),
        }
    )


def _joint_digest(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def fingerprint(documents: Documents, digest: Any) -> None:
    """Of what is trained: a template that prints the date, or another tokenizer, changes it though no row did."""
    for document in documents:
        digest.update(f"{len(document)}:".encode() + document.tokens.tobytes() + document.targets.tobytes())
        if document.weights is not None:
            digest.update(document.weights.tobytes())


def _total(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), each in the source's order; ``fraction`` of the rows is held out.

    Rows are chosen by a hash of their content, so equal rows are on the same side, and a row keeps its
    side when others are added, unless it is near the border. Raises UserError if the rows are all equal.
    """
    ranks = [_rank(row, seed) for row in rows.rows]
    distinct = sorted(set(ranks))
    if len(distinct) < 2:
        found = "has a single row" if len(rows) == 1 else "has only equal rows"
        raise UserError(f"{rows.name} {found}, so none can be held out; name another evaluation.source")
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    chosen = set(distinct[:count])
    kept = rows.at((i for i, rank in enumerate(ranks) if rank not in chosen), f"{rows.name} less held out")
    held = rows.at((i for i, rank in enumerate(ranks) if rank in chosen), f"{rows.name} held out")
    return kept, held


def less(train: Rows, evaluation: Sequence[Rows]) -> Rows:
    """The training rows that are not held out as well; how many are left out is said in their name.

    A loss on rows that were trained on says nothing. Raises UserError if no row is left.
    """
    if not evaluation:
        return train
    held = {canonical(row): rows.name for rows in evaluation for row in rows.rows}
    names = [held.get(canonical(row)) for row in train.rows]
    kept = [i for i, name in enumerate(names) if name is None]
    shared = len(train) - len(kept)
    if not kept:
        by = ", ".join(sorted({name for name in names if name is not None}))
        raise UserError(
            f"every row of {train.name} is also held out ({by}); name another evaluation.source or "
            "evaluation.split, or leave both out"
        )
    return train.at(kept, f"{train.name} less {shared} that are held out") if shared else train


def shares(wanted: int, sizes: Sequence[int]) -> list[int]:
    """How many of ``wanted`` rows each of several sources gives: as many as the others, or all that it has."""
    given = [0] * len(sizes)
    left = min(wanted, sum(sizes))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for position, i in enumerate(order):  # what the smallest lack, the others give; what is odd, the largest
        given[i] = min(sizes[i], left // (len(sizes) - position))
        left -= given[i]
    return given


def first(rows: Rows, n: int) -> Rows:
    """The first ``n`` rows, or all."""
    return rows if n >= len(rows) else rows.at(range(n), held_out_split=rows.held_out_split)


def draw(rows: Rows, n: int, seed: int) -> Rows:
    """``n`` rows drawn by the seed without replacement, in the source's order; or all."""
    if n >= len(rows):
        return rows
    ranked = heapq.nsmallest(n, ((_rank(row, seed), i) for i, row in enumerate(rows.rows)))
    return rows.at(sorted(i for _, i in ranked), held_out_split=rows.held_out_split)


def _rank(row: Row, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + canonical(row)).digest()
