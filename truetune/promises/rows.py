"""Promises about the data: what came in goes out, and whatever was left out is told.

Everything is counted once more, from the source's rows to the labels of the batches, by other means than those that
made the data report: rows are rendered without a limit of length, and labels are counted in the batches themselves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from truetune.assembly import Part, build_stream, sources_of
from truetune.checks.preflight import restored
from truetune.data import formats
from truetune.data.batch import IGNORE
from truetune.data.chat import Renderer
from truetune.data.sources import canonical
from truetune.promises.ground import Ground, written
from truetune.training.gradient import NonFinite
from truetune.training.integrity import fingerprints
from truetune.training.record import Verdict
from truetune.training.trainer import Trainer

BATCHES = 400
"""Steps whose micro-batches are laid out and counted; the order of the documents is followed over the whole run."""


@dataclass(frozen=True, slots=True)
class Recount:
    """A part of the data, counted from its rows: all targets they hold, and what a limit of length takes away."""

    held: int
    kept: int
    documents: int
    dropped: int
    truncated: int
    by_role: Counter[str]


def recount(ground: Ground, part: Part) -> Recount:
    data = ground.recipe.data
    endless = Renderer(ground.job.loaded.tokenizer, ground.job.loaded.stop_ids, 1 << 62, data.targets)
    held = kept = documents = dropped = truncated = 0
    by_role: Counter[str] = Counter()
    for number, row in zip(part.rows.numbers, part.rows.rows, strict=True):
        rendered = endless.documents(formats.read(part.report.format, row, number, data.weight_column), number)
        pieces = [piece for d in rendered.documents for piece in _pieces(d.targets, data.max_length, data.too_long)]
        held += sum(d.target_count for d in rendered.documents)
        kept += sum(int(piece.sum()) for piece in pieces)
        documents += len(pieces)
        dropped += not pieces
        truncated += rendered.length > data.max_length
        if rendered.length <= data.max_length or data.too_long == "split":  # all of its targets are kept
            by_role.update(rendered.targets_by_role)
    return Recount(held, kept, documents, dropped, truncated, by_role)


def _pieces(targets: np.ndarray, limit: int, too_long: str) -> list[np.ndarray]:
    """The targets of each document that is made of one with ``targets``, where it has any."""
    if len(targets) <= limit:
        pieces = [targets]
    elif too_long == "split":  # the first token of all but the first piece is the last of the one before
        pieces = [targets[:limit], *(targets[i : i + limit - 1] for i in range(limit, len(targets), limit - 1))]
    else:
        pieces = [targets[:limit]] if too_long == "truncate" else []
    return [piece for piece in pieces if piece.any()]


def conservation(ground: Ground) -> Verdict:
    """Target tokens in = out, per source and role; no document twice in an epoch, none lost, none in both parts."""
    faults, told = [], []
    for side, part in _parts(ground):
        count, report = recount(ground, part), part.report
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
    weights = [source.weight for source in sources_of(ground.asked)]
    faults += _order(planned, list(zip(ground.job.train.by_source.values(), weights, strict=True)))
    steps, labels = _labels(planned, faults)
    told.append(f"{labels:,} labels in the batches of {steps} steps are their documents' targets")
    return Verdict("", not faults, "; ".join(faults or told), "rows are lost or doubled; please report it")


def _parts(ground: Ground) -> list[tuple[str, Part]]:
    """Each source's part of each side, with the name of the side."""
    sides = (("training", ground.job.train), ("held out", ground.job.evaluation))
    return [(name, part) for name, side in sides for part in side.parts]


def _unequal(side: str, **pairs: tuple[int, int]) -> list[str]:
    return [f"{side}: {name} are {told:,}, counted {found:,}" for name, (told, found) in pairs.items() if told != found]


def _order(trainer: Trainer, sources: list[tuple[range, float]]) -> list[str]:
    """Faults of the order of the run: each source comes as often as its weight says, and every document of it once
    before any comes twice."""
    order = np.array([i for t in range(len(trainer.stream)) for i in trainer.stream.step(t)])
    epochs = len(order) / sum(weight * len(places) for places, weight in sources)
    whole = sum(round(int(epochs) * weight * len(places)) for places, weight in sources)
    faults = []
    for places, weight in sources:
        mine = order[(order >= places.start) & (order < places.stop)] - places.start
        found = int(np.sum((order[:whole] >= places.start) & (order[:whole] < places.stop)))
        if found != (wanted := round(int(epochs) * weight * len(places))):
            faults.append(f"{found:,} documents of {int(epochs)} epochs are of a source that should have {wanted:,}")
        for start in range(0, len(mine), len(places)):
            seen = np.bincount(mine[start : start + len(places)], minlength=len(places))
            if seen.max() > 1:
                document = places.start + int(seen.argmax())
                faults.append(f"document {document} comes twice before all others of its source came once")
                break
    return faults


def _labels(trainer: Trainer, faults: list[str]) -> tuple[int, int]:
    """Compare, as multisets, the labels of the batches with the targets of the documents; (steps, labels)."""
    labels = 0
    steps = min(len(trainer.stream), BATCHES)
    for step in range(steps):
        documents = [trainer.documents[i] for i in trainer.stream.step(step)]
        wanted = np.sort(np.concatenate([d.tokens[d.targets] for d in documents]))
        batches = trainer.batches(step)
        found = torch.cat([b.labels[b.labels != IGNORE] for b in batches]).sort().values.cpu().numpy()
        if sum(len(b.tokens) for b in batches) != sum(map(len, documents)) or not np.array_equal(wanted, found):
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
    parts = [part for _, part in _parts(ground)]
    counts = [recount(ground, part) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        faults += _unequal(
            part.report.source,
            dropped=(sum(part.report.dropped.values()), count.dropped),
            truncated=(part.report.truncated, count.truncated),
        )
    planted = {str(value): _stops(ground.trainer, value) for value in (float("nan"), float("inf"))}
    faults += [f"a planted {name} {fault}" for name, fault in planted.items() if fault]
    dropped, truncated = sum(c.dropped for c in counts), sum(c.truncated for c in counts)
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
