"""What the walks over the rows amount to: parts, turns, lengths, copies, and the plan of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from truetune.data import near, template
from truetune.data.chat import REASONS, Renderer
from truetune.data.rendering import added
from truetune.data.traits import said
from truetune.errors import UserError
from truetune.inspection.facts import (
    HELD_OUT,
    TRAINING,
    Begin,
    Copies,
    Fill,
    Lengths,
    Limit,
    Pair,
    Part,
    Plan,
    Tally,
    Template,
    Turns,
)
from truetune.inspection.walk import Walk
from truetune.recipe import Recipe
from truetune.rows import build_stream, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = 48
STEPS = 400
"""Steps that are packed to see how full the micro-batches are."""
EXAMPLES, EXCERPT = 6, 300


def parts(
    recipe: Recipe, training: Sequence[Walk], held_out: Sequence[Walk], renderer: Renderer
) -> tuple[tuple[Part, ...], int]:
    """Every part, and how many pairs of rows were not compared."""
    alike, left = copies(training, held_out)
    weights = [*(source.weight for source in sources_of(recipe)), *[None] * len(held_out)]
    sides = [TRAINING] * len(training) + [HELD_OUT] * len(held_out)
    found = zip(sides, [*training, *held_out], weights, alike, strict=True)
    return tuple(_part(side, walk, weight, copied, renderer) for side, walk, weight, copied in found), left


def _part(side: str, walk: Walk, weight: float | None, copied: Copies, renderer: Renderer) -> Part:
    fate = walk.table["fate"]
    return Part(
        side=side,
        name=walk.name,
        weight=weight,
        report=walk.report(renderer),
        dropped={reason: walk.tally(fate == 1 + REASONS.index(reason)) for reason in walk.account.dropped},
        truncated=walk.tally(walk.table["length"] > renderer.max_length),
        silent=walk.tally(walk.table["silent"]),
        turns=_turns(walk, renderer.tokenizer),
        copies=copied,
    )


def _turns(walk: Walk, tokenizer: PreTrainedTokenizerBase) -> Turns:
    turns = int(walk.table["turns"].sum(dtype=np.int64))
    ends = {str(tokenizer.convert_ids_to_tokens(token)): n for token, n in walk.ends.most_common()}
    return Turns(turns, turns - walk.ends.total(), walk.endless, ends)


def begin(walks: Sequence[Walk], tokenizer: PreTrainedTokenizerBase) -> Begin:
    bos = tokenizer.bos_token_id
    written = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return Begin(None if bos is None else str(tokenizer.bos_token), written, sum(walk.begun for walk in walks))


def chat_template(walks: Sequence[Walk], renderer: Renderer) -> Template | None:
    """None where every row is bare text."""
    if not any(walk.account.chat for walk in walks):
        return None
    system, opening = template.bounded("the chat template", partial(_added, renderer))
    own = bool(renderer.tokenizer.chat_template)
    bare = sum(int(np.count_nonzero(walk.table["bare"])) for walk in walks)
    return Template(renderer.template_digest, own, system, opening, bare)


def _added(renderer: Renderer) -> tuple[str, str]:
    """What the template writes as a system prompt of its own, and all that it writes before the first question.

    The former is what a rendering without a system turn has where one with it has that turn's content.
    """
    asked, told = "Xq7question", "Xq7instruction"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Xq7answer"}]

    def rendered(messages: list[dict[str, str]]) -> str:
        return template.render(renderer.tokenizer, messages, "the chat template", renderer.template).text

    plain = rendered(turns)
    opening = plain.partition(asked)[0]
    try:
        before, found, after = rendered([{"role": "system", "content": told}, *turns]).partition(told)
    except UserError:  # it knows no system turns
        return "", opening
    own = found and plain.startswith(before) and plain.endswith(after)
    return plain[len(before) : len(plain) - len(after)] if own else "", opening


def lengths(walks: Sequence[Walk], renderer: Renderer) -> Lengths:
    max_length = renderer.max_length
    found = np.concatenate([walk.table["length"] for walk in walks]).astype(np.int64)
    targets_at = np.zeros(0, np.int64)
    for walk in walks:
        targets_at = added(added(targets_at, walk.targets_at), walk.account.cut)
    shortest, longest = int(found.min()), int(found.max())
    top = max(int(np.percentile(found, 99)), round(1.1 * max_length) if longest > max_length else 0)
    edges = np.unique(np.linspace(shortest, max(top, shortest + BARS), BARS + 1).astype(np.int64))
    counts = np.histogram(np.minimum(found, edges[-1] - 1), edges)[0]
    last = [*(edges[1:-1] - 1), max(longest, int(edges[-1]) - 1)]  # the last bar has all that are longer
    bars = tuple((int(a), int(b), int(n)) for a, b, n in zip(edges[:-1], last, counts, strict=True))
    wanted = {max_length // 2, max_length, longest, *([2 * max_length] if longest > max_length else [])}
    if renderer.too_long == "split":  # no limit cuts anything
        wanted.clear()
    limits = tuple(_limit(targets_at, found, limit) for limit in sorted(wanted) if limit > 1)
    return Lengths(shortest, float(np.median(found)), float(found.mean()), longest, bars, limits)


def _limit(targets_at: np.ndarray, found: np.ndarray, limit: int) -> Limit:
    beyond = found[found > limit] - limit
    return Limit(limit, len(beyond), int(beyond.sum()), int(targets_at[limit:].sum()))


def copies(training: Sequence[Walk], held_out: Sequence[Walk]) -> tuple[list[Copies], int]:
    """Of every source, the rows that say the same as an earlier training row of any; and the pairs not compared.

    Rows that are dropped are left out. Held-out rows are compared with training rows alone.
    """
    walks = [*training, *held_out]
    kept = [np.flatnonzero(walk.table["documents"]) for walk in walks]
    begins = np.cumsum([0, *map(len, kept)])
    table = np.concatenate([walk.table[some] for walk, some in zip(walks, kept, strict=True)])
    trained = int(begins[len(training)])

    def where(i: int) -> tuple[int, int]:
        """The walk, and the place of the row in it."""
        of = int(np.searchsorted(begins, i, side="right")) - 1
        return of, int(kept[of][i - begins[of]])

    def texts(places: Sequence[int]) -> Iterator[str]:
        for of, some in groupby(map(where, places), key=itemgetter(0)):
            yield from map(said, walks[of].examples(place for _, place in some))

    equal = _equal(table["digest"], trained)
    alike = near.find(table["bands"], table["digest"], trained, texts)
    of = np.where(equal >= 0, equal, alike.of)
    similarity = np.where(equal >= 0, 1.0, alike.similarity)

    def pair(i: int) -> Pair:
        (mine, place), (its, at) = where(i), where(int(of[i]))
        numbers = int(walks[mine].rows.numbers[place]), int(walks[its].rows.numbers[at])
        a, b = (text[:EXCERPT] for text in texts([i, int(of[i])]))
        return Pair(*numbers, walks[its].name, float(similarity[i]), a, b)

    found = []
    for walk, places, first, last in zip(walks, kept, begins[:-1], begins[1:], strict=True):
        mine = slice(int(first), int(last))
        some = np.flatnonzero(of[mine] >= 0) + int(first)
        some = some[np.argsort(similarity[some], kind="stable")]  # the least similar tell most
        shown = [*some[: EXAMPLES // 2].tolist(), *some[EXAMPLES // 2 :][-EXAMPLES // 2 :].tolist()]
        exact, close = Tally(), Tally()
        exact.add([walk.rows.numbers[place] for place in places[equal[mine] >= 0]])
        close.add([walk.rows.numbers[place] for place in places[(alike.of[mine] >= 0) & (equal[mine] < 0)]])
        found.append(Copies(len(places), exact, close, tuple(map(pair, shown))))
    return found, alike.left


def _equal(digests: np.ndarray, training: int) -> np.ndarray:
    """For every row the place of the first training row of its digest, if that is another, else -1."""
    known, first, inverse = np.unique(digests[:training], return_index=True, return_inverse=True)
    others = np.append(first, -1)[np.searchsorted(known, digests[training:])]
    others[~np.isin(digests[training:], known)] = -1
    own = first[inverse]
    own[own == np.arange(training)] = -1
    return np.concatenate([own, others])


def plan(recipe: Recipe, walks: Sequence[Walk]) -> Plan | None:
    """None where a source has no document."""
    by_source = [walk.lengths.astype(np.int64) for walk in walks]
    if not all(map(len, by_source)):
        return None
    sizes = np.concatenate(by_source)
    stream = build_stream(recipe, by_source)
    own = recipe.train.tokens_per_micro_batch
    wanted = {own, own // 2, 2 * own, 4 * own, max(recipe.train.tokens_per_step, own)}
    steps = np.unique(np.linspace(0, len(stream) - 1, min(STEPS, len(stream))).astype(int)).tolist()
    fills = []
    for capacity in sorted(wanted):
        if capacity >= max(recipe.data.max_length, int(sizes.max())):
            train = recipe.train.model_copy(update={"tokens_per_micro_batch": capacity})
            stream = build_stream(recipe.model_copy(update={"train": train}), by_source)
            packed = [batch for t in steps for batch in stream.micro_batches(t)]
            documents = sum(map(len, packed))
            tokens = int(sizes[[i for batch in packed for i in batch]].sum())
            fills.append(
                Fill(capacity, tokens / (capacity * len(packed)), documents / len(packed), len(packed) / len(steps))
            )
    last = int(sizes[stream.step(len(stream) - 1)].sum())
    return Plan(
        own, len(stream), stream.epochs, stream.tokens, recipe.train.tokens_per_step, last, len(steps), tuple(fills)
    )
