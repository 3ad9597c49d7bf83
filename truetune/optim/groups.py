"""Parameter groups: which parameter learns at which peak rate, and which decays.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): the zero-initialised, output-side matrix B learns ``ratio``
times faster than A. The grouping is PEFT's: B also takes every vector (bias, DoRA's lengths), and LoRA on an
embedding learns at a fixed 1e-6. But modules that are trained in full beside LoRA learn at the plain rate, all of
them, where PEFT gives their vectors the rate of B.

muP (Yang et al. 2022, arXiv 2203.03466): of a model m times as wide as the one whose rate was tuned, hidden matrices
and the head learn m times slower, under rules whose steps have the size of the rate. Left out: the rest of muP, which
is the model's: initial weights of variance 1 / width (1 / width^2 in the head), and the scale of attention.

Trained parameters are fp32 whatever the model computes in (bf16 goes through autocast), or bf16 under a rule that
rounds stochastically: rounded to the nearest, an update below about 1/512 of the weight would be lost, and training
would stall in silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from truetune.errors import UserError

KINDS = ("matrices", "embeddings", "head", "vectors")
"""What a parameter may be to a rule. Matrices: hidden weights of two dimensions or more, LoRA's factors among them."""

ROLES = ("weights", "A", "embedding", "B")
"""What a parameter is to LoRA+; without it all are weights."""

MUP = ("adamw", "nadamw", "adamw-8bit", "lion", "diffgrad", "schedule-free-adamw")
"""Rules that move each element by about the rate, whatever the gradient's size: what muP's table for Adam is of."""

EMBEDDING_RATE = 1e-6
"""Rate of LoRA on an embedding under LoRA+, whatever the peak; PEFT's default."""


def kinds_of(model: nn.Module, head: Tensor) -> dict[str, str]:
    """Name of each parameter -> its kind, of ``KINDS``; ``head`` is the output layer's weight.

    A head that is tied to the embedding is one of the embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def kind(name: str, p: Tensor) -> str:
        if id(p) in embeddings or "lora_embedding_" in name:
            return "embeddings"
        if p is head:
            return "head"
        return "matrices" if p.ndim > 1 else "vectors"

    return {name: kind(name, p) for name, p in model.named_parameters()}


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    rate: float,
    lora_plus_ratio: float = 1.0,
    rest: Collection[str] = (),
    rest_rate: float | None = None,
    wide: Collection[str] = (),
    times: float = 1.0,
    leaves: bool = True,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, of the parameters that require a gradient.

    rest: names of those with the peak ``rest_rate``, which is ``rate`` where it is None; their groups' names end in
    "_rest". leaves: whether the optimizer leaves them to AdamW, by ``rest`` True in these groups.
    wide, times: names of those whose peak is divided by ``times``, for muP; their groups' names end in "_wide".

    Each has ``params`` (sorted by name), ``name``, ``lr`` and ``peak`` (both the group's peak rate). Those
    that must not decay (biases and tensors of one dimension or none, so norms) have ``weight_decay`` 0; the
    others leave it to the optimizer. With a ratio of 1 there are at most two: "weights" and
    "weights_no_decay". Neither groups nor their order depend on the order of ``named_parameters``.
    Raises UserError if nothing requires a gradient, if a parameter that does is fp16, or for a ratio without any
    LoRA parameter.
    """
    trained = sorted(((n, p) for n, p in named_parameters if p.requires_grad), key=lambda pair: pair[0])
    if not trained:
        raise UserError("no parameter requires a gradient; add an adapter or unfreeze the model")
    for name, parameter in trained:
        if parameter.dtype == torch.float16:
            raise UserError(
                f"{name} is trained in {parameter.dtype}, so small updates are "
                "rounded away; keep trained parameters in fp32 and compute under torch.autocast"
            )
    if lora_plus_ratio != 1 and not any("lora_" in name for name, _ in trained):
        raise UserError("adapter.lora_plus_ratio needs LoRA parameters; set it to 1 to train without them")
    members: defaultdict[tuple[str, bool, bool, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in trained:
        role = "weights" if lora_plus_ratio == 1 else _role(name, parameter)
        members[role, parameter.ndim < 2 or "bias" in name, name in rest, name in wide].append(parameter)
    groups = []
    for role, free, left, slow in sorted(members, key=lambda key: (ROLES.index(key[0]), *key[1:])):
        own = (rate if rest_rate is None or not left else rest_rate) / (times if slow else 1.0)
        peak = {"embedding": EMBEDDING_RATE, "B": own * lora_plus_ratio}.get(role, own)
        group: dict[str, Any] = {"params": members[role, free, left, slow], "name": role, "lr": peak, "peak": peak}
        if free:
            group |= {"name": f"{group['name']}_no_decay", "weight_decay": 0.0}
        if left:
            group |= {"name": f"{group['name']}_rest"} | ({"rest": True} if leaves else {})
        if slow:
            group["name"] += "_wide"
        groups.append(group)
    return groups


def _role(name: str, parameter: Tensor) -> str:
    if "modules_to_save" in name:
        return "weights"
    if "lora_embedding_" in name:
        return "embedding"
    return "B" if "lora_B" in name or parameter.ndim == 1 else "A"
