"""Next-token cross-entropy over the target tokens: fine-tuning and pre-training alike.

Only the hidden states of target positions meet the head, and never as a logits matrix
(``kernels.linear_cross_entropy``). With weights w the mean is sum(w * loss) / sum(w) over the targets of a step.
"""

from __future__ import annotations

import torch

from truetune.data.batch import IGNORE, Batch
from truetune.kernels.linear_cross_entropy import linear_cross_entropy
from truetune.models.router import Router, load_balance
from truetune.models.wrap import CausalLM
from truetune.objectives import Terms


class NextToken:
    """Sum of -log p(token | tokens before it in its document) over target tokens, each times its weight.

    router: adds the load-balancing loss of each document, by the weights of its targets, times its coefficient.
    filtered: as in ``linear_cross_entropy``.
    """

    def __init__(self, router: Router | None = None, filtered: bool = False) -> None:
        self.router, self.filtered = router, filtered

    @property
    def exact(self) -> NextToken:
        return NextToken(self.router) if self.filtered else self

    def count(self, batch: Batch) -> float:
        return batch.total

    def __call__(self, model: CausalLM, batch: Batch) -> Terms:
        """Raises ValueError for a router loss of documents that share rows."""
        if self.router and batch.shared is not None:
            raise ValueError("a router loss is one of each document, so they share no rows; lay them out apart")
        chosen = batch.learned
        with model.autocast():
            states = model.states(batch, router=True) if self.router else None
            hidden_ND = states.hidden[chosen] if states else model(batch, chosen)
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
                filtered=self.filtered,
            )
        if not self.router or not states:
            return Terms(terms.total, terms.losses, terms.correct)
        balance_N = load_balance(states.router, batch.lengths, self.router.chosen)
        weight_T = batch.labels != IGNORE if batch.weights is None else batch.weights
        weight_N = torch.stack([part.sum() for part in weight_T.split(batch.lengths)])
        router = self.router.coefficient * (balance_N * weight_N).sum()
        return Terms(terms.total + router, terms.losses, terms.correct, router.detach())
