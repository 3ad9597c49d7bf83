"""Rules that take no gradient: losses at weights moved to and fro say how it falls along one random direction.

The direction is drawn tensor by tensor from the seed of the run, the number of the step and the tensor's place, and
drawn again whenever it is needed, so that it is never kept. The trainer asks for it by ``probe``, before ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from truetune.optim.rule import Groups, Rule, State, decay, require

LAST = 1 << 63
"""Below it are seeds."""


class MeZO(Rule):
    """SGD along a random direction z, by two losses in the memory of inference (Malladi et al. 2023, arXiv 2305.17333).

    g = (loss(x + radius z) - loss(x - radius z)) / (2 radius), z normal; x <- x - rate (g z + decay x). As the paper's
    runs: without dropout, in place, x + radius z, - 2 radius z, + radius z, which finds each weight again but for a
    rounding or two of fp32. The gradient that is recorded is its estimate g z, whose length is that of the gradient
    times about sqrt(number of weights), so rates are small: 1e-6, or 1e-4 and a radius of 1e-2 for LoRA.
    State: 0 bytes.
    """

    probes = True
    steps_apart = False

    def __init__(self, groups: Groups, rate: float, *, radius: float = 1e-3, weight_decay: float = 0.0) -> None:
        require("radius", radius > 0, "a small positive number")
        super().__init__(groups, rate, radius=radius, weight_decay=weight_decay)
        self.slope: Tensor | None = None
        self.lengths: tuple[Tensor, Tensor] | None = None

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return {}

    @torch.no_grad()
    def probe(self, loss: Callable[[], Tensor]) -> None:
        """Find the slope along the next step's direction; ``loss`` computes it at the weights as they are."""
        radius = self.defaults["radius"]
        l2, l1 = [], []
        for p, z, _ in self._directions():
            l2.append(torch.linalg.vector_norm(z, dtype=torch.float64).square())
            l1.append(torch.linalg.vector_norm(z, 1, dtype=torch.float64))
            p.add_(z, alpha=radius)
        above = loss()
        self._move(-2 * radius)
        below = loss()
        self._move(radius)
        self.slope = (above - below) / (2 * radius)
        size = self.slope.abs()
        self.lengths = size * torch.stack(l2).sum().sqrt(), size * torch.stack(l1).sum()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Along the direction that was probed. Raises TypeError if none was."""
        if self.slope is None:
            raise TypeError("MeZO steps along what it has probed; call probe with a function that computes the loss")
        for p, z, group in self._directions():
            decay(p, group)
            p.sub_(z.mul_(group["lr"] * self.slope.to(z.dtype)))
        for p, _ in self._members():
            self.state[p]["step"] = self.state[p].get("step", torch.zeros(())).cpu() + 1
        self.slope = self.lengths = None
        return None

    def _members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _directions(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Each parameter with its part of z, which is the caller's, and its group."""
        members = list(self._members())
        for place, (p, group) in enumerate(members):
            number = int(self.state[p].get("step", 0)) * len(members) + place
            generator = torch.Generator(p.device).manual_seed((torch.initial_seed() * 1_000_003 + number) % LAST)
            yield p, torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator), group

    def _move(self, by: float) -> None:
        for p, z, _ in self._directions():
            p.add_(z, alpha=by)
