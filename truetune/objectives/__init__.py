"""What is minimised: (model, batch) -> a sum and the denominator that belongs to it.

An objective counts its denominator over a whole step *before* any backward, and returns sums; the trainer
divides. So no split of a step into micro-batches can change the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from truetune.data.batch import Batch
from truetune.models.router import Router
from truetune.models.wrap import CausalLM


@dataclass(frozen=True, slots=True)
class Terms:
    """total: differentiable sum of weighted losses over the batch (nats); losses [N] and correct [N]: the loss of
    each target token, unweighted, and whether the greedy token is right, detached, in the order of the batch; router:
    the part of the total that is a router loss, detached, None where there is none."""

    total: Tensor
    losses: Tensor
    correct: Tensor
    router: Tensor | None = None


class Objective(Protocol):
    """router: the router loss that it adds, None for none; filtered: whether its gradient leaves out what is small;
    exact: the same objective with all of its gradient."""

    router: Router | None
    filtered: bool

    @property
    def exact(self) -> Objective: ...

    def count(self, batch: Batch) -> float:
        """What the batch contributes to the denominator."""
        ...

    def __call__(self, model: CausalLM, batch: Batch) -> Terms: ...
