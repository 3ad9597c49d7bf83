"""What goes around a rule, any rule: its rate found, its weights averaged or kept in length, its gradients held back.

Each is a rule that holds another, over the same groups. What it keeps lies beside what the inner one keeps, under names
of its own, and is taken out of sight while the inner one steps: to that nothing is around it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from truetune.kernels.op import statistics_dtype
from truetune.optim.low_rank import limit_growth
from truetune.optim.rule import AROUND, SHARED, Rule, State, averages, narrow, total_norm, wide

Kept = dict[Tensor, State]


class Around(Rule):
    """A rule around ``inner``, which may be any optimizer of torch's kind.

    own: the name that begins the keys of what it keeps.
    """

    own: ClassVar[str]
    steps_apart = False

    def __init__(self, inner: Optimizer) -> None:
        Optimizer.__init__(self, inner.param_groups, {})
        self.inner = inner
        self.waits = getattr(inner, "waits", 0)
        for trait in ("averages_weights", "finds_rate", "sees_loss"):
            setattr(self, trait, getattr(inner, trait, False) or getattr(type(self), trait))

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        """What is kept of one parameter, from before its first step. Must allow ``meta`` tensors."""
        return {}

    def before(self, kept: Kept, joint: State) -> None:
        """Before the inner step; ``kept`` of each parameter that had a gradient ever, ``joint`` of all together."""

    def after(self, kept: Kept, joint: State) -> None:
        """After it; what is put into either is kept."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        kept, joint = self._lend()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in kept and (new := self.start(p, group)):
                    kept[p] = new
        self.before(kept, joint)
        loss: float | None = self.inner.step(closure)
        self.after(kept, joint)
        self.state = self.inner.state
        for p, state in kept.items():
            self.state[p] |= {f"{AROUND}{self.own}_{name}": tensor for name, tensor in state.items()}
        self.state[self.param_groups[0]["params"][0]] |= {
            f"{SHARED}{self.own}_{name}": tensor for name, tensor in joint.items()
        }
        return loss

    def _lend(self) -> tuple[Kept, State]:
        """Give groups and state to the inner one, less what is kept here, which is the answer."""
        kept: Kept = {}
        joint: State = {}
        rest: defaultdict[Tensor, State] = defaultdict(dict)
        each, all_ = f"{AROUND}{self.own}_", f"{SHARED}{self.own}_"
        for p in (p for group in self.param_groups for p in group["params"]):  # sums keep their order over a resume
            for key, tensor in self.state.get(p, {}).items():
                if key.startswith(each):
                    kept.setdefault(p, {})[key.removeprefix(each)] = tensor
                elif key.startswith(all_):
                    joint[key.removeprefix(all_)] = tensor
                else:
                    rest[p][key] = tensor
        self.inner.param_groups, self.inner.state = self.param_groups, rest
        return kept, joint

    def averages(self) -> dict[Tensor, Tensor]:
        self._lend()
        return averages(self.inner)

    def state_bytes(self) -> int:
        own = sum(
            tensor.nbytes
            for group in self.param_groups
            for p in group["params"]
            for tensor in self.start(torch.empty_like(p, device="meta"), group).values()
        )
        return own + state_bytes(self.inner)


def state_bytes(optimizer: Optimizer) -> int:
    """``Rule.state_bytes`` of any optimizer; of one that is no rule, two moments of each parameter."""
    if isinstance(optimizer, Rule):
        return optimizer.state_bytes()
    return 2 * sum(
        p.numel() * statistics_dtype(p.dtype).itemsize for group in optimizer.param_groups for p in group["params"]
    )


class Mechanic(Around):
    """A rule's rate found while it runs (Cutkosky, Defazio & Mehta 2023, arXiv 2306.00144).

    The sum D of what the rule, at its own rate, would have moved is multiplied by a scale: x = x0 + S D, S = s_1 + ...
    + s_6. Each s_i has b = 1 - 0.1^i, and over all parameters h = -<g + decay S (|g| / |x|) x, D>: r <- b r + s h, h
    within m on both sides; m <- max(b m, |h|); v <- b^2 v + h^2; s <- (first m / 6 + max(r, 0)) / sqrt(v). As the
    authors' version in JAX, but D is kept where that divides x - x0 by S, which in fp32 may be nothing.
    State: 8*m*n bytes.
    """

    own = "mechanic"
    finds_rate = True

    first, decay, eps, count = 1e-6, 1e-2, 1e-8, 6

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"x0": wide(x).clone(), "D": torch.zeros_like(wide(x))}

    def before(self, kept: Kept, joint: State) -> None:
        if not kept:
            return
        xs = list(kept)
        if not joint:
            zeros = torch.zeros(self.count, dtype=torch.float64, device=xs[0].device)
            joint |= {"s": zeros + self.first, "m": zeros.clone(), "v": zeros.clone(), "r": zeros.clone()}
        s, m, v, r = (joint[name] for name in "smvr")
        b = 1 - 0.1 ** torch.arange(1, self.count + 1, dtype=s.dtype, device=s.device)
        scale = s.sum()
        gradients = [p.grad for p in xs if p.grad is not None]
        length, size = (total_norm(tensors).to(s) for tensors in (gradients, xs))
        pull = self.decay * scale * length / (size + self.eps)
        moved = scale / (scale + self.eps)
        h = torch.zeros_like(scale)
        for x, state in kept.items():
            along = state["D"].mul_(moved)
            # No torch.dot: its bits hang on where in memory the tensors lie, which is another place after a resume.
            h -= pull * (x * along).sum(dtype=h.dtype)
            if x.grad is not None:
                h -= (x.grad * along).sum(dtype=h.dtype)
            state["D"].sub_(x)  # and the weights after the step are added
        r.mul_(b).add_(s * h.clamp(-m, m))
        m.copy_(torch.maximum(b * m, h.abs() + self.eps))
        v.mul_(b * b).add_(h * h)
        s.copy_((self.first / self.count * m + r.clamp(min=0)) / (v.sqrt() + self.eps))

    def after(self, kept: Kept, joint: State) -> None:
        for x, state in kept.items():
            state["D"].add_(x)
            x.copy_(state["x0"] + joint["s"].sum() * state["D"])  # to the nearest: the sum is kept in full


class EMA(Around):
    """The weights' exponential average, which is evaluated and kept in their place (Polyak & Juditsky 1992).

    Step i of t counts decay^(t - i), all divided by their sum, so that a short run's average is no less one.
    State: 4*m*n bytes.
    """

    own = "ema"
    averages_weights = True

    def __init__(self, inner: Optimizer, decay: float) -> None:
        super().__init__(inner)
        self.decay = decay

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {"average": wide(x).clone()}

    def after(self, kept: Kept, joint: State) -> None:
        steps = joint["steps"] = joint.get("steps", torch.zeros(())).cpu() + 1  # the host must know it
        share = (1 - self.decay) / (1 - self.decay ** int(steps))
        for x, state in kept.items():
            state["average"].lerp_(wide(x), share)

    def averages(self) -> dict[Tensor, Tensor]:
        kept, _ = self._lend()
        return {p: state["average"] for p, state in kept.items()}


class NaP(Around):
    """Hidden matrices brought back to the length they began with after every step (Lyle et al. 2024, arXiv 2407.01800).

    W <- W |W_0| / |W|, Frobenius; of experts each matrix by itself; one that began at 0 is free. Where a norm follows,
    what a matrix computes does not change, and how far a step turns it hangs on the rate alone. Left out: the paper's
    norms before each non-linearity, which the model has or has not, and its pull on their scales and offsets.
    State: 4 bytes.
    """

    own = "nap"

    def __init__(self, inner: Optimizer, matrices: Collection[Tensor]) -> None:
        super().__init__(inner)
        self.matrices = matrices

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        is_matrix = any(x is matrix for matrix in self.matrices)
        return {"length": torch.linalg.matrix_norm(wide(x), keepdim=True)} if is_matrix else {}

    def after(self, kept: Kept, joint: State) -> None:
        for place, (x, state) in enumerate(kept.items()):
            new = wide(x)
            now = torch.linalg.matrix_norm(new, keepdim=True)
            new.mul_(torch.where((now > 0) & (state["length"] > 0), state["length"] / now, 1.0))
            if new.dtype != x.dtype:  # by another seed than the rule's
                steps = int(self.inner.state[x]["step"])
                x.copy_(narrow(new, x.dtype, -1 - steps * len(kept) - place))

    def state_bytes(self) -> int:
        return sum(x[..., 0, 0].numel() * statistics_dtype(x.dtype).itemsize for x in self.matrices) + state_bytes(
            self.inner
        )


class Growth(Around):
    """All gradients scaled so that their norm grows by a factor at most from step to step (Chen et al. 2024, arXiv
    2410.01623, Fira's limiter).

    State: 0 bytes.
    """

    own = "growth"

    def __init__(self, inner: Optimizer, growth: float) -> None:
        super().__init__(inner)
        self.growth = growth

    def before(self, kept: Kept, joint: State) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = total_norm(gradients)
        factor = limit_growth(norm, joint.get("norm", torch.zeros_like(norm)), self.growth)
        torch._foreach_div_(gradients, factor)
        joint["norm"] = norm / factor
