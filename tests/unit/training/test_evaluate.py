"""The standard error of a held-out loss, against what drawing documents anew gives."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import random_documents, tiny, wrap

from truetune.data.batch import Batch
from truetune.objectives.next_token import NextToken
from truetune.training.evaluate import Evaluator, standard_error


def test_the_error_is_the_spread_over_other_documents() -> None:
    generator = np.random.default_rng(0)

    def drawn(m: int) -> list[tuple[float, float]]:
        counts = generator.integers(1, 40, m)
        rates = generator.gamma(4.0, 0.5, m)  # loss per target differs from document to document
        return [(float(n * rate), float(n)) for n, rate in zip(counts, rates, strict=True)]

    losses, errors = [], []
    for _ in range(2000):
        documents = drawn(60)
        losses.append(sum(total for total, _ in documents) / sum(n for _, n in documents))
        errors.append(standard_error(documents))
    assert np.mean(errors) == pytest.approx(np.std(losses), rel=0.05)
    assert standard_error(documents[:1]) is None


def test_an_evaluation_counts_its_documents_and_their_error() -> None:
    documents, objective = random_documents(9), NextToken()
    model = wrap(tiny("llama"))
    found = Evaluator(documents, 64, objective)(model, 0)
    alone = [(float(objective(model, Batch.of([d])).losses.sum()), d.target_count) for d in documents]
    assert found.documents == 9 and found.error == pytest.approx(standard_error(alone), rel=1e-4)
