"""The one step loop of all rules that torch does not have, or not as their papers do.

A rule is its equation, ``update``, and the zeros that it starts from, ``start``. Both see *stacks*: K parameters of
equal shape as one tensor [K, *shape], so that a hundred small tensors are one sequence of operations, and matrices of
equal shape one batched product. A large tensor is a stack of its own, seen in place; of small ones the state lies
stacked in memory and each parameter's is a view of it, while weights and gradients are copied together.

Parameters that a rule does not take (``takes``; groups marked ``rest``) are updated by AdamW at its defaults, in the
same optimizer. Equations use the names of the field: x weights, g gradient, m and v moments, t the number of the step,
from 1. Left out: closures that are called more than once, sparse and complex tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw as adamw_

from truetune.errors import UserError
from truetune.optim.groups import KINDS

Groups = list[dict[str, Any]]
Betas = tuple[float, float]
State = dict[str, Tensor]
Stack = tuple[Tensor, Tensor, int, State, dict[str, Any]]
"""x and g [K, *shape], t, state [K, ...] each, and the options of the group."""

STACKED = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements that small tensors are stacked up to: what a cache holds; on a GPU, what keeps it busy."""

SHARED = "shared_"
"""Begins the keys of state that belongs to all parameters; it is kept, and so saved, with the first."""

AROUND = "around_"
"""Begins the keys of what is kept around a rule (``around``), which are no moments of its own."""

BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers from 0 to below 1"),
    "momentum": (lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "eps": (lambda value: value >= 0, "0 or a small positive number"),
    "weight_decay": (lambda value: value >= 0, "0 or a positive number"),
}
"""Option -> what holds of its value, and in words. Options of one rule alone are checked where it is."""


def require(option: str, right: bool, wanted: str) -> None:
    """Raise UserError unless ``right``; ``wanted`` says what the option must be."""
    if not right:
        raise UserError(f"optimizer.{option} is out of its range; choose {wanted}")


class Rule(Optimizer):
    """An optimizer of a recipe: ``rate`` is the peak of those ``groups`` that have none of their own.

    takes: the kinds of parameters that it is meant for (``groups.KINDS``).
    waits: steps at the beginning that only gather what it needs and move nothing.
    averages_weights: whether there are ``averages``. finds_rate: whether the rate only multiplies what it finds.
    sees_loss: whether ``step`` needs a closure that returns the loss of the gradients, which is then ``loss``.
    Raises UserError for an option out of its range.
    """

    takes: ClassVar[tuple[str, ...]] = KINDS
    waits: int = 0
    averages_weights: bool = False
    finds_rate: bool = False
    sees_loss: bool = False
    loss: Any = None

    def __init__(self, groups: Groups, rate: float, **options: Any) -> None:
        for name, value in options.items():
            if name in BOUNDS:
                holds, wanted = BOUNDS[name]
                require(name, holds(value), wanted)
        super().__init__(groups, {"lr": rate, "rest": False, **options})

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        """The state of a stack before its first step: zeros, or copies of the weights. Must allow ``meta`` tensors."""
        raise NotImplementedError

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        """One step of a stack: change ``x`` and ``state`` in place, or put new tensors into ``state``; keep ``g``."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What all parameters decide together, before any is updated; ``self.shared`` keeps it."""

    @property
    def steps_apart(self) -> bool:
        """Whether each parameter moves by its own gradient alone, so that they may step one after the other."""
        return type(self).prepare is Rule.prepare

    def averages(self) -> dict[Tensor, Tensor]:
        """Parameter -> the weights to evaluate and to keep in its place; none where the parameters are those."""
        return {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        self.loss = loss = None if closure is None else torch.enable_grad()(closure)()
        self._count()
        self.prepare()
        for x, g, t, state, group in self.stacks():
            self.update(x, g, t, state, group)
        self._update_rest()
        return loss

    def stacks(self) -> Iterator[Stack]:
        """Every stack with a gradient; what is done to one is written back before the next."""
        for group in self.param_groups:
            if group["rest"]:
                continue
            alike: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.dtype, p.device, int(self.state[p]["step"])].append(p)
            for (shape, _, device, t), parameters in alike.items():
                most = max(1, STACKED.get(device.type, STACKED["cpu"]) // max(1, shape.numel()))
                for first in range(0, len(parameters), most):
                    yield from self._stack(parameters[first : first + most], t, group)

    def _stack(self, parameters: list[Tensor], t: int, group: dict[str, Any]) -> Iterator[Stack]:
        x = _together([p.detach() for p in parameters])
        g = _together([p.grad for p in parameters if p.grad is not None])
        states = [self.state[p] for p in parameters]
        names = [name for name in states[0] if name != "step" and not name.startswith(SHARED)]
        state = {name: _together([own[name] for own in states]) for name in names} or self.start(x, group)
        yield x, g, t, state, group
        if len(parameters) > 1:
            torch._foreach_copy_(parameters, list(x.unbind()))
        for name, tensor in state.items():
            for own, part in zip(states, tensor.unbind(), strict=True):
                own[name] = part

    def shared(self, **initial: float) -> State:
        """Numbers that all parameters share, by name, as float64 tensors without a dimension."""
        first = self.param_groups[0]["params"][0]
        home = self.state[first]
        for name, value in initial.items():
            if SHARED + name not in home:
                home[SHARED + name] = torch.tensor(value, dtype=torch.float64, device=first.device)
        return {name: home[SHARED + name] for name in initial}

    def _count(self) -> None:
        """One more step for every parameter with a gradient. The host must know it, so there it is kept."""
        counts = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not group["rest"]:
                    state = self.state[p]
                    state["step"] = state["step"].cpu() if "step" in state else torch.zeros(())
                    counts.append(state["step"])
        if counts:
            torch._foreach_add_(counts, 1)

    def _update_rest(self) -> None:
        """AdamW, torch's fused step, for the groups that the rule does not take."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and group["rest"]]
            for p in parameters:
                if "step" not in self.state[p]:
                    self.state[p] |= {"step": torch.zeros((), device=p.device)}
                    self.state[p] |= {key: torch.zeros_like(p) for key in ("m", "v")}
            if parameters:
                adamw_(
                    parameters,
                    [p.grad for p in parameters if p.grad is not None],
                    [self.state[p]["m"] for p in parameters],
                    [self.state[p]["v"] for p in parameters],
                    [],
                    [self.state[p]["step"] for p in parameters],
                    fused=True,
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=group["lr"],
                    weight_decay=group.get("weight_decay", 0.0),
                    eps=1e-8,
                    maximize=False,
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype."""
        super().load_state_dict(state_dict | {"state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for place, state in state_dict["state"].items():
            p = parameters[place]
            self.state[p] = {name: tensor.to(p.device, copy=True) for name, tensor in state.items()}

    def state_bytes(self) -> int:
        """Bytes of the state of all parameters, the counts of steps apart; computed without making it."""
        total = 0
        for group in self.param_groups:
            for p in group["params"]:
                meta = torch.empty((1, *p.shape), dtype=p.dtype, device="meta")
                total += 2 * p.nbytes if group["rest"] else sum(s.nbytes for s in self.start(meta, group).values())
        return total


def _together(tensors: list[Tensor]) -> Tensor:
    """Tensors of equal shape as one with a dimension before: a view where they lie in memory one after the other."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.unsqueeze(0)
    size, start, memory = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    for i, tensor in enumerate(tensors):
        adjacent = tensor.storage_offset() == start + i * size and tensor.untyped_storage().data_ptr() == memory
        if not (adjacent and tensor.is_contiguous()):
            return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def averages(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """``Rule.averages`` of any optimizer."""
    with torch.no_grad():
        return optimizer.averages() if isinstance(optimizer, Rule) else {}


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """The weights that ``optimizer`` would keep, in place of those that it trains, for a while."""
    kept = averages(optimizer)
    trained = {p: p.detach().clone() for p in kept}
    try:
        _take(kept)
        yield
    finally:
        _take(trained)


def take_averages(optimizer: Optimizer) -> None:
    """The same for good: training can't go on from there."""
    _take(averages(optimizer))


@torch.no_grad()
def _take(weights: dict[Tensor, Tensor]) -> None:
    for p, own in weights.items():
        p.copy_(own)


# What equations are made of.


def decay(x: Tensor, group: dict[str, Any]) -> None:
    """Decoupled weight decay: x <- (1 - rate * decay) x."""
    x.mul_(1 - group["lr"] * group["weight_decay"])


def over(numbers: Tensor, x: Tensor) -> Tensor:
    """[K] as [K, 1, ...], to be multiplied with a stack."""
    return numbers.view(-1, *[1] * (x.ndim - 1))


def norms(x: Tensor) -> Tensor:
    """L2 norm of each tensor of a stack, [K, 1, ...]."""
    return over(torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1), x)
