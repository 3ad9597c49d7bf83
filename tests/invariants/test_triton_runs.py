"""Training with every Triton kernel on equals training with the references: loss and weights of tiny models.

In the interpreter, on CPU tensors, by the product's own path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import exact
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor

from truetune.kernels.triton import KERNELS, equal, switched_on
from truetune.optim import OPTIMIZERS, parameter_groups
from truetune.training.record import Step


def run(
    family: str, lora: bool, steps: int, dtype: torch.dtype, optimizer: str, called: set[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the steps, and how far each weight went. called: is emptied when the model is there."""
    model = wrap(tiny(family), lora)
    (called or set()).clear()
    start = {n: p.detach().double() for n, p in model.trainable().items()}
    model.to(dtype)
    trainer = tiny_trainer(model, random_documents(60), rate=1e-2, length={"steps": steps})
    groups = parameter_groups(model.trainable().items(), 1e-2)
    options = {"smallest": 64} if optimizer == "adamw-8bit" else {}
    trainer.optimizer = OPTIMIZERS[optimizer](groups, 1e-2, weight_decay=0.01, **options)
    losses = [record.loss for record in trainer.steps() if isinstance(record, Step)]
    return torch.tensor(losses).double(), {n: p.detach().double() - start[n] for n, p in model.trainable().items()}


def noting(name: str, called: set[str]) -> Callable[..., Any]:
    """The kernel, which also notes that it was called."""
    kernel = equal(name)

    def noted(*arguments: Any, **options: Any) -> Any:
        called.add(name)
        return kernel(*arguments, **options)

    return noted


RUNS = [
    ("llama", True, 1, "adamw"),
    *(
        pytest.param(family, lora, 10, "adamw", marks=pytest.mark.proof)
        for family in ("llama", "qwen2")
        for lora in (False, True)
    ),
    pytest.param("llama", True, 3, "adamw-8bit", marks=pytest.mark.proof),
]


@pytest.mark.parametrize(("family", "lora", "steps", "optimizer"), RUNS)
def test_steps_with_every_kernel_are_the_reference_s(
    family: str, lora: bool, steps: int, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUETUNE_REFERENCE", "1")
    truth, true_moves = run(family, lora, steps, torch.float64, optimizer)
    plain, plain_moves = run(family, lora, steps, torch.float32, optimizer)
    monkeypatch.delenv("TRUETUNE_REFERENCE")
    called: set[str] = set()
    with monkeypatch.context() as patches, exact():
        for name in KERNELS:
            patches.setattr(sys.modules[equal(name).__module__], name, noting(name, called))
        with switched_on("cpu"):
            ours, our_moves = run(family, lora, steps, torch.float32, optimizer, called)
    left = {"newton_schulz", "adamw" if optimizer == "adamw-8bit" else "adamw_8bit"} | (
        set() if lora else {"lora_linear"}
    )
    assert called == KERNELS.keys() - left
    assert len(truth) == steps
    assert (ours - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()
    error, allowed = (
        sum(float((moves[n] - moved).square().sum()) for n, moved in true_moves.items()) ** 0.5
        for moves in (our_moves, plain_moves)
    )
    moved = sum(float(m.square().sum()) for m in true_moves.values()) ** 0.5
    # AdamW divides by the gradient's own size: where that is next to nothing, one element's rounding errors grow alone.
    assert error <= 2 * allowed + 1e-5 * moved, f"{error:.3g}, plain {allowed:.3g}, moved {moved:.3g}"
