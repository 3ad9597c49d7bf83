"""Rows -> what became of them: rendered as a run renders them, with a table of what each row is like.

Of a row there remain ``TRAITS.itemsize`` bytes and its documents' lengths; everything else is counted as it goes by.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from truetune.assembly import Extremes
from truetune.data import dataset, files, formats
from truetune.data.chat import Renderer
from truetune.data.dataset import DataReport
from truetune.data.documents import Documents
from truetune.data.formats import Example
from truetune.data.rendering import Account, Shape, added
from truetune.data.sources import Rows
from truetune.data.traits import TRAITS
from truetune.errors import UserError
from truetune.inspection.facts import Tally
from truetune.rows import Choice

_NONE = Extremes(0, 0, -1, 0)


@dataclass
class Walk:
    """What became of the rows of one source on one side; ``weight`` is the column of a row's weight.

    table: ``TRAITS`` [rows]; lengths: uint32 [documents].
    targets_at: targets of the documents by their position.
    ends: the tokens that end complete trained turns; endless: rows with such an end that is no trained stop token.
    begun: documents that begin with BOS.
    """

    name: str
    rows: Rows
    form: str
    weight: str | None
    account: Account = field(default_factory=Account)
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, TRAITS))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    targets_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ends: Counter[int] = field(default_factory=Counter)
    endless: Tally = field(default_factory=Tally)
    begun: int = 0
    extremes: Extremes = _NONE
    fingerprint: str = ""

    @property
    def targets(self) -> int:
        return int(self.targets_at.sum())

    def examples(self, places: Iterable[int]) -> Iterator[Example]:
        """The examples in the rows at places. Raises UserError, naming source and row, if one is not of the format."""
        places = list(places)
        for place, row in zip(places, files.read(self.rows.rows, places), strict=True):
            try:
                yield formats.read(self.form, row, int(self.rows.numbers[place]), self.weight)
            except UserError as fault:
                raise UserError(f"{self.rows.source}: {fault}") from fault

    def report(self, renderer: Renderer) -> DataReport:
        return dataset.report_of(
            self.rows, self.form, renderer, self.account, self.lengths.astype(np.int64), self.targets, self.fingerprint
        )

    def tally(self, which: np.ndarray) -> Tally:
        """The rows where ``which`` [rows] is true."""
        found = Tally()
        found.add([self.rows.numbers[place] for place in np.flatnonzero(which).tolist()])
        return found

    def learn(self, documents: Documents, renderer: Renderer) -> None:
        """Count what is in some more documents."""
        columns, sizes = documents.columns, documents.lengths
        if not len(sizes):
            return
        tokens, targets, rows = columns["tokens"], columns["targets"], columns["rows"]
        starts = np.cumsum(sizes) - sizes
        positions = np.arange(len(tokens)) - np.repeat(starts, sizes)
        self.targets_at = added(self.targets_at, np.bincount(positions[targets]))
        self.begun += int(np.count_nonzero(tokens[starts] == renderer.tokenizer.bos_token_id))
        ends = columns["ends"] + np.repeat(starts, columns["end_counts"])
        self.ends.update(tokens[ends].tolist())
        wrong = ~(targets[ends] & np.isin(tokens[ends], list(renderer.stop_ids)))
        self.endless.add(np.unique(np.repeat(rows, columns["end_counts"])[wrong]))
        longest, largest = int(sizes.argmax()), int(tokens.argmax())
        holder = int(np.searchsorted(starts, largest, side="right")) - 1
        if sizes[longest] > self.extremes.longest:
            found = {"longest": int(sizes[longest]), "longest_row": int(rows[longest])}
            self.extremes = self.extremes._replace(**found)
        if tokens[largest] > self.extremes.largest:
            found = {"largest": int(tokens[largest]), "largest_row": int(rows[holder])}
            self.extremes = self.extremes._replace(**found)


def walk(choice: Choice, renderer: Renderer, weight: str | None) -> Walk:
    """What becomes of all rows. Raises UserError for a row that is refused."""
    form = formats.detect(choice.rows.rows[0]) if choice.format == "auto" else choice.format
    found = Walk(choice.name, choice.rows, form, weight)
    digest, tables, lengths = hashlib.sha256(), [], []
    with closing(dataset.rendered(choice.rows, Shape(form, weight, traits=True), renderer)) as made:
        for documents, account, traits in made:
            assert traits is not None  # which the shape asks for
            found.account.add(account)
            found.learn(documents, renderer)
            dataset.fingerprint(documents, digest)
            tables.append(traits)
            lengths.append(documents.lengths.astype(np.uint32))
    found.table, found.lengths = np.concatenate(tables), np.concatenate(lengths)
    found.fingerprint = digest.hexdigest()
    return found
