"""What leaving small entries out of the loss's gradient saves and changes, on a trained model and real documents.

``python tools/filtered_loss.py MODEL [ROUNDS]`` prints lines of JSON: forward and backward of LoRA steps, exact and
filtered in turns on the same documents; then the loss with its backward, exact, filtered, and the matrix products of
the exact one alone, in turns, with the head frozen and trained. The recipe is the quick start's. Seconds are raw;
errors are relative L2.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truetune.assembly import Job, assemble
from truetune.checks.preflight import distance
from truetune.kernels import linear_cross_entropy
from truetune.kernels.linear_cross_entropy import CLASSES, filter_threshold
from truetune.objectives.next_token import NextToken
from truetune.optim import enough, set_rate, take_step
from truetune.spelling import read
from truetune.training.gradient import differentiate

TARGETS, ROWS = 2_000, 667
"""ROWS: of the exact loss's chunks."""
WARM = 3
"""Rounds before the first that counts."""


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def states(job: Job) -> tuple[Tensor, Tensor]:
    """Hidden states of targets of the first steps, as the head is given them, and their labels."""
    trainer, hidden, labels = job.trainer, [], []
    with torch.no_grad(), trainer.model.autocast():
        for step in range(len(trainer.stream)):
            for batch in trainer.batches(step):
                hidden.append(trainer.model(batch, batch.learned))
                labels.append(batch.labels[batch.learned])
            if sum(map(len, labels)) >= TARGETS:
                break
    return torch.cat(hidden)[:TARGETS], torch.cat(labels)[:TARGETS]


def losses(job: Job, rounds: int, trained: bool) -> dict[str, Any]:
    hidden_ND, labels_N = states(job)
    weight_VD = job.trainer.model.head.weight.detach().bfloat16()
    inputs = hidden_ND.bfloat16().requires_grad_(), weight_VD.clone().requires_grad_(trained)
    wanted = inputs if trained else inputs[:1]

    def loss(filtered: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(*inputs, labels_N, filtered=filtered).total, wanted)

    chunks = hidden_ND.bfloat16().split(ROWS)
    logits_CV = weight_VD.new_empty(ROWS, len(weight_VD))

    def products() -> None:
        """In a buffer as the loss has it, the gradient of the weight by parts of the classes as there."""
        sum_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for hidden_CD in chunks:
            slopes_CV = torch.mm(hidden_CD, weight_VD.T, out=logits_CV[: len(hidden_CD)])
            _ = slopes_CV @ weight_VD
            for part in sum_VD.split(CLASSES) if trained else ():
                part += slopes_CV[:, : len(part)].T @ hidden_CD

    ways: dict[str, Callable[[], Any]] = {
        "exact": lambda: loss(False),
        "filtered": lambda: loss(True),
        "products": products,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Any] = {}
    for turn in range(WARM + rounds):
        for way, function in ways.items():
            taken, found[way] = timed(function)
            if turn >= WARM:
                seconds[way].append(taken)
    single = inputs[0].detach().float().requires_grad_(), weight_VD.float().requires_grad_(trained)
    truth = torch.autograd.grad(linear_cross_entropy(*single, labels_N).total, single[: len(wanted)])
    named = dict(zip(("hidden", "weight"), zip(truth, found["exact"], found["filtered"], strict=True), strict=False))
    return {
        "what": f"loss, {'trained' if trained else 'frozen'} head",
        "targets": len(labels_N),
        "entries": len(weight_VD),
        "hidden size": weight_VD.shape[1],
        "seconds": seconds,
        "errors": {
            name: {
                "exact by fp32": distance([exact], [true]),
                "filtered by fp32": distance([filtered], [true]),
                "filtered by exact": distance([filtered], [exact]),
            }
            for name, (true, exact, filtered) in named.items()
        },
    }


def steps(job: Job, rounds: int) -> dict[str, Any]:
    """Whole steps but for the documents' collation; weights move on by the exact one's."""
    trainer = job.trainer
    model, parameters = trainer.model.train(), list(trainer.model.trainable().values())
    ways = {"exact": NextToken(), "filtered": NextToken(filtered=True)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    errors: list[float] = []
    set_rate(trainer.optimizer, enough(trainer.optimizer))
    for turn in range(WARM + rounds):
        batches, found = trainer.batches(turn), {}
        for way in ("filtered", "exact"):
            model.zero_grad(set_to_none=True)
            taken, _ = timed(partial(differentiate, trainer.optimizer, model, ways[way], batches))
            found[way] = [p.grad for p in parameters]
            if turn >= WARM:
                seconds[way].append(taken)
        if turn >= WARM:
            errors.append(distance(found["filtered"], found["exact"]))
        take_step(trainer.optimizer, torch.zeros(()))
    return {"what": "LoRA step, forward and backward", "seconds": seconds, "filtered by exact": errors}


def main(path: str, rounds: int = 9) -> None:
    job = assemble(read("quickstart", [f"model.path={path}"]))
    facts = {"threads": torch.get_num_threads(), "threshold": filter_threshold(torch.bfloat16)}
    for part in (steps(job, rounds), losses(job, rounds, False), losses(job, rounds, True)):
        print(json.dumps(facts | part), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
