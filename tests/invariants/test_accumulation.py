"""However a step is split into micro-batches, its gradient is the big batch's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import random_documents, tiny, wrap

from truetune.data.batch import Batch
from truetune.data.packing import best_fit_decreasing
from truetune.models.router import choose_router
from truetune.objectives.next_token import NextToken
from truetune.training.gradient import accumulate


def gradient(model, splits):
    model.zero_grad()
    loss = float(accumulate(model, NextToken(choose_router(model)), [Batch.of(s) for s in splits]))
    return loss, torch.cat([p.grad.flatten() for p in model.trainable().values()])


def weighted(documents, seed=5):
    """The documents with weights of many sizes; every third keeps its own, which are all 1."""
    generator = np.random.default_rng(seed)
    weights = [generator.exponential(2.0, len(d)).astype(np.float32) + 0.01 for d in documents]
    return [d if i % 3 == 0 else replace(d, weights=w) for i, (d, w) in enumerate(zip(documents, weights, strict=True))]


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral balanced"])
def test_any_split_gives_the_big_batch(family, weigh):
    """Ragged lengths, ragged targets, a short last micro-batch; float64, so that only a real fault shows."""
    model = wrap(tiny(family, **({"experts_implementation": "eager"} if "balanced" in family else {})))
    model.model.double()
    documents = random_documents(9, seed=3)
    documents += random_documents(1, seed=4, longest=4)
    documents = weighted(documents) if weigh else documents
    loss, big = gradient(model, [documents])
    packed = best_fit_decreasing([len(d) for d in documents], 50)
    for splits in (
        [[d] for d in documents],
        [documents[:7], documents[7:]],
        [[documents[i] for i in b] for b in packed],
    ):
        other, small = gradient(model, splits)
        assert other == pytest.approx(loss, rel=1e-7)
        residual = small - big
        assert residual.norm() <= 1e-6 * big.norm()


def test_the_mean_of_means_would_be_seen():
    """The field's classic fault, on the same documents, is far outside the tolerance above."""
    model = wrap(tiny("llama"))
    documents = random_documents(9, seed=3)
    _, big = gradient(model, [documents])
    parts = [gradient(model, [[d]])[1] for d in documents]
    assert (torch.stack(parts).mean(0) - big).norm() > 0.05 * big.norm()


def test_the_loss_is_the_weighted_mean_of_its_formula():
    """sum(w * loss) / sum(w) over the targets, from logits, one document at a time."""
    model = wrap(tiny("llama"))
    documents = weighted(random_documents(6, seed=3))
    total = count = 0.0
    for d in documents:
        tokens = torch.from_numpy(d.tokens.astype(np.int64))
        with model.as_published("eager") as hf, torch.no_grad():
            logits = hf(input_ids=tokens[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        weights = np.ones(len(d)) if d.weights is None else d.weights
        for i in np.flatnonzero(d.targets):
            total += float(weights[i]) * float(losses[i - 1])
            count += float(weights[i])
    loss, _ = gradient(model, [documents[:2], documents[2:]])
    assert loss == pytest.approx(total / count, rel=1e-5)
    unweighted, _ = gradient(model, [[replace(d, weights=None) for d in documents]])
    assert abs(unweighted - loss) > 1e-3


def test_weights_that_are_equal_change_nothing():
    model = wrap(tiny("llama"))
    documents = random_documents(5, seed=3)
    loss, plain = gradient(model, [documents])
    other, same = gradient(model, [[replace(d, weights=np.full(len(d), 7, np.float32)) for d in documents]])
    assert other == pytest.approx(loss, rel=1e-6) and (same - plain).norm() <= 1e-5 * plain.norm()


def test_a_step_without_targets_is_refused():
    from truetune.errors import UserError

    model = wrap(tiny("llama"))
    document = random_documents(1)[0]
    document.targets[:] = False
    with pytest.raises(UserError, match="no target tokens"):
        accumulate(model, NextToken(), [Batch.of([document])])
