"""Promises about the data: what came in goes out, and whatever was left out is told.

Everything is counted once more, from the source's rows (``recount``) to the labels of the batches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from truetune.checks.preflight import restored
from truetune.data.sources import canonical
from truetune.data.stream import Stream
from truetune.promises.ground import Ground, written
from truetune.rows import build_stream
from truetune.training.gradient import NonFinite
from truetune.training.integrity import fingerprints
from truetune.training.record import Verdict
from truetune.training.trainer import Trainer

BATCHES = 400
"""Steps whose micro-batches are laid out and counted; the order of the documents is followed over the whole run."""


def conservation(ground: Ground) -> Verdict:
    """Target tokens in = out, per source and role; no document twice in an epoch, none lost, none in both parts."""
    faults, told = [], []
    for side, part, count in ground.counted:
        report = part.report
        faults += _unequal(
            f"{side}, {part.name}",
            targets=(report.targets, count.kept),
            cut=(report.targets_cut, count.held - count.kept),
            documents=(report.documents, count.documents),
            tokens=(sum(report.tokens_by_role.values()), sum(map(len, part.documents))),
            roles=(sum(report.targets_by_role.values()), count.kept),
        )
        if count.kept == count.held and report.targets_by_role != dict(count.by_role):
            faults.append(
                f"{side}, {part.name}: targets by role are {report.targets_by_role}, counted {dict(count.by_role)}"
            )
        told.append(f"{report.source}: {count.held:,} targets = {report.targets:,} kept + {report.targets_cut:,} cut")
    held_out = {canonical(row) for part in ground.job.evaluation.parts for row in part.rows.rows}
    both = {key for part in ground.job.train.parts for row in part.rows.rows if (key := canonical(row)) in held_out}
    if both:
        faults.append(f"{len(both)} rows are both trained on and held out")
    planned = replace(ground.trainer, stream=build_stream(ground.asked, ground.job.train.lengths))
    faults += faults_of_order(lasting(planned.stream))
    steps, labels = _labels(planned, faults)
    told.append(f"{labels:,} labels in the batches of {steps} steps are their documents' targets")
    return Verdict("", not faults, "; ".join(faults or told), "rows are lost or doubled; please report it")


def _unequal(side: str, **pairs: tuple[int, int]) -> list[str]:
    return [f"{side}: {name} are {told:,}, counted {found:,}" for name, (told, found) in pairs.items() if told != found]


def lasting(stream: Stream) -> Stream:
    """The stream, going on to the end of its epoch and at least of the second: what a weight below 1 leaves out of one
    epoch is in the next."""
    return Stream(
        stream.lengths,
        stream.tokens_per_step,
        stream.tokens_per_micro_batch,
        stream.seed,
        epochs=max(2, math.ceil(stream.epochs)),
        sources=stream.sources,
    )


def faults_of_order(stream: Stream) -> list[str]:
    """Faults of the order of a run of whole epochs: each source comes as often as its weight says, and every document
    of it once before any comes twice."""
    order = np.array([i for t in range(len(stream)) for i in stream.step(t)])
    epochs, faults, begin = round(stream.epochs), [], 0
    for size, weight in stream.sources:
        mine = order[(order >= begin) & (order < begin + size)] - begin
        if len(mine) != (wanted := round(epochs * weight * size)):
            faults.append(f"{len(mine):,} documents of {epochs} epochs are of a source that should have {wanted:,}")
        for start in range(0, len(mine), size):
            seen = np.bincount(mine[start : start + size], minlength=size)
            if seen.max() > 1:
                document = begin + int(seen.argmax())
                faults.append(f"document {document} comes twice before all others of its source came once")
                break
        begin += size
    return faults


def _labels(trainer: Trainer, faults: list[str]) -> tuple[int, int]:
    """Compare, as multisets, the labels of the batches with the targets of the documents; (steps, labels)."""
    labels = 0
    steps = min(len(trainer.stream), BATCHES)
    for step in range(steps):
        documents = [trainer.documents[i] for i in trainer.stream.step(step)]
        wanted = np.sort(np.concatenate([d.tokens[d.targets] for d in documents]))
        batches = trainer.batches(step)
        found = torch.cat([b.targets for b in batches]).sort().values.cpu().numpy()
        if sum(b.token_count for b in batches) != sum(map(len, documents)) or not np.array_equal(wanted, found):
            faults.append(f"the batches of step {step + 1} hold {len(found):,} labels of {len(wanted):,} targets")
            break
        labels += len(found)
    return steps, labels


def silence(ground: Ground) -> Verdict:
    """Every key of the recipe was read; every dropped or cut row was reported; a planted NaN stops the run."""
    faults = []
    asked = written(ground.asked)
    if unread := sorted(asked - ground.read):
        faults.append(f"{unread[0]} was written in the recipe and never read")
    for _, part, count in ground.counted:
        faults += _unequal(
            part.report.source,
            dropped=(sum(part.report.dropped.values()), count.dropped),
            truncated=(part.report.truncated, count.truncated),
        )
    planted = {str(value): _stops(ground.trainer, value) for value in (float("nan"), float("inf"))}
    faults += [f"a planted {name} {fault}" for name, fault in planted.items() if fault]
    dropped, truncated = (sum(getattr(c, what) for *_, c in ground.counted) for what in ("dropped", "truncated"))
    figure = (
        f"all {len(asked)} keys were read, {dropped:,} dropped and {truncated:,} truncated "
        f"rows were reported, a planted {' and '.join(planted)} stopped the run before a weight changed"
    )
    return Verdict("", not faults, "; ".join(faults) or figure, "something goes by unseen; please report it")


def _stops(trainer: Trainer, value: float) -> str:
    """Plant ``value`` in a trained weight and take a step; what is wrong with what happened, or nothing."""
    bare: dict[str, Any] = dict.fromkeys(("preflight", "evaluator", "sampler", "checkpoints", "failures"))
    name, weight = next(iter(trainer.model.trainable().items()))
    with restored(trainer):
        with torch.no_grad():
            weight.fill_(value)  # of an embedding, one row may take no part
        planted = fingerprints(trainer.model.model)
        try:
            next(replace(trainer, stop=False, start=planted, **bare).steps())
        except NonFinite:
            return "" if fingerprints(trainer.model.model) == planted else f"in {name} reached other weights"
        return f"in {name} was not noticed"
