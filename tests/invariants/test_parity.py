"""Truetune against the loop that a careful user would write with transformers, PEFT and torch alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch.nn import functional as F

from truetune.training.record import Step

STEPS = 20


def plain_losses(model, documents, stream, *, rate, clip, autocast):
    """One document at a time, logits from the model itself, sum over the step's targets, one AdamW step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, weight_decay=0.0)
    losses = []
    model.eval()  # no dropout is configured; evaluation mode makes sure of it
    for t in range(len(stream)):
        step = [documents[i] for i in stream.step(t)]
        count = sum(d.target_count for d in step)
        total = 0.0
        for d in step:
            ids = torch.tensor(d.tokens[None].astype("int64"))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            chosen = torch.tensor(d.targets[1:])
            loss = F.cross_entropy(logits.float()[chosen], ids[0, 1:][chosen], reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def both(family: str, lora: bool, bf16: bool):
    base = tiny(family)
    if lora and bf16:
        base = base.to(torch.bfloat16)
    documents = random_documents(160)
    plain = copy.deepcopy(base)
    model = wrap(base, lora, torch.bfloat16 if bf16 else torch.float32)
    if lora:
        targets = sorted(
            {n.rsplit(".", 1)[-1] for n, m in plain.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
            - {"lm_head"}
        )
        plain = get_peft_model(
            plain,
            LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=targets,
                task_type="CAUSAL_LM",
                fan_in_fan_out=family == "gpt2",
            ),
        )
        ours = model.trainable()
        assert {n for n, p in plain.named_parameters() if p.requires_grad} == set(ours)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if p.requires_grad:
                    p.copy_(ours[name])
    trainer = tiny_trainer(model, documents, length={"steps": STEPS}, clip=1.0)
    return trainer, plain, documents


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_fp32_losses_equal_a_plain_loop(family, lora):
    trainer, plain, documents = both(family, lora, bf16=False)
    theirs = plain_losses(plain, documents, trainer.stream, rate=1e-3, clip=1.0, autocast=False)
    ours = [r.loss for r in trainer.steps() if isinstance(r, Step)]
    assert len(ours) == STEPS
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_bf16_errs_no_more_than_twice_a_plain_bf16_loop(family, lora):
    trainer, plain, documents = both(family, lora, bf16=True)
    truth_model = copy.deepcopy(plain).float()
    arguments = {"rate": 1e-3, "clip": 1.0}
    truth = torch.tensor(plain_losses(truth_model, documents, trainer.stream, autocast=False, **arguments))
    theirs = torch.tensor(plain_losses(plain, documents, trainer.stream, autocast=True, **arguments))
    ours = torch.tensor([r.loss for r in trainer.steps() if isinstance(r, Step)])
    own, bound = (ours - truth).abs(), 2 * (theirs - truth).abs().mean()
    assert own.mean() <= bound + 1e-5 * truth.mean()
    assert own.max() <= 3 * bound + 1e-4 * truth.mean()
