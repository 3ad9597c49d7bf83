"""The norms of a step's gradient: L2 and L1, before it is clipped, and right however many values are added up."""

from __future__ import annotations

import pytest
import torch
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import nn

from truetune.training.gradient import accumulate, l1_of
from truetune.training.record import Step, as_json, from_json


def parameter(gradient: torch.Tensor | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(0 if gradient is None else gradient.shape))
    made.grad = gradient
    return made


def test_the_l1_norm_of_many_small_values_is_not_rounded_away() -> None:
    """5 M equal values: added up one by one in fp32, the sum is 2 % off."""
    gradients = [torch.full((5_000_000,), -1e-3), torch.randn(3, 5), torch.tensor(2.0)]
    exact = sum(g.double().abs().sum() for g in gradients)
    found = l1_of([*map(parameter, gradients), parameter(None)])
    assert found.dtype == torch.float64 and float(found) == pytest.approx(float(exact), rel=1e-6)


def test_without_a_gradient_the_norm_is_zero() -> None:
    assert float(l1_of([parameter(None)])) == 0


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_records_both_norms_before_clipping(clip: float | None) -> None:
    documents = random_documents(6)
    model = wrap(tiny("llama"), lora=True)
    trainer = tiny_trainer(model, documents, length={"steps": 1}, clip=clip)
    accumulate(model, trainer.objective, trainer.batches(0))
    every = torch.cat([p.grad.flatten() for p in model.trainable().values()]).double()
    model.zero_grad()
    (step,) = (record for record in trainer.steps() if isinstance(record, Step))
    assert step.gradient_norm == pytest.approx(float(every.norm(2)), rel=1e-5)
    assert step.gradient_norm_l1 == pytest.approx(float(every.norm(1)), rel=1e-5)
    assert step.gradient_norm > 1e-3


def test_a_record_of_before_there_was_an_l1_norm_is_read() -> None:
    step = Step(1, 2.0, 1e-3, 1e-3, 0.5, 10, 8, 1, 1, 0.1, 1000, 100.0, gradient_norm_l1=3.0)
    older = {key: value for key, value in as_json(step).items() if key != "gradient_norm_l1"}
    assert from_json(as_json(step)) == step
    found = from_json(older)
    assert isinstance(found, Step) and found.gradient_norm_l1 is None and found.gradient_norm == 0.5
