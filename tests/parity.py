"""A run of ours beside the loop that a careful user would write with transformers, PEFT and torch alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from truetune.data.batch import Document
from truetune.data.stream import Stream
from truetune.training.record import Step
from truetune.training.trainer import Trainer

STEPS, RATE, CLIP = 20, 1e-3, 1.0


def plain_losses(
    model: nn.Module,
    documents: Sequence[Document],
    stream: Stream,
    *,
    rate: float = RATE,
    clip: float = CLIP,
    autocast: bool = False,
) -> list[float]:
    """One document at a time, logits from the model itself, sum over the step's targets, one AdamW step.

    The router loss, where the model's config asks for it, is the model's own of each document, weighted by its targets.
    """
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
                out = model(input_ids=ids, use_cache=False)
            chosen = torch.tensor(d.targets[1:])
            loss = F.cross_entropy(out.logits[0, :-1].float()[chosen], ids[0, 1:][chosen], reduction="sum")
            total += float(loss.detach()) / count
            if getattr(out, "aux_loss", None) is not None:
                loss = loss + model.config.router_aux_loss_coef * d.target_count * out.aux_loss
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def both(family: str, lora: bool, bf16: bool) -> tuple[Trainer, nn.Module, list[Document]]:
    """The same start for both: our trainer, the plain model, and the documents."""
    base = tiny(family)
    if lora and bf16:
        base = base.to(torch.bfloat16)
    documents = random_documents(160)
    plain: nn.Module = copy.deepcopy(base)
    model = wrap(base, lora, torch.bfloat16 if bf16 else torch.float32)
    if lora:
        linears = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != model.tail.head}
        targets = sorted(n for n in linears if any(f".{n}.lora_A." in name for name in model.trainable()))
        assert {n.rsplit(".", 1)[-1] for n in linears.keys() - targets} == FAMILIES[family].unadapted
        conv = any(isinstance(m, Conv1D) for m in linears.values())
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=conv)
        plain = get_peft_model(plain, config)
        ours = model.trainable()
        assert {n for n, p in plain.named_parameters() if p.requires_grad} == set(ours)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                if p.requires_grad:
                    p.copy_(ours[name])
    return tiny_trainer(model, documents, rate=RATE, length={"steps": STEPS}, clip=CLIP), plain, documents


def our_losses(trainer: Trainer) -> list[float]:
    return [record.loss for record in trainer.steps() if isinstance(record, Step)]


def fp32_deviation(family: str, lora: bool) -> tuple[float, str]:
    """The largest relative difference of a step's loss from the plain loop's, and the route that was taken."""
    trainer, plain, documents = both(family, lora, bf16=False)
    theirs = Tensor(plain_losses(plain, documents, trainer.stream))
    before = {n: p.detach().clone() for n, p in trainer.model.trainable().items()}
    ours = Tensor(our_losses(trainer))
    assert len(ours) == STEPS
    assert not any(torch.equal(p, before[n]) for n, p in trainer.model.trainable().items()), "it was not trained"
    return float(((ours - theirs) / theirs).abs().max()), trainer.model.route.name


def bf16_errors(family: str, lora: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ours and the plain bf16 loop's differences from the plain fp32 loop in every step, and that loop's losses."""
    trainer, plain, documents = both(family, lora, bf16=True)
    truth = Tensor(plain_losses(copy.deepcopy(plain).float(), documents, trainer.stream))
    theirs = Tensor(plain_losses(plain, documents, trainer.stream, autocast=True))
    ours = Tensor(our_losses(trainer))
    return (ours - truth).abs(), (theirs - truth).abs(), truth


def within(ours: Tensor, theirs: Tensor, truth: Tensor) -> bool:
    """Whether our error in bf16 is at most twice the plain loop's, in the mean and in the worst step.

    Steps differ less where nothing jumps; where the plain loop's do (a router that chooses otherwise), so may ours.
    """
    bound = 2 * theirs.mean()
    worst = max(3 * bound, 2 * theirs.max())
    return bool(ours.mean() <= bound + 1e-5 * truth.mean() and ours.max() <= worst + 1e-4 * truth.mean())
