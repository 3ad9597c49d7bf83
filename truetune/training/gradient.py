"""The gradient of one step, or what a rule takes in its place, the same however the step is split.

The denominator is counted over the whole step before the first backward; every micro-batch adds its share
of one sum. Nothing is averaged twice, so a short last micro-batch weighs what its targets weigh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.kernels.op import statistics_dtype
from truetune.models.wrap import CausalLM
from truetune.objectives import Objective
from truetune.optim import total_norm

_PIECE = 1 << 20
"""Elements of a gradient that are added up at a time."""


class NonFinite(UserError):
    """Loss or gradient is NaN or infinite; it has reached no weight."""


@dataclass(frozen=True, slots=True)
class Means:
    """Over the step's denominator, detached: total, what was differentiated; router: the router loss's part of it,
    None where there is none. As a float it is the total."""

    total: Tensor
    router: Tensor | None = None

    def __float__(self) -> float:
        return float(self.total)


def differentiate(optimizer: Optimizer, model: CausalLM, objective: Objective, batches: Sequence[Batch]) -> Means:
    """What ``optimizer`` steps along: the gradients of the parameters, or the slope that it probes without any.

    Returns the loss; of a slope, the mean of the two that it is found by, without dropout.
    """
    if not getattr(optimizer, "probes", False):
        return accumulate(model, objective, batches)
    found: list[Means] = []

    def loss() -> Tensor:
        found.append(mean_loss(model, objective, batches))
        return found[-1].total

    training = model.training
    model.eval()
    optimizer.probe(loss)  # type: ignore[attr-defined]
    model.train(training)
    routers = [means.router for means in found if means.router is not None]
    return Means(torch.stack([m.total for m in found]).mean(), torch.stack(routers).mean() if routers else None)


def accumulate(model: CausalLM, objective: Objective, batches: Sequence[Batch]) -> Means:
    """Add the gradient of the mean loss over ``batches`` to the parameters; returns that loss."""
    return _means(model, objective, batches, Tensor.backward)


@torch.no_grad()
def mean_loss(model: CausalLM, objective: Objective, batches: Sequence[Batch]) -> Means:
    """The same loss, and no gradient."""
    return _means(model, objective, batches, lambda share: None)


def _means(model: CausalLM, objective: Objective, batches: Sequence[Batch], take: Callable[[Tensor], object]) -> Means:
    denominator = sum(objective.count(batch) for batch in batches)
    if not denominator:
        raise UserError("a step has no target tokens; check data.format and the targets that the report shows")
    losses, router = [], []
    for batch in batches:
        terms = objective(model, batch)
        share = terms.total / denominator
        take(share)
        losses.append(share.detach().double())
        if terms.router is not None:
            router.append(terms.router.double() / denominator)
    return Means(torch.stack(losses).sum(), torch.stack(router).sum() if router else None)


def norms_of(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """L2 and L1 norm of the gradient, or of the estimate that ``optimizer`` has probed."""
    if getattr(optimizer, "probes", False):
        return optimizer.lengths  # type: ignore[attr-defined]
    return norm_of(parameters), l1_of(parameters)


def norm_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, in fp32."""
    return total_norm([p.grad for p in parameters if p.grad is not None])


def l1_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L1 norm over all gradients, a double.

    In pieces that stay in the processor's cache: on CPUs torch's own ``norm(1)`` adds up one by one in fp32, which
    over 4e7 equal values is 7 % short, and several times as slow.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(g.device.type != "cpu" for g in gradients):  # there it is a tree of sums, and one launch for all
        return total_norm(gradients, 1.0).double()
    pieces = [
        piece.abs().sum(dtype=statistics_dtype(piece.dtype)) for g in gradients for piece in g.flatten().split(_PIECE)
    ]
    return torch.stack(pieces).double().sum() if pieces else torch.zeros((), dtype=torch.float64)


def clip(parameters: Iterable[nn.Parameter], limit: float | None, norm: Tensor) -> None:
    """Scale all gradients down so that their norm, which is ``norm``, is at most ``limit``."""
    if limit is not None:
        nn.utils.clip_grads_with_norm_(list(parameters), limit, norm)


def require_finite(loss: float, norm: float, step: int, by_parts: bool = False) -> None:
    """Raise NonFinite unless both figures are numbers; by_parts: whether weights moved before all of it was known."""
    stands = "no weight was changed"
    if by_parts:
        stands = "weights that came before it have moved, so go on from a checkpoint"
    for name, value in (("loss", loss), ("gradient norm", norm)):
        if not abs(value) < float("inf"):
            raise NonFinite(f"the {name} of step {step} is {value}; {stands}")


def not_finite(loss: Tensor, norm: Tensor, before: Tensor | None) -> Tensor:
    """1.0 where one of them is no number or ``before`` is 1.0, else 0.0, a scalar of the device."""
    found = (~(loss.isfinite() & norm.isfinite())).float()
    return found if before is None else torch.maximum(found, before)
