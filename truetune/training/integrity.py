"""Did the right tensors move? Fingerprints of parameters before and after, compared by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from truetune.training.record import Verdict

Fingerprint = tuple[int | float, int, tuple[int, ...]]


def fingerprints(model: nn.Module) -> dict[str, Fingerprint]:
    """The bits of every parameter, hashed and summed, by name; a tied weight once."""
    return {name: _hash(p.detach()) for name, p in model.named_parameters()}


@torch.no_grad()
def integrity(model: nn.Module, before: Mapping[str, Fingerprint], idle: Collection[str] = ()) -> list[Verdict]:
    """Since ``before``: has every trained tensor moved, is it finite, and has no frozen one changed?

    idle: trained tensors that nothing was routed to, which need not move.
    """
    after = fingerprints(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    active = [n for n in trained if n not in idle]
    still = [n for n in active if after[n] == before[n]]
    broken = [n for n, p in trained.items() if not torch.isfinite(p).all()]
    changed = [n for n in after if n not in trained and after[n] != before[n]]
    return [
        Verdict(
            "every trained tensor moved",
            not still,
            f"{len(active) - len(still)} of {len(active)}" + _first(still),
            "check that the tensor takes part in the forward and that the rate is not too small to change it",
        ),
        Verdict(
            "every trained tensor is finite",
            not broken,
            f"{len(trained) - len(broken)} of {len(trained)}" + _first(broken),
            "lower the rate",
        ),
        Verdict(
            "no frozen tensor moved",
            not changed,
            f"{len(changed)} of {len(after) - len(trained)}" + _first(changed),
            "this is a fault of the program; please report it",
        ),
    ]


def _first(names: list[str]) -> str:
    return f" (not: {names[0]})" if names else ""


def _hash(tensor: Tensor) -> Fingerprint:
    bits = tensor.contiguous().flatten().view(torch.uint8)
    words = bits[: len(bits) // 8 * 8].view(torch.int64)
    return torch.hash_tensor(words).item(), int(words.sum()), tuple(bits[8 * len(words) :].tolist())
