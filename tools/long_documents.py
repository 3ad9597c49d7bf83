"""One LoRA step on one long document, in the shape of a model of 0.5 B parameters with random weights.

``python tools/long_documents.py TOKENS GIB [LAYERS]`` prints two lines of JSON: after forward and loss, and after the
step. GIB: what layers may keep for the backward pass, 0 for all. LAYERS: fewer than 24, where time is short.
Seconds of attention are those within its two functions, so computed again or not. Peaks are the kernel's VmHWM.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from truetune.data.batch import Batch, Document
from truetune.kernels.native import attention
from truetune.models.adapt import add_lora
from truetune.models.precision import keep_sums_in_fp32
from truetune.models.route import choose_route
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.optim import OPTIMIZERS, parameter_groups

VOCABULARY = 151_936
spent: list[float] = []
"""Seconds of each call of attention."""


def timed(function: Callable[..., Any]) -> Any:
    def run(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent.append(time.perf_counter() - began)

    return staticmethod(run)


def build(tokens: int, layers: int) -> CausalLM:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    tail = measure_tail(model)
    route = choose_route(model, tail.decoder, tokens)
    adapted = add_lora(model, tail.head, rank=16, alpha=32.0, dropout=0.0, targets="all-linear")
    keep_sums_in_fp32(model)
    made = CausalLM(adapted, tail, route, torch.bfloat16)
    made.train()
    return made


def figures(began: float) -> dict[str, float]:
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    now = time.perf_counter()
    return {
        "seconds": round(now - began, 2),
        "attention": round(sum(spent), 2),
        "peak_gib": round(peak / 2**20, 2),
    }


def main(tokens: int, gib: float, layers: int = 24) -> None:
    model = build(tokens, layers)
    facts: dict[str, Any] = {"tokens": tokens, "layers": layers, "threads": torch.get_num_threads()}
    if gib:
        budget = model.keep_within(round(gib * 2**30))
        count, needs = budget.recomputed([tokens]), budget.needs([tokens])
        facts |= {"budget_gib": gib, "recomputed": count, "kept_gib": round(needs[count] / 2**30, 3)}
        facts |= {"all_gib": round(needs[0] / 2**30, 3)}
    attention._Attention.forward = timed(attention._Attention.forward)  # type: ignore[method-assign]
    attention._Attention.backward = timed(attention._Attention.backward)  # type: ignore[method-assign]
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model.trainable().items(), 1e-3, 1.0), 1e-3)
    ids = np.random.default_rng(0).integers(5, VOCABULARY, tokens).astype(np.int32)
    batch = Batch.of([Document(ids, np.arange(tokens) >= tokens // 2)])
    objective, began = NextToken(), time.perf_counter()
    loss = objective(model, batch).total / objective.count(batch)
    print(json.dumps(facts | {"after": "forward and loss", **figures(began)}), flush=True)
    loss.backward()
    optimizer.step()
    print(json.dumps(facts | {"after": "step", "loss": round(float(loss.detach()), 4), **figures(began)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:]))
