"""Recipe -> rows to train on and rows held out, source by source; and what becomes of them: documents, in an order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from truetune.cache import cache_folder
from truetune.data import dataset, files, sources
from truetune.data.batch import Document
from truetune.data.chat import Renderer
from truetune.data.dataset import DataReport
from truetune.data.documents import end_to_end, lengths
from truetune.data.sources import Rows
from truetune.data.stream import Stream
from truetune.errors import UserError
from truetune.recipe import Recipe, Source

SOURCE_KEY = "truetune.source"
"""Where a row in ``data/`` of a run tells its source: no column of anybody's."""


def sources_of(recipe: Recipe) -> tuple[Source, ...]:
    """The sources of the training rows, of which the recipe may name one in its own keys."""
    data = recipe.data
    if data.source is None:
        return data.sources
    return (Source(source=data.source, split=data.split, format=data.format, rows=data.rows),)


@dataclass(frozen=True)
class Choice:
    """Rows of one source on one side, with the format that they are read in."""

    name: str
    rows: Rows
    format: str


def choose_rows(recipe: Recipe) -> tuple[list[Choice], list[Choice]]:
    """Rows to train on and rows held out, by source; no row is on both sides, of whatever sources."""
    held_out, seed, chosen = recipe.evaluation, recipe.train.seed, sources_of(recipe)
    train = [sources.load(part.source, part.split) for part in chosen]
    names = sources.distinct([(part.source, part.split) for part in chosen])
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"data.sources has {twice} twice, in two spellings; name it once, and raise its weight")
    shapes = [part.format for part in chosen]
    apart = set()  # sources that are held out of themselves, and so share no row with what is
    if held_out.source:
        other = sources.load(held_out.source, held_out.split or "train")
        if not held_out.split and other.held_out_split:
            other = sources.load(held_out.source, other.held_out_split)
        evaluation, aside = [other], [Choice(held_out.source, other, shapes[0] if len(chosen) == 1 else "auto")]
    else:
        evaluation = []
        for i, part in enumerate(chosen):
            if split := held_out.split or train[i].held_out_split:
                evaluation.append(sources.load(part.source, split))
            else:
                train[i], rest = dataset.hold_out(train[i], held_out.fraction, seed)
                apart.add(names[i])
                evaluation.append(rest)
        aside = [Choice(*parts) for parts in zip(names, evaluation, shapes, strict=True)]
    counts = dataset.shares(held_out.rows, [len(choice.rows) for choice in aside])
    aside = [replace(c, rows=dataset.draw(c.rows, n, seed)) for c, n in zip(aside, counts, strict=True) if n]
    for i, name in enumerate(names):
        train[i] = dataset.less(train[i], [c.rows for c in aside if c.name not in apart & {name}])
    train = [dataset.first(rows, part.rows or len(rows)) for rows, part in zip(train, chosen, strict=True)]
    column = recipe.data.weight_column
    if "weight_column" in recipe.data.model_fields_set and column and not any(column in r.rows[0] for r in train):
        named = ", ".join(rows.name for rows in train)
        raise UserError(f"{named} has no column {column}; name the column of the weights in data.weight_column")
    return [Choice(*parts) for parts in zip(names, train, shapes, strict=True)], aside


def build_renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> Renderer:
    data = recipe.data
    return Renderer(tokenizer, stop_ids, data.max_length, data.targets, data.too_long)


@dataclass(frozen=True)
class Part:
    """Rows of one source on one side of the data, what became of them, and the account of it."""

    name: str
    rows: Rows
    documents: Sequence[Document]
    report: DataReport

    def used(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The rows of these numbers, in their order."""
        places = np.searchsorted(self.rows.numbers, list(numbers))
        return list(files.read(self.rows.rows, map(int, places)))


@dataclass(frozen=True)
class Side:
    """What is trained on, or what is held out: the parts of all sources, end to end."""

    parts: tuple[Part, ...]

    @cached_property
    def documents(self) -> Sequence[Document]:
        return end_to_end([part.documents for part in self.parts])

    @cached_property
    def report(self) -> DataReport:
        return dataset.together([part.report for part in self.parts], [part.documents for part in self.parts])

    @property
    def notes(self) -> list[str]:
        """What had to be done to render rows, or what the template added, as sentences."""
        return [
            f"{part.name}: {count:,} of {part.report.rows:,} rows: {note}"
            for part in self.parts
            for note, count in part.report.notes.items()
        ]

    @property
    def lengths(self) -> list[np.ndarray]:
        """Tokens of the documents of each part."""
        return [lengths(part.documents) for part in self.parts]

    @property
    def by_source(self) -> dict[str, range]:
        """Places among the documents of each part, by its name."""
        ends = accumulate(len(part.documents) for part in self.parts)
        return {part.name: range(end - len(part.documents), end) for part, end in zip(self.parts, ends, strict=True)}

    def used(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The rows that the documents at ``places`` were made of, source by source; each as often as its most frequent
        document, since a row may have several. Of several sources, each row tells its own."""
        rows = []
        for part, mine in zip(self.parts, self.by_source.values(), strict=True):
            times: dict[int, int] = {}
            for place, n in Counter(place for place in places if place in mine).items():
                number = part.documents[place - mine.start].row
                times[number] = max(times.get(number, 0), n)
            said = {SOURCE_KEY: part.name} if len(self.parts) > 1 else {}
            rows += [row | said for row in part.used(number for number, n in times.items() for _ in range(n))]
        return rows


def tokenized(recipe: Recipe, chosen: Sequence[Choice], renderer: Renderer) -> Side:
    parts, data, cache = [], recipe.data, cache_folder() / "documents"
    for choice in chosen:
        documents, report = dataset.tokenize(
            choice.rows, choice.format, renderer, data.cut_limit, data.weight_column, cache
        )
        parts.append(Part(choice.name, choice.rows, documents, report))
    return Side(tuple(parts))


def build_stream(recipe: Recipe, by_source: Sequence[np.ndarray]) -> Stream:
    """The order of a run over documents of so many tokens each, source by source."""
    train = recipe.train
    weights = (source.weight for source in sources_of(recipe))
    return Stream(
        np.concatenate(by_source),
        train.tokens_per_step,
        train.tokens_per_micro_batch,
        train.seed,
        epochs=train.epochs,
        steps=train.steps,
        tokens=train.tokens,
        sources=[(len(found), weight) for found, weight in zip(by_source, weights, strict=True)],
    )
