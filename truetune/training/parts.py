"""The optimizer's step within the backward pass: what has its whole gradient moves at once, and the gradient is freed.

So that a part of the gradient is held in place of all of it (Lv et al. 2023, LOMO, arXiv 2306.09782, for SGD). It asks
for a step of one micro-batch, since a gradient is whole in its last one alone; for no clipping, which needs the norm of
all of it first; and for a rule that updates each tensor by its own gradient alone (``optim.steps_apart``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

PART = 1 << 25
"""Bytes of gradients that wait for each other: enough for rules that batch tensors of equal shape."""


@contextmanager
def by_parts(parameters: Sequence[nn.Parameter], move: Callable[[Sequence[nn.Parameter]], None]) -> Iterator[None]:
    """In a backward pass within, ``move`` is called with those whose gradients are whole, which it must free, whenever
    they have grown to ``PART``; and at its end with the last."""
    whole: list[nn.Parameter] = []

    def flush() -> None:
        part = whole.copy()
        whole.clear()
        move(part)

    def collect(p: nn.Parameter) -> None:
        whole.append(p)
        if sum(p.grad.nbytes for p in whole if p.grad is not None) >= PART:
            flush()

    handles = [p.register_post_accumulate_grad_hook(collect) for p in parameters]
    try:
        yield
        if whole:
            flush()
    finally:
        for handle in handles:
            handle.remove()
