"""Tiny random models of several families and random documents: what the invariants are tried on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from families import FAMILIES, VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from truetune.data.batch import Document
from truetune.data.stream import Stream
from truetune.models.adapt import add_lora
from truetune.models.precision import keep_sums_in_fp32
from truetune.models.route import choose_route
from truetune.models.router import choose_router
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.optim import OPTIMIZERS, parameter_groups
from truetune.schedules import SCHEDULES
from truetune.training.trainer import Trainer

QUICK = ("falcon alibi", "gemma2", "gpt2", "llama", "mistral", "qwen2")
"""Families that every commit is tried on: between them both routes, windows, soft caps, biases and tied heads."""


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of ``family``, every parameter perturbed so that none is at a special value."""
    torch.manual_seed(seed)
    chosen = FAMILIES[family]
    config = CONFIG_MAPPING[chosen.model_type](**(copy.deepcopy(chosen.config) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def random_documents(count: int, seed: int = 0, longest: int = 40) -> list[Document]:
    """Ragged documents whose targets are ragged too; each has at least one."""
    generator = np.random.default_rng(seed)
    documents = []
    for row in range(count):
        length = int(generator.integers(2, longest))
        tokens = generator.integers(3, VOCABULARY, length).astype(np.int32)
        targets = generator.random(length) < generator.random()
        targets[0], targets[-1] = False, True
        documents.append(Document(tokens, targets, row))
    return documents


def wrap(model: PreTrainedModel, lora: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    tail = measure_tail(model)
    route = choose_route(model, tail.decoder)
    if not lora:
        return CausalLM(model, tail, route, dtype)
    torch.manual_seed(1)
    chosen = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear"} | options
    adapted = add_lora(model, tail.head, **chosen)
    if dtype != torch.float32:
        keep_sums_in_fp32(model)
    return CausalLM(adapted, tail, route, dtype)


def tiny_trainer(
    model: CausalLM,
    documents: Sequence[Document],
    *,
    rate: float = 1e-3,
    ratio: float = 1.0,
    schedule: str = "constant",
    tokens_per_step: int = 120,
    tokens_per_micro_batch: int = 64,
    length: dict[str, float] | None = None,
    **parts: Any,
) -> Trainer:
    lengths = [len(d) for d in documents]
    stream = Stream(lengths, tokens_per_step, tokens_per_micro_batch, 0, **(length or {"epochs": 1.0}))  # type: ignore[arg-type]
    groups = parameter_groups(model.trainable().items(), rate, ratio)
    return Trainer(
        model=model,
        objective=NextToken(choose_router(model)),
        optimizer=OPTIMIZERS["adamw"](groups, rate),
        schedule=SCHEDULES[schedule](len(stream)),
        documents=documents,
        stream=stream,
        **parts,
    )
