"""The one step loop of all rules that torch does not have, or not as their papers do.

A rule is its equation, ``update``, and the zeros that it starts from, ``start``. Both see *stacks*: K parameters of
equal shape as one tensor [K, *shape], so that a hundred small tensors are one sequence of operations, and matrices of
equal shape one batched product. A large tensor is a stack of its own, seen in place; of small ones the state lies
stacked in memory and each parameter's is a view of it, while weights and gradients are copied together.

Parameters that a rule does not take (``takes``; groups marked ``rest``) are updated by AdamW at its defaults, in the
same optimizer, and as lists: AdamW is an operation of ``kernels``, of many tensors at once. Weights in bf16 and their
gradients are seen in fp32, the state is fp32, and what comes of a step is rounded stochastically, by the number of the
step and the parameter's place (``kernels.rounding``). Equations use the names of the field: x weights, g gradient, m
and v moments, t the number of the step, from 1. Left out: closures that are called more than once, sparse and complex
tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from truetune.errors import UserError
from truetune.kernels.adamw import adamw
from truetune.kernels.op import statistics_dtype
from truetune.kernels.rounding import stochastic
from truetune.optim.groups import KINDS

Groups = list[dict[str, Any]]
Betas = tuple[float, float]
State = dict[str, Tensor]
Stack = tuple[Tensor, Tensor, int, State, dict[str, Any]]
"""x and g [K, *shape], t, state [K, ...] each, and the options of the group."""
List = tuple[list[Tensor], list[Tensor], list[State], dict[str, Any], dict[str, Any]]
"""Parameters of one dtype, their gradients, the state of each, what an operation of ``kernels`` is told beside them
(rate, decay, step, a seed for each), and the options of the group."""

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
    probes: whether it takes no gradients, but has ``probe`` called with a function that computes the loss.
    Raises UserError for an option out of its range.
    """

    takes: ClassVar[tuple[str, ...]] = KINDS
    waits: int = 0
    averages_weights: bool = False
    finds_rate: bool = False
    sees_loss: bool = False
    probes: bool = False
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
        self.move()
        for listed in self.lists(rest=True):
            adamw_step(*listed)
        return loss

    def move(self) -> None:
        """Change what the rule takes: stack by stack, unless it has an operation of many tensors."""
        for x, g, t, state, group in self.stacks():
            self.update(x, g, t, state, group)

    def stacks(self) -> Iterator[Stack]:
        """Every stack with a gradient; what is done to one is written back before the next."""
        places = self._places()
        for group in self.param_groups:
            alike: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and not group["rest"]:
                    alike[p.shape, p.dtype, p.device, int(self.state[p]["step"])].append(p)
            for (shape, _, device, t), parameters in alike.items():
                most = max(1, STACKED.get(device.type, STACKED["cpu"]) // max(1, shape.numel()))
                for first in range(0, len(parameters), most):
                    seed = t * len(places) + places[parameters[first]]
                    yield from self._stack(parameters[first : first + most], t, group, seed)

    def lists(self, rest: bool = False) -> Iterator[List]:
        """All with a gradient, as lists; rest: what the rule does not take, in its place."""
        places = self._places()
        for group in self.param_groups:
            alike: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and group["rest"] == rest:
                    alike[p.dtype, p.device, int(self.state[p]["step"])].append(p)
            for (_, _, t), parameters in alike.items():
                for p in parameters:
                    if not _names(self.state[p]):
                        new = self._start(wide(p).unsqueeze(0), group)
                        self.state[p] |= {name: tensor.squeeze(0) for name, tensor in new.items()}
                told = {"rate": group["lr"], "weight_decay": group.get("weight_decay", 0.0), "step": t}
                told["seeds"] = [t * len(places) + places[p] for p in parameters]
                gradients = [p.grad for p in parameters if p.grad is not None]
                yield [p.detach() for p in parameters], gradients, [self.state[p] for p in parameters], told, group

    def _places(self) -> dict[Tensor, int]:
        return {p: place for place, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def _stack(self, parameters: list[Tensor], t: int, group: dict[str, Any], seed: int) -> Iterator[Stack]:
        kept = _together([p.detach() for p in parameters])
        x, g = wide(kept), wide(_together([p.grad for p in parameters if p.grad is not None]))
        states = [self.state[p] for p in parameters]
        state = {name: _together([own[name] for own in states]) for name in _names(states[0])}
        state = state or self._start(x, group)
        yield x, g, t, state, group
        if len(parameters) > 1 or x is not kept:
            torch._foreach_copy_(parameters, list(narrow(x, kept.dtype, seed).unbind()))
        for name, tensor in state.items():
            for own, part in zip(states, tensor.unbind(), strict=True):
                own[name] = part

    def _start(self, x: Tensor, group: dict[str, Any]) -> State:
        return moments(x) if group["rest"] else self.start(x, group)

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
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state["step"].cpu() if "step" in state else torch.zeros(())
                    counts.append(state["step"])
        if counts:
            torch._foreach_add_(counts, 1)

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
                meta = torch.empty((1, *p.shape), dtype=statistics_dtype(p.dtype), device="meta")
                total += sum(tensor.nbytes for tensor in self._start(meta, group).values())
        return total


def _names(state: State) -> list[str]:
    """Of what a rule keeps of one parameter, beside its count of steps and what all share."""
    return [name for name in state if name != "step" and not name.startswith(SHARED)]


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


def wide(x: Tensor) -> Tensor:
    """What a rule computes with: ``x`` itself, or in fp32 where it is less."""
    return x.detach().to(statistics_dtype(x.dtype))


def narrow(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """The other way: to bf16 stochastically, by ``seed``."""
    return stochastic(x, seed) if dtype == torch.bfloat16 else x.to(dtype)


def moments(x: Tensor) -> State:
    """Adam's, before its first step."""
    return {"m": torch.zeros_like(x), "v": torch.zeros_like(x)}


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    told: dict[str, Any],
    _: dict[str, Any],
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of a list by AdamW, at the group's rate and decay."""
    lists = ([state[name] for state in states] for name in "mv")
    adamw(parameters, gradients, *lists, betas=betas, eps=eps, **told)


def total_norm(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Norm of all together, in fp32 at least, a tensor without a dimension."""
    alike: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.dtype].append(tensor)
    each = [n for dtype, ts in alike.items() for n in torch._foreach_norm(ts, order, statistics_dtype(dtype))]
    return torch.linalg.vector_norm(torch.stack(each), order) if each else torch.zeros(())


def direction(g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """Adam's m / (sqrt(v) + eps) of a stack, with moments that see ``g``; the correction of their bias is left out."""
    (b1, b2), m, v = group["betas"], state["m"], state["v"]
    m.lerp_(g, 1 - b1)
    root = v.mul_(b2).addcmul_(g, g, value=1 - b2).sqrt().add_(group["eps"])
    return torch.div(m, root, out=root)


def decay(x: Tensor, group: dict[str, Any]) -> None:
    """Decoupled weight decay: x <- (1 - rate * decay) x."""
    if group["weight_decay"]:
        x.mul_(1 - group["lr"] * group["weight_decay"])


def over(numbers: Tensor, x: Tensor) -> Tensor:
    """[K] as [K, 1, ...], to be multiplied with a stack."""
    return numbers.view(-1, *[1] * (x.ndim - 1))


def norms(x: Tensor) -> Tensor:
    """L2 norm of each tensor of a stack, [K, 1, ...]."""
    return over(torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1), x)
