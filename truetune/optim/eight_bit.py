"""Adam's moments in 8 bits, by blocks, and two rules that keep them so (Dettmers et al. 2021, arXiv 2110.02861).

Each block of a tensor is divided by its largest absolute value and rounded to the nearest of the 256 values of
``kernels.adamw_8bit``: seven decades, the upper the finer, so that small moments are not lost beside large ones.
Moments are read, updated and rounded again at every step; small tensors keep theirs in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from truetune.kernels.adamw_8bit import dynamic_map
from truetune.optim.low_rank import GaLore, LowRank, corrected
from truetune.optim.rule import Betas, Groups, Rule, State, decay, direction, require


def pack(x: Tensor, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Codes [K, blocks, block] and scales [K, blocks] of a stack; the last block is filled up with zeros."""
    flat = x.reshape(len(x), -1)
    blocks = F.pad(flat, (0, -flat.shape[1] % block)).view(len(x), -1, block)
    scales = blocks.abs().amax(-1)
    _, middles = dynamic_map(signed, x.device, x.dtype)
    whole = torch.where(scales > 0, scales, 1.0)
    return torch.bucketize(blocks / whole[..., None], middles).to(torch.uint8), scales


def unpack(codes: Tensor, scales: Tensor, signed: bool, like: Tensor) -> Tensor:
    """The stack again, of the shape and dtype of ``like``."""
    values, _ = dynamic_map(signed, like.device, like.dtype)
    return (values[codes.int()] * scales[..., None]).view(len(like), -1)[:, : like[0].numel()].view(like.shape)


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

    The step is taken with the moments before they are rounded; eps is added to sqrt(v) before its bias is corrected.
    Tensors of fewer than ``smallest`` elements keep theirs in full.
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

    def update(self, x: Tensor, g: Tensor, t: int, state: State, group: dict[str, Any]) -> None:
        decay(x, group)
        x.sub_(adam_8bit(g, state, group), alpha=corrected(t, group))


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
