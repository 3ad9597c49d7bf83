"""Adam's moments in 8 bits, by blocks, and two rules that keep them so (Dettmers et al. 2021, arXiv 2110.02861).

Each block of a tensor is divided by its largest absolute value and rounded to the nearest of the 256 values of
``kernels.adamw_8bit``: seven decades, the upper the finer, so that small moments are not lost beside large ones.
Moments are read, updated and rounded again at every step; small tensors keep theirs in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truetune.kernels.adamw_8bit import adamw_8bit, pack, unpack
from truetune.optim.low_rank import GaLore, LowRank
from truetune.optim.rule import Betas, Groups, Rule, State, adamw_step, direction, require

SIGNED = {"m": True, "v": False}
ZERO = {"m": 127, "v": 0}
"""The place of 0 in each code."""


def packed_zeros(x: Tensor, group: dict[str, Any]) -> State:
    """m and v of a stack like ``x``: codes and scales, or themselves where it has few elements."""
    if x[0].numel() < group["smallest"]:
        return {name: torch.zeros_like(x) for name in SIGNED}
    blocks = -(-x[0].numel() // group["block"])
    state = {}
    for name, zero in ZERO.items():
        state[name] = torch.full((len(x), blocks, group["block"]), zero, dtype=torch.uint8, device=x.device)
        state[f"{name}_scale"] = x.new_zeros(len(x), blocks)
    return state


def adam_8bit(g: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """``rule.direction`` of a stack with packed moments."""
    if "m_scale" not in state:
        return direction(g, state, group)
    full = {name: unpack(state[name], state[f"{name}_scale"], signed, g) for name, signed in SIGNED.items()}
    step = direction(g, full, group)
    for name, signed in SIGNED.items():
        state[name], state[f"{name}_scale"] = pack(full[name], signed, group["block"])
    return step


def require_blocks(block: int, smallest: int) -> None:
    require("block", block > 0, "an integer above 0")
    require("smallest", smallest > 0, "an integer above 0")


class AdamW8bit(Rule):
    """AdamW whose moments are kept in 8 bits, by blocks (Dettmers et al. 2021, arXiv 2110.02861).

    The step is taken with the moments before they are rounded. Tensors of fewer than ``smallest`` elements keep theirs
    in full.
    State: 520*ceil(m*n / 256) bytes.
    """

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        block: int = 256,
        smallest: int = 4096,
    ) -> None:
        require_blocks(block, smallest)
        super().__init__(groups, rate, betas=betas, eps=eps, weight_decay=weight_decay, block=block, smallest=smallest)

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        return packed_zeros(x, group)

    def move(self) -> None:
        for parameters, gradients, states, told, group in self.lists():
            options: dict[str, Any] = {"betas": group["betas"], "eps": group["eps"]}
            for packed in (True, False):
                at = [i for i, state in enumerate(states) if ("m_scale" in state) == packed]
                if not at:
                    continue
                xs, gs, own = [parameters[i] for i in at], [gradients[i] for i in at], [states[i] for i in at]
                these = told | {"seeds": [told["seeds"][i] for i in at]}
                if packed:
                    kept = [[state[name] for state in own] for name in ("m", "m_scale", "v", "v_scale")]
                    adamw_8bit(xs, gs, kept[0], kept[1], kept[2], kept[3], **options, **these)
                else:
                    adamw_step(xs, gs, own, these, group, **options)


class GaLore8bit(GaLore):
    """GaLore whose low-rank moments are kept in 8 bits (Zhao et al. 2024, arXiv 2403.03507; Dettmers et al. 2021).

    The projection itself stays in full.
    State: 4*m*r + 520*ceil(n*r / 256) bytes.
    """

    adam = staticmethod(adam_8bit)

    def __init__(
        self,
        groups: Groups,
        rate: float,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        block: int = 256,
        smallest: int = 4096,
    ) -> None:
        require_blocks(block, smallest)
        LowRank.__init__(
            self,
            groups,
            rate,
            rank=rank,
            gap=gap,
            scale=scale,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            block=block,
            smallest=smallest,
        )

    def start(self, x: Tensor, group: dict[str, Any]) -> State:
        whole = super().start(x, group)
        return {"Q": whole["Q"]} | packed_zeros(whole["m"], group)
