"""Rows to documents, with an account of every token; and rows to parts that share no row.

The account is a conservation law: the targets that the rows held are those of the documents plus those that
truncation cut. A run is refused when truncation would cut more than a stated share of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from truetune.data import formats
from truetune.data.batch import Document
from truetune.data.chat import Rendered, Renderer, require_fit
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


def tokenize(
    rows: Rows, form: str, renderer: Renderer, cut_limit: float, weight: str | None = "weight"
) -> tuple[list[Document], DataReport]:
    """The documents of the rows, in their order. ``form`` is a key of ``FORMATS`` or "auto"; ``weight`` a column.

    Raises UserError, naming the source and the row, for a row that is not of the format; if truncation
    cuts more than ``cut_limit`` (a share) of the targets; if no row has anything to learn.
    """
    if form == "auto":
        form = formats.detect(rows.rows[0])
    try:
        examples = [formats.read(form, row, i, weight) for i, row in zip(rows.numbers, rows.rows, strict=True)]
        rendered = [renderer.documents(example, i) for i, example in zip(rows.numbers, examples, strict=True)]
    except UserError as fault:
        raise UserError(f"{rows.name}: {fault}") from fault
    if renderer.too_long == "error":
        require_fit(rows.name, rows.numbers, rendered, renderer.max_length)
    elif renderer.too_long == "truncate":
        _check_cut(rows, rendered, renderer.max_length, cut_limit)
    documents = [document for r in rendered for document in r.documents]
    dropped = Counter(r.dropped for r in rendered if r.dropped is not None)
    if not documents:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
        raise UserError(f"no row of {rows.name} has anything to learn ({reasons}); give other data")
    lengths = np.array([len(d) for d in documents])
    report = DataReport(
        source=rows.name,
        format=form,
        digest=rows.digest,
        template=renderer.template_digest if any(map(renderer.as_chat, examples)) else None,
        rows=len(rows),
        documents=len(documents),
        tokens=int(lengths.sum()),
        targets=sum(d.target_count for d in documents),
        truncated=sum(r.length > renderer.max_length for r in rendered),
        targets_cut=sum(len(r.cut) for r in rendered),
        dropped=dict(dropped),
        notes=dict(Counter(note for r in rendered for note in sorted(r.notes))),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        tokens_by_role=_total(r.tokens_by_role for r in rendered),
        targets_by_role=_total(r.targets_by_role for r in rendered),
        empty=sum(
            not answer.strip()
            for example, r in zip(examples, rendered, strict=True)
            if r.documents
            for answer in formats.answers(renderer.chosen(example))
        ),
        document_digest=_digest(documents),
    )
    return documents, report


def _digest(documents: Iterable[Document]) -> str:
    """Of what is trained: a template that prints the date, or another tokenizer, changes it though no row did."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{len(document)}:".encode() + document.tokens.tobytes() + document.targets.tobytes())
        if document.weights is not None:
            digest.update(document.weights.tobytes())
    return digest.hexdigest()


def _total(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _check_cut(rows: Rows, rendered: list[Rendered], max_length: int, cut_limit: float) -> None:
    """Raises UserError if truncation cuts too much, with the least max_length that would not."""
    cut = np.sort(np.concatenate([r.cut for r in rendered]))[::-1]
    held = len(cut) + sum(d.target_count for r in rendered for d in r.documents)
    if len(cut) <= cut_limit * held:
        return
    enough = int(cut[int(cut_limit * held)]) + 1
    hit = sum(len(r.cut) > 0 for r in rendered)
    raise UserError(
        f"max_length {max_length} would cut {len(cut) / held:.1%} of the target tokens of {rows.name}, in "
        f"{hit} of {len(rows)} rows, where cut_limit allows {cut_limit:.1%}; set max_length to {enough} "
        "or raise cut_limit"
    )


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


def less(train: Rows, evaluation: Rows) -> Rows:
    """The training rows that are not held out as well; how many are left out is said in their name.

    A loss on rows that were trained on says nothing. Raises UserError if no row is left.
    """
    held = {canonical(row) for row in evaluation.rows}
    kept = [i for i, row in enumerate(train.rows) if canonical(row) not in held]
    shared = len(train) - len(kept)
    if not kept:
        raise UserError(
            f"every row of {train.name} is also held out ({evaluation.name}); name another evaluation.source or "
            "evaluation.split, or leave both out"
        )
    return train.at(kept, f"{train.name} less {shared} that are held out") if shared else train


def first(rows: Rows, n: int) -> Rows:
    """The first ``n`` rows, or all."""
    return rows if n >= len(rows) else rows.at(range(n), held_out_split=rows.held_out_split)


def draw(rows: Rows, n: int, seed: int) -> Rows:
    """``n`` rows drawn by the seed without replacement, in the source's order; or all."""
    if n >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda i: (_rank(rows.rows[i], seed), i))
    return rows.at(sorted(order[:n]), held_out_split=rows.held_out_split)


def _rank(row: Row, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + canonical(row)).digest()
