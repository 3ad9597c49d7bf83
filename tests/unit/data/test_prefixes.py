"""Documents that begin alike, brought together."""

from __future__ import annotations

import numpy as np
import pytest

from truetune.data.batch import SHORTEST, Batch, Document
from truetune.data.prefixes import KEYS, packed_by_prefix


def document(*tokens: int | range) -> Document:
    every = np.array([t for part in tokens for t in ([part] if isinstance(part, int) else part)], dtype=np.int32)
    return Document(every, np.arange(len(every)) > 0)


PROMPT = range(100, 160)


def answers(count: int, length: int = 10, prompt: range = PROMPT) -> list[Document]:
    return [document(prompt, *([1000 * (i + 1)] * length)) for i in range(count)]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (document(range(40), 1), document(range(40), 2), 39),  # the last common token has another label in each
        (document(range(40)), document(range(40), 2), 39),
        (document(range(40)), document(range(40)), 40),
        (document(7, range(40)), document(8, range(40)), 0),
        (document(range(SHORTEST + 1), 1), document(range(SHORTEST + 1), 2), SHORTEST),
        (document(range(SHORTEST), 1), document(range(SHORTEST), 2), 0),
    ],
)
def test_what_two_documents_have_in_common(one: Document, other: Document, shared: int) -> None:
    assert one.common(other) == other.common(one) == shared


def test_answers_to_one_prompt_stand_together_once() -> None:
    documents = answers(3) + answers(4, prompt=range(300, 360)) + [document(range(50))]
    mixed = np.random.default_rng(0).permutation(len(documents)).tolist()
    packs = packed_by_prefix([documents[i] for i in mixed], 1000)
    assert packs is not None and len(packs) == 1
    batch = Batch.of([documents[mixed[i]] for i in packs[0]], shares=True)
    assert len(batch.tokens) == (59 + 3 * 11) + (59 + 4 * 11) + 50


def test_no_micro_batch_is_above_its_budget_and_no_document_is_lost() -> None:
    generator = np.random.default_rng(1)
    for capacity in (80, 100, 150, 400):
        documents = [d for i in range(6) for d in answers(int(generator.integers(1, 9)), 8, range(i, i + 60))]
        packs = packed_by_prefix(documents, capacity)
        assert packs is not None and sorted(i for pack in packs for i in pack) == list(range(len(documents)))
        batches = [Batch.of([documents[i] for i in pack], shares=True) for pack in packs]
        assert all(len(batch.tokens) <= capacity for batch in batches)
        assert sum(len(batch.tokens) for batch in batches) < sum(map(len, documents))


def test_keys_of_a_micro_batch_are_few() -> None:
    """A long prompt with very many short answers would put the prompt's keys into memory for each of them."""
    documents = answers(100, 1)
    packs = packed_by_prefix(documents, 200)
    assert packs is not None
    batches = [Batch.of([documents[i] for i in pack], shares=True) for pack in packs]
    assert all(batch.token_count <= KEYS * 200 for batch in batches) and len(batches) == 8


def test_where_little_is_shared_nothing_is_done() -> None:
    strangers = [document(range(i, i + 200)) for i in range(0, 4000, 200)]
    assert packed_by_prefix(strangers, 1000) is None
    assert packed_by_prefix([*strangers, *answers(2)], 1000) is None  # 59 of 4,140 tokens
    assert packed_by_prefix([*strangers[:4], *answers(2)], 1000) is not None


def test_the_order_of_equals_is_that_of_the_step() -> None:
    documents = [document(range(30))] * 3 + [document(range(20), 7)]
    assert packed_by_prefix(documents, 100) == [[3, 0, 1, 2]]
