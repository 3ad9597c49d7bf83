"""What is found that would spoil a run in silence: one sentence each, which ends with what to do."""

from __future__ import annotations

from collections.abc import Iterator

from truetune.inspection.facts import TRAINING, Inspection, Part, Plan, Tally

FEW_TARGETS, MANY_COPIES, MANY_DROPPED = 0.05, 0.01, 0.01
LITTLE_FILL, FEWER = 0.7, 0.75


def warnings(found: Inspection) -> Iterator[str]:
    for part in found.parts:
        yield from _part(part, found.where(part))
    yield from _turns(found)
    yield from _texts(found)
    for part in found.parts:
        yield from (_copies if part.side == TRAINING else _overlap)(part, found.where(part))
    if found.plan:
        yield from _fill(found.plan)


def _fill(plan: Plan) -> Iterator[str]:
    own = next(fill for fill in plan.fills if fill.tokens_per_micro_batch == plan.own)
    better = [f for f in plan.fills if f.tokens_per_micro_batch > plan.own]
    fewer = next((f for f in better if f.micro_batches_per_step < FEWER * own.micro_batches_per_step), None)
    if fewer and own.fill < LITTLE_FILL:
        yield (
            f"a step takes {own.micro_batches_per_step:.2f} micro-batches that are {own.fill:.0%} full; where memory "
            f"allows it, train.tokens_per_micro_batch={fewer.tokens_per_micro_batch} takes "
            f"{fewer.micro_batches_per_step:.2f}"
        )


def rows(tally: Tally) -> str:
    """How many rows, and which; numbers of the first few."""
    more = ", ..." if tally.count > len(tally.first) else ""
    return f"{tally.count:,} row{'s' * (tally.count != 1)} ({', '.join(map(str, tally.first))}{more})"


def _part(part: Part, where: str) -> Iterator[str]:
    if part.report.tokens and part.report.targets < FEW_TARGETS * part.report.tokens:
        yield (
            f"only {part.report.targets / part.report.tokens:.1%} of the {part.side} tokens{where} are targets, so "
            "most of the work teaches nothing; shorten the prompts, or check which turns are meant to be learned"
        )
    dropped = sum(tally.count for tally in part.dropped.values())
    if dropped > MANY_DROPPED * part.report.rows:
        reasons = ", ".join(f"{reason}: {rows(tally)}" for reason, tally in part.dropped.items())
        share = f"{dropped / part.report.rows:.1%} of the {part.side} rows{where}"
        yield f"{share} are dropped ({reasons}); mend or remove them"
    if part.report.targets_cut:
        held = part.report.targets + part.report.targets_cut
        yield (
            f"max_length cuts away {part.report.targets_cut / held:.2%} of the {part.side} targets{where}, in "
            f"{rows(part.truncated)}; raise data.max_length if the ends of answers matter"
        )
    if part.silent.count:
        silent = f"{rows(part.silent)} of the {part.side} side{where}"
        yield f"answers are empty in {silent}, which teaches silence; remove them"


def _turns(found: Inspection) -> Iterator[str]:
    for part in found.of(TRAINING):
        if part.turns.endless.count:
            yield (
                f"answers do not end in a trained stop token in {rows(part.turns.endless)}{found.where(part)}, so the "
                "model would not learn to stop; use a chat template that ends an answer in the tokenizer's eos token"
            )
    begin, documents = found.begin, sum(part.report.documents for part in found.of(TRAINING))
    if begin.written and begin.documents < documents:
        yield (
            f"{documents - begin.documents:,} of {documents:,} documents do not begin with {begin.token}, "
            "which this tokenizer writes before every text; put it into the chat template"
        )


def _texts(found: Inspection) -> Iterator[str]:
    template = found.template
    if template and not template.own:
        yield (
            "the tokenizer has no chat template, so a plain default is used and saved with the model; start from an "
            "instruction-tuned model if there is one"
        )
    if template and template.system and template.without_system:
        yield (
            f"the chat template adds a system prompt of its own to {template.without_system:,} conversations that have "
            "none; put the one you want into the rows, and use the same one later"
        )


def _copies(part: Part, where: str) -> Iterator[str]:
    copies = part.copies
    if copies.rows > 1 and copies.exact.count == copies.rows - 1:
        yield f"all {part.side} rows{where} say the same, so there is nothing to learn but this one; give other data"
    elif copies.exact.count > MANY_COPIES * copies.rows:
        yield (
            f"{copies.exact.count / copies.rows:.1%} of the {part.side} rows{where} repeat an earlier one exactly: "
            f"{rows(copies.exact)}; remove them, or mean it"
        )
    if copies.near.count > MANY_COPIES * copies.rows:
        yield (
            f"{copies.near.count / copies.rows:.1%} of the {part.side} rows{where} are nearly the same as an earlier "
            f"one: {rows(copies.near)}; keep one of each"
        )


def _overlap(part: Part, where: str) -> Iterator[str]:
    overlap = part.copies
    if both := overlap.exact.count + overlap.near.count:
        yield (
            f"{both:,} of {overlap.rows:,} held-out rows{where} are also trained on ({overlap.exact.count:,} exactly, "
            f"{overlap.near.count:,} nearly), and a loss on them says nothing; hold out by origin with "
            "evaluation.source, or remove one of each pair"
        )
