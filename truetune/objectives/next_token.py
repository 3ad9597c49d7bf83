"""Next-token cross-entropy over the target tokens: fine-tuning and pre-training alike.

Only the hidden states of target positions meet the head, and never as a logits matrix
(``kernels.linear_cross_entropy``). With weights w the mean is sum(w * loss) / sum(w) over the targets of a step.
"""

from __future__ import annotations

from truetune.data.batch import IGNORE, Batch
from truetune.kernels.linear_cross_entropy import linear_cross_entropy
from truetune.models.wrap import CausalLM
from truetune.objectives import Terms


class NextToken:
    """Sum of -log p(token | tokens before it in its document) over target tokens, each times its weight."""

    def count(self, batch: Batch) -> float:
        if batch.weights is None:
            return float((batch.labels != IGNORE).sum())
        return float(batch.weights.double().sum())

    def __call__(self, model: CausalLM, batch: Batch) -> Terms:
        chosen = batch.labels != IGNORE
        with model.autocast():
            hidden_ND = model(batch)[chosen]
            head = model.head
            terms = linear_cross_entropy(
                hidden_ND,
                head.weight,
                batch.labels[chosen],
                head.bias,
                head.scale,
                head.softcap,
                None if batch.weights is None else batch.weights[chosen],
                head.low(hidden_ND) if head.low else None,
                head.up,
            )
        return Terms(terms.total, terms.losses, terms.correct)
