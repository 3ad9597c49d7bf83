"""Tiny random models of several families and random documents: what the invariants are tried on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from truetune.data.batch import Document
from truetune.data.stream import Stream
from truetune.models.adapt import add_lora
from truetune.models.precision import keep_sums_in_fp32
from truetune.models.route import choose_route
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.optim import OPTIMIZERS, parameter_groups
from truetune.schedules import SCHEDULES
from truetune.training.trainer import Trainer

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen2": _COMMON | {"tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _COMMON | {"sliding_window": 9},
    "gemma2": _COMMON | {"head_dim": 8, "sliding_window": 9},
    "falcon": _COMMON | {"num_kv_heads": 2, "alibi": True},
}


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of ``family``, every parameter perturbed so that none is at a special value."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**(copy.deepcopy(FAMILIES[family]) | changes))
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
        objective=NextToken(),
        optimizer=OPTIMIZERS["adamw"](groups, rate),
        schedule=SCHEDULES[schedule](len(stream)),
        documents=documents,
        stream=stream,
        **parts,
    )
