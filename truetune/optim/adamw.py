"""AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101): torch's own fused step, on CPU and CUDA."""

from __future__ import annotations

from typing import Any

import torch


def adamw(
    groups: list[dict[str, Any]],
    rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101), torch's own fused step.

    ``rate`` and ``weight_decay`` hold where one of ``groups`` has none of its own.
    State: 8*m*n bytes.
    """
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
