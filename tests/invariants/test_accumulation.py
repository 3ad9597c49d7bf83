"""However a step is split into micro-batches, its gradient is the big batch's."""

from __future__ import annotations

import pytest
import torch
from tiny import random_documents, tiny, wrap

from truetune.data.batch import Batch
from truetune.data.packing import best_fit_decreasing
from truetune.objectives.next_token import NextToken
from truetune.training.gradient import accumulate


def gradient(model, splits):
    model.zero_grad()
    loss = float(accumulate(model, NextToken(), [Batch.of(s) for s in splits]))
    return loss, torch.cat([p.grad.flatten() for p in model.trainable().values()])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_split_gives_the_big_batch(family):
    """Ragged lengths, ragged targets, a short last micro-batch; float64, so that only a real fault shows."""
    model = wrap(tiny(family))
    model.model.double()
    documents = random_documents(9, seed=3)
    documents += random_documents(1, seed=4, longest=4)
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


def test_a_step_without_targets_is_refused():
    from truetune.errors import UserError

    model = wrap(tiny("llama"))
    document = random_documents(1)[0]
    document.targets[:] = False
    with pytest.raises(UserError, match="no target tokens"):
        accumulate(model, NextToken(), [Batch.of([document])])
