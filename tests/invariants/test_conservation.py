"""Over a whole run no token and no target is lost, doubled or invented, between the rows and the gradient."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import chats, facts, invoke, keep_jobs, keys, records, write_rows
from tiny import random_documents

from truetune import spelling
from truetune.assembly import Job, assemble
from truetune.data.batch import IGNORE, Batch, Document
from truetune.data.packing import best_fit_decreasing
from truetune.data.stream import Stream

WHOLE = ("data.max_length=256", "train.tokens_per_micro_batch=256")
LONG = ("data.max_length=64", "data.cut_limit=1.0")
ROWS = [
    {
        "messages": [
            *row["messages"],
            {"role": "user", "content": "Sure? " * (i % 9)},
            {"role": "assistant", "content": "y" * i},
        ]
    }
    for i, row in enumerate(chats(45), start=1)
]


def job_of(model: Path, folder: Path, *more: str) -> Job:
    """A job of one epoch over long and short conversations of several turns, some of them truncated."""
    data = write_rows(folder / "data.jsonl", ROWS)
    return assemble(spelling.read(None, keys(model, data, folder / "out", "train.steps=none", *more)))


def contents(batch: Batch) -> list[tuple[bytes, bytes]]:
    """Of every document of the batch its tokens, and its labels put back to the tokens that they name."""
    found = []
    for tokens, labels in zip(batch.tokens.split(batch.lengths), batch.labels.split(batch.lengths), strict=True):
        assert labels[-1] == IGNORE  # nothing follows the last token, least of all the next document's first
        named = torch.cat([torch.tensor([IGNORE]), labels[:-1]])
        assert torch.equal(named[named != IGNORE], tokens[named != IGNORE])
        found.append((tokens.numpy().tobytes(), (named != IGNORE).numpy().tobytes()))
    return found


def contents_of(document: Document) -> tuple[bytes, bytes]:
    assert not document.targets[0]
    return document.tokens.astype(np.int64).tobytes(), document.targets.tobytes()


@pytest.mark.parametrize("more", [WHOLE, LONG, (*WHOLE, "train.tokens_per_step=1")])
def test_an_epoch_holds_every_document_once_whole(more: tuple[str, ...], my_model: Path, tmp_path: Path) -> None:
    job = job_of(my_model, tmp_path, *more)
    trainer, report = job.trainer, job.train.report
    batches = [batch for step in range(len(trainer.stream)) for batch in trainer.batches(step)]
    assert Counter(c for b in batches for c in contents(b)) == Counter(map(contents_of, trainer.documents))
    capacity = job.recipe.train.tokens_per_micro_batch
    assert all(len(b.tokens) == sum(b.lengths) <= capacity for b in batches)
    assert all(b.positions.tolist() == [i for n in b.lengths for i in range(n)] for b in batches)
    assert sum(len(b.tokens) for b in batches) == report.tokens == trainer.stream.tokens
    labels = sum(int((b.labels != IGNORE).sum()) for b in batches)
    assert labels == sum(trainer.objective.count(b) for b in batches)
    assert labels == report.targets == sum(d.target_count for d in trainer.documents)
    assert report.documents + sum(report.dropped.values()) == report.rows
    assert (report.targets_cut > 0) == (more == LONG)


def test_every_row_is_trained_on_or_held_out_or_said_to_be_dropped(my_model: Path, tmp_path: Path) -> None:
    job = job_of(my_model, tmp_path, *LONG, "evaluation.rows=1000")
    for part in (job.train, job.evaluation):
        assert len({d.row for d in part.documents}) == part.report.documents == len(part.documents)
        used = part.used(range(len(part.documents)))
        assert all(ROWS[d.row] == row for d, row in zip(part.documents, used, strict=True))
    rows = {d.row for part in (job.train, job.evaluation) for d in part.documents}
    dropped = sum(sum(part.report.dropped.values()) for part in (job.train, job.evaluation))
    assert len(rows) + dropped == len(ROWS)
    assert sum(part.report.documents for part in (job.train, job.evaluation)) == len(rows)


def test_what_the_objective_saw_in_a_real_run_is_what_the_rows_held(
    my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def counting(job: Job) -> None:
        real = job.trainer.objective

        class Counting:
            count, router = staticmethod(real.count), real.router
            exact, filtered = real.exact, real.filtered

            def __call__(self, model, batch):
                terms = real(model, batch)
                if model.training:  # evaluation and preflight are made in evaluation mode
                    seen.append((len(batch.tokens), len(terms.losses)))
                return terms

        job.trainer.objective = Counting()  # type: ignore[assignment]

    jobs = keep_jobs(monkeypatch, counting)
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    arguments = keys(my_model, data, tmp_path / "out", "train.steps=none", "train.epochs=2", "output.merged=false")
    assert invoke("train", *arguments).exit_code == 0
    report, result = jobs[0].train.report, facts(tmp_path / "out")["result"]
    assert [sum(part) for part in zip(*seen, strict=True)] == [2 * report.tokens, 2 * report.targets]
    assert (result["tokens"], result["targets"]) == (2 * report.tokens, 2 * report.targets)
    steps = [r for r in records(tmp_path / "out") if r["kind"] == "step"]
    assert sum(s["documents"] for s in steps) == 2 * report.documents
    assert sum(s["micro_batches"] for s in steps) == len(seen)


@pytest.mark.parametrize("seed", range(5))
def test_epochs_follow_each_other_without_a_seam(seed: int) -> None:
    """Steps cross the border between epochs; each epoch still holds every document once, in another order."""
    documents = random_documents(23, seed)
    stream = Stream([len(d) for d in documents], 130, 64, seed, epochs=4.0)
    order = [i for step in range(len(stream)) for i in stream.step(step)]
    epochs = [order[i : i + 23] for i in range(0, 4 * 23, 23)]
    assert len(order) == 4 * 23 and all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    for step in range(len(stream)):
        assert sorted(i for pack in stream.micro_batches(step) for i in pack) == sorted(stream.step(step))


def test_evaluation_counts_every_held_out_target(my_model: Path, tmp_path: Path) -> None:
    job = job_of(my_model, tmp_path, "evaluation.rows=1000")
    documents, trainer = job.evaluation.documents, job.trainer
    assert trainer.evaluator
    packs = best_fit_decreasing([len(d) for d in documents], job.recipe.train.tokens_per_micro_batch)
    assert sorted(i for pack in packs for i in pack) == list(range(len(documents)))
    found = trainer.evaluator(trainer.model, 0)
    assert (found.tokens, found.targets) == (sum(map(len, documents)), sum(d.target_count for d in documents))
