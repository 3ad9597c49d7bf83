"""What was found as tables of words, which the terminal and the page share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from truetune.data import near
from truetune.inspection.advice import rows as tally
from truetune.inspection.facts import TRAINING, Inspection, Part, Tally
from truetune.report.facts import count, number, percent


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; the first ``left`` columns are words, the others figures. note: what is said below it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    note: str = ""


def grids(found: Inspection) -> Iterator[Grid]:
    """Every table that has something to say; the lengths apart, which the page draws."""
    yield _parts(found)
    yield _roles(found)
    yield _checks(found)
    yield _losses(found)
    yield limits(found)
    yield _copies(found)
    if found.plan:
        yield _fills(found)


def _parts(found: Inspection) -> Grid:
    table = [
        (
            part.side,
            part.report.source,
            "" if part.weight is None else f"{part.weight:g}",
            part.report.format,
            count(part.report.rows),
            count(part.report.documents),
            count(part.report.tokens),
            count(part.report.targets),
            _share(part.report.targets, part.report.tokens),
        )
        for part in found.parts
    ]
    head = ("Side", "Source", "Weight", "Format", "Rows", "Documents", "Tokens", "Targets", "Share")
    return Grid("Sources", head, tuple(table), 4, "Targets are the tokens that are learned; the rest is read.")


def _roles(found: Inspection) -> Grid:
    table = [
        (found.called(part), role, count(tokens), count(targets), _share(targets, tokens))
        for part in found.parts
        for role, tokens in part.report.tokens_by_role.items()
        for targets in [part.report.targets_by_role.get(role, 0)]
    ]
    return Grid("Roles", ("Side", "Role", "Tokens", "Targets", "Share"), tuple(table), 2)


def _checks(found: Inspection) -> Grid:
    begin, template = found.begin, found.template
    table = [row for part in found.of(TRAINING) for row in _turns(found.called(part), part)]
    if begin.token is None:
        table.append((TRAINING, "BOS", "this tokenizer has none"))
    else:
        alone = "writes it by itself" if begin.written else "does not write it by itself"
        documents = sum(part.report.documents for part in found.of(TRAINING))
        told = f"{begin.token} begins {begin.documents:,} of {documents:,}; the tokenizer {alone}"
        table.append((TRAINING, "BOS", told))
    if template:
        owner = "the tokenizer's own" if template.own else "the default, as the tokenizer has none"
        system = repr(template.system) if template.system else "none"
        table += [
            (TRAINING, "Chat template", owner),
            (TRAINING, "Its SHA-256", template.digest),
            (TRAINING, "System prompt that it adds", system),
            (TRAINING, "Conversations without a system turn", count(template.without_system)),
            (TRAINING, "What it writes before a question", repr(template.opening)),
        ]
    return Grid("Turns and template", ("Side", "What", ""), tuple(table), 3)


def _turns(called: str, part: Part) -> Iterator[tuple[str, str, str]]:
    turns = part.turns
    yield called, "Trained turns", f"{turns.turns:,}; {turns.cut:,} of them cut before their end"
    ends = ", ".join(f"{token} ({n:,})" for token, n in turns.ends.items()) or "none"
    yield called, "Last token of a trained turn", ends
    endless = tally(turns.endless) if turns.endless.count else f"0 of {turns.turns - turns.cut:,}"
    yield called, "Turns without a trained stop token", endless


def _losses(found: Inspection) -> Grid:
    table = [row for part in found.parts for row in _lost(found.called(part), part)]
    return Grid(
        "Dropped and cut", ("Side", "What", "Rows"), tuple(table), 3, "Rows are counted from 0 in their source."
    )


def _lost(called: str, part: Part) -> Iterator[tuple[str, str, str]]:
    for reason, dropped in part.dropped.items():
        yield called, f"dropped: {reason}", tally(dropped)
    yield called, "longer than max_length", _tally(part.truncated)
    held = part.report.targets + part.report.targets_cut
    cut = part.report.targets_cut
    yield called, "target tokens cut away", f"{cut:,} of {held:,} ({_share(cut, held)})"
    yield called, "with an empty answer", _tally(part.silent)
    for note, n in part.report.notes.items():
        yield called, note, count(n)


def limits(found: Inspection) -> Grid:
    lengths, reports = found.lengths, [part.report for part in found.of(TRAINING)]
    rows, held = sum(r.rows for r in reports), sum(r.targets + r.targets_cut for r in reports)
    table = [
        (
            f"{limit.max_length:,}{' (yours)' if limit.max_length == found.max_length else ''}",
            f"{limit.rows:,} ({_share(limit.rows, rows)})",
            count(limit.tokens),
            f"{limit.targets:,} ({_share(limit.targets, held)})",
        )
        for limit in lengths.limits
    ]
    note = (
        f"Tokens of a training row: shortest {lengths.shortest:,}, median {lengths.median:,.0f}, "
        f"mean {lengths.mean:,.0f}, longest {lengths.longest:,}."
    )
    return Grid("Lengths", ("data.max_length", "Rows longer", "Tokens beyond", "Targets beyond"), tuple(table), 1, note)


def _copies(found: Inspection) -> Grid:
    table = [
        (found.called(part), kind, f"{n.count:,} of {copies.rows:,} ({_share(n.count, copies.rows)})", _which(n))
        for part in found.parts
        for copies in [part.copies]
        for kind, n in (("exact", copies.exact), ("near", copies.near))
    ]
    return Grid("Duplicates", ("Side", "Copies", "Rows", "Which"), tuple(table), 4, method(found.left))


def method(pairs: int) -> str:
    """How duplicates were looked for, and what that misses."""
    left = f" {pairs:,} pairs were not compared, so the counts are lower bounds." if pairs else ""
    return (
        "Copies of an earlier training row, of any source. Exact: all turns are equal. Near: the Jaccard similarity of "
        f"the texts, without system turns, as sets of {near.SHINGLE}-byte shingles is at least {near.THRESHOLD:g}; "
        f"candidates by MinHash ({near.BANDS} bands of {near.DEPTH}; Broder 1997; Leskovec et al., ch. 3), each "
        f"compared exactly. A pair at {near.THRESHOLD:g} is "
        f"missed with a probability of about {percent(near.missed(near.THRESHOLD))}, at 0.9 of "
        f"{100 * near.missed(0.9):.2f}\u00a0%.{left}"
    )


def _fills(found: Inspection) -> Grid:
    plan = found.plan
    assert plan
    table = [
        (
            f"{fill.tokens_per_micro_batch:,}{' (yours)' if fill.tokens_per_micro_batch == plan.own else ''}",
            percent(fill.fill),
            number(fill.documents, 3),
            number(fill.micro_batches_per_step, 3),
        )
        for fill in plan.fills
    ]
    seen = "" if plan.steps_seen == plan.steps else f" Packed: {plan.steps_seen:,} steps evenly over the run."
    note = (
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens or just above, the last of {plan.last_step:,}; "
        f"{plan.tokens:,} tokens in {plan.epochs:.3g} epochs.{seen}"
    )
    head = ("train.tokens_per_micro_batch", "In use", "Documents", "Micro-batches per step")
    return Grid("Micro-batches", head, tuple(table), 1, note)


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else "none"


def _tally(found: Tally) -> str:
    return tally(found) if found.count else "none"


def _which(found: Tally) -> str:
    return ", ".join(map(str, found.first)) + (", ..." if found.count > len(found.first) else "")
