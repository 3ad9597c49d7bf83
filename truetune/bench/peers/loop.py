"""The loop that a careful user writes with transformers and peft; no product.

Documents of like length share a batch of up to 1,024 padded tokens, padded on the right without a mask, since causal
attention never sees the padding; logits of target positions only; fused AdamW. Option ``compile``: the decoder's layers
through ``torch.compile``, before the first step. Option ``single``: one document at a time and no padding, which is
faster where a single document fills the processor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from protocol import IGNORE, Row, Side
from published import PACKAGES, load, trained

BUDGET = 1024
"""Padded tokens of a batch."""


def batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """The longest first, as many to a batch as its longest allows, but at least one."""
    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if not found or (len(found[-1]) + 1) * len(found[-1][0].ids) > budget:
            found.append([])
        found[-1].append(row)
    return found


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, int64 [rows, longest]."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)], labels[i, : len(row.ids)] = row
    return torch.from_numpy(ids), torch.from_numpy(labels)


def main() -> None:
    side = Side()
    model = load(side)
    base = model.get_base_model() if side.job["adapter"] else model
    decoder, head = base.base_model, base.get_output_embeddings()
    budget = 0 if "single" in side.options else BUDGET
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=side.job["rate"], weight_decay=0.0, fused=True)

    def backward(batch: Sequence[Row], targets: int) -> float:
        """Add the gradient of the batch's share of a step with so many targets; that share of its loss."""
        ids, labels = padded(batch)
        keep = labels[:, 1:] != IGNORE
        with torch.autocast("cpu", torch.bfloat16, enabled=side.autocast):
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = head(hidden[:, :-1][keep])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][keep], reduction="sum") / targets
        loss.backward()
        return loss.item()

    started = time.perf_counter()
    if "compile" in side.options:
        for layer in decoder.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        for count in (1, 2):  # torch compiles a batch of one row apart, which would fall into a timed step
            backward(side.steps[0][:count], 1)
        optimizer.zero_grad(set_to_none=True)
    side.ready(parameters, PACKAGES, compile_seconds=time.perf_counter() - started)
    for rows in side.steps:
        side.begin()
        targets = sum(int((row.labels[1:] != IGNORE).sum()) for row in rows)
        loss = sum(backward(batch, targets) for batch in batches(rows, budget))
        if side.job["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(parameters, side.job["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        side.done(loss, sum(len(row.ids) for row in rows), targets)
    side.finish()


if __name__ == "__main__":
    main()
