"""Greedy answers, by transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig


@torch.no_grad()
def answer(model: Any, prompt: Sequence[int], max_tokens: int, stop_ids: frozenset[int]) -> tuple[list[int], bool]:
    """Greedy continuation of ``prompt``: at most ``max_tokens`` tokens, and whether a stop token ended it.

    model: a Hugging Face model, or PEFT's wrapper of one. The stop token itself is left out. The answer ends
    where the model has no further positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        max_tokens = min(max_tokens, positions - len(prompt))
    if max_tokens < 1:
        return [], False
    greedy = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    tokens = out[0, ids.shape[1] :].tolist()
    stopped = bool(tokens) and tokens[-1] in stop_ids
    return (tokens[:-1] if stopped else tokens), stopped
