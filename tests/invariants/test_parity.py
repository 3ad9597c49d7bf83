"""Truetune against the loop that a careful user would write with transformers, PEFT and torch alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from parity import STEPS, plain_losses
from peft import LoraConfig, get_peft_model
from tiny import random_documents, tiny, tiny_trainer, wrap

from truetune.training.record import Step

ADAPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (our options, PEFT's)
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora, rslora": ({"dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa, rslora": ({"init": "pissa", "rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}),
}
FAMILIES = ("llama", "qwen2", "gpt2")
SHORT = {("llama", "dora"), ("gpt2", "dora"), ("qwen2", "pissa"), ("gpt2", "pissa, rslora")}
"""Beside full training and LoRA, which are tried on each; the rest is for ``make proof``."""
CASES = [
    pytest.param(f, m, marks=() if m in ("full", "lora") or (f, m) in SHORT else pytest.mark.proof)
    for f in FAMILIES
    for m in ("full", *ADAPTED)
]


def with_peft(base: Any, family: str, method: str) -> Any:
    """The same adapter as a user of PEFT makes it; over PiSSA's residual, where ours keeps the whole weight."""
    targets = sorted(
        {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        - {"lm_head"}
    )
    options = {"target_modules": targets, "fan_in_fan_out": family == "gpt2", "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options, **ADAPTED[method][1]))


def both(family: str, method: str, bf16: bool) -> tuple[Any, ...]:
    """Our trainer, what plain PEFT makes of the same base, the same in fp32 throughout, and documents."""
    base = tiny(family)
    documents = random_documents(160)
    dtype = torch.bfloat16 if bf16 else torch.float32
    if method == "full":
        trainer = tiny_trainer(wrap(copy.deepcopy(base), dtype=dtype), documents, length={"steps": STEPS}, clip=1.0)
        return trainer, copy.deepcopy(base), base, documents
    base = base.to(dtype)
    plain = with_peft(copy.deepcopy(base), family, method)
    truth = with_peft(copy.deepcopy(base).float(), family, method)
    model = wrap(base, True, dtype, **ADAPTED[method][0])
    ours = model.trainable()
    for theirs in (plain, truth):
        parameters = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
        assert parameters.keys() == ours.keys()
        for name, p in parameters.items():
            if "pissa" in method:  # what no seed draws is the same without being copied, but for PEFT's rounding
                assert torch.allclose(p, ours[name], atol=1e-5 if theirs is truth else 1e-2)
            p.data.copy_(ours[name])
    trainer = tiny_trainer(model, documents, length={"steps": STEPS}, clip=1.0)
    return trainer, plain, truth, documents


@pytest.mark.parametrize(("family", "method"), CASES)
def test_fp32_losses_equal_a_plain_loop(family: str, method: str) -> None:
    trainer, plain, _, documents = both(family, method, bf16=False)
    theirs = plain_losses(plain, documents, trainer.stream, rate=1e-3, clip=1.0, autocast=False)
    before = {n: p.detach().clone() for n, p in trainer.model.trainable().items()}
    ours = [r.loss for r in trainer.steps() if isinstance(r, Step)]
    assert not any(torch.equal(p, before[n]) for n, p in trainer.model.trainable().items()), "it was not trained"
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_bf16_errs_no_more_than_twice_a_plain_bf16_loop(family: str, method: str) -> None:
    trainer, plain, truth_model, documents = both(family, method, bf16=True)
    arguments = {"rate": 1e-3, "clip": 1.0}
    truth = torch.tensor(plain_losses(truth_model, documents, trainer.stream, autocast=False, **arguments))
    theirs = torch.tensor(plain_losses(plain, documents, trainer.stream, autocast=True, **arguments))
    ours = torch.tensor([r.loss for r in trainer.steps() if isinstance(r, Step)])
    own, bound = (ours - truth).abs(), 2 * (theirs - truth).abs().mean()
    assert own.mean() <= bound + 1e-5 * truth.mean()
    assert own.max() <= 3 * bound + 1e-4 * truth.mean()
