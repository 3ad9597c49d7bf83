"""One optimizer step on the weights of a model of 135 M parameters, against public implementations of the same rule.

The ways take the same gradients from the same weights, in turns; a figure is a median, with the quartiles of its ratio
to ours. Beside it stands how far the weights have come apart, as a share of how far they moved: without it a time says
nothing. Shapes: hidden size 576, 30 layers of 9 heads and 3 key heads of 64, intermediate 1536, vocabulary 49152, tied.
Rules of matrices are given the hidden matrices alone. What a rule does once in many steps is in every sample of SOAP,
which is a mean of so many; GaLore's and Fira's, the singular vectors of every 200th step, is only in the first step,
which stands apart. Peers are timed where they are installed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from truetune.bench.kernels import OURS, machine, require_place
from truetune.errors import UserError
from truetune.kernels.native.memory import keep_memory
from truetune.optim import OPTIMIZERS
from truetune.training.patience import write_text

LAYERS, HIDDEN, KEYS, INNER, VOCABULARY = 30, 576, 192, 1536, 49_152
RATE, RANK, FREQUENCY = 1e-3, 128, 10

Build = Callable[[list[Parameter]], Optimizer]


class Rule(NamedTuple):
    """options of ours; peers: name -> module and how it builds the same; matrices: whether it is for those alone;
    steps: of a sample."""

    options: dict[str, Any]
    peers: dict[str, tuple[str, Build]]
    matrices: bool = True
    steps: int = 1


def _low_rank(parameters: list[Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": parameters, "rank": RANK, "update_proj_gap": 200} | options]


def _of(module: str, name: str, **options: Any) -> tuple[str, Build]:
    return module, lambda parameters: getattr(import_module(module), name)(parameters, lr=RATE, **options)


def _projected(module: str, name: str, groups: dict[str, Any], **options: Any) -> tuple[str, Build]:
    def build(parameters: list[Parameter]) -> Optimizer:
        made: Optimizer = getattr(import_module(module), name)(_low_rank(parameters, **groups), lr=RATE, **options)
        return made

    return module, build


def _muon_of_pytorch_optimizer(parameters: list[Parameter]) -> Optimizer:
    made: Optimizer = import_module("pytorch_optimizer").Muon(
        [{"params": parameters, "use_muon": True}], lr=RATE, use_adjusted_lr=True
    )
    return made


SOAP = {"betas": (0.95, 0.95), "weight_decay": 0.0, "precondition_frequency": FREQUENCY}
RULES = {
    "adamw": Rule(
        {},
        {
            "torch foreach": _of("torch.optim", "AdamW", weight_decay=0.0, foreach=True),
            "torch fused": _of("torch.optim", "AdamW", weight_decay=0.0, fused=True),
        },
        matrices=False,
    ),
    "muon": Rule(
        {},
        {
            "torch": _of("torch.optim", "Muon", weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            "pytorch-optimizer": ("pytorch_optimizer", _muon_of_pytorch_optimizer),
        },
    ),
    "soap": Rule(
        {"frequency": FREQUENCY},
        {
            "pytorch-optimizer": _of("pytorch_optimizer", "SOAP", **SOAP),
        },
        steps=FREQUENCY,
    ),
    "galore": Rule(
        {"rank": RANK},
        {
            "galore-torch": _projected(
                "galore_torch", "GaLoreAdamW", {"scale": 0.25, "proj_type": "std"}, no_deprecation_warning=True
            ),
            "pytorch-optimizer": _projected("pytorch_optimizer", "GaLore", {"scale": 0.25, "projection_type": "std"}),
        },
    ),
    "fira": Rule(
        {"rank": RANK},
        {
            "fira": _projected("fira", "FiraAdamW", {"alpha": 1.0, "proj_type": "std"}, no_deprecation_warning=True),
            "pytorch-optimizer": _projected("pytorch_optimizer", "Fira", {"scale": 1.0, "projection_type": "std"}),
        },
    ),
}


def shapes(layers: int, matrices: bool) -> list[tuple[int, ...]]:
    """Of the weights; matrices: without embedding and norms."""
    hidden: list[tuple[int, ...]] = [
        *[(HIDDEN, HIDDEN)] * 2,
        *[(KEYS, HIDDEN)] * 2,
        *[(INNER, HIDDEN)] * 2,
        (HIDDEN, INNER),
    ] * layers
    return hidden if matrices else [(VOCABULARY, HIDDEN), *hidden, *[(HIDDEN,)] * (2 * layers + 1)]


def measure(name: str, layers: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step, sample by sample, and of the first, by way; and how far each is from ours at the end."""
    rule = RULES[name]
    generator = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(shape, generator=generator) for shape in shapes(layers, rule.matrices)]
    builds: dict[str, Build] = {OURS: lambda ps: _ours(name, rule, ps)}
    builds |= {way: build for way, (module, build) in rule.peers.items() if find_spec(module.partition(".")[0])}
    weights = {way: [Parameter(x.clone()) for x in start] for way in builds}
    optimizers = {way: build(weights[way]) for way, build in builds.items()}
    seconds: dict[str, list[float]] = {way: [] for way in builds}
    first: dict[str, float] = {}
    for i in range(1 + repeats):
        gradients = [[torch.randn(x.shape, generator=generator) for x in start] for _ in range(min(2, rule.steps))]
        count = rule.steps if i else 1
        for way in _turned(list(builds), i):
            took = sum(_step(optimizers[way], weights[way], gradients[k % len(gradients)]) for k in range(count))
            if i:
                seconds[way].append(took / count)
            else:
                first[way] = took
    moved = _length(p - x for p, x in zip(weights[OURS], start, strict=True))
    apart = {way: _length(p - q for p, q in zip(weights[OURS], ps, strict=True)) / moved for way, ps in weights.items()}
    missing = [way for way in rule.peers if way not in builds]
    return {
        "rule": name,
        "layers": layers,
        "weights": sum(x.numel() for x in start),
        "steps": 1 + repeats * rule.steps,
        "seconds": seconds,
        "first": first,
        "apart": apart,
        "missing": missing,
    }


def _ours(name: str, rule: Rule, parameters: list[Parameter]) -> Optimizer:
    return OPTIMIZERS[name]([{"params": parameters, "lr": RATE, "peak": RATE}], RATE, **rule.options)


def _turned(ways: list[str], by: int) -> list[str]:
    """Another goes first in every turn."""
    return ways[by % len(ways) :] + ways[: by % len(ways)]


@torch.no_grad()
def _step(optimizer: Optimizer, parameters: Sequence[Parameter], gradients: Sequence[Tensor]) -> float:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()  # some change it
    begun = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begun


def _length(tensors: Iterator[Tensor]) -> float:
    return sum(float(t.detach().double().square().sum()) for t in tensors) ** 0.5


def write(only: Sequence[str], layers: int, repeats: int, to: Path | None) -> None:
    """Measure and print; the raw samples go to ``to``. Raises UserError for a rule that there is not."""
    if unknown := sorted(set(only) - RULES.keys()):
        raise UserError(f"there is no rule {unknown[0]} to time; choose among: {', '.join(RULES)}")
    if to:
        require_place(to)
    keep_memory()  # as every run does
    found = []
    for name in RULES:
        if not only or name in only:
            found.append(measure(name, layers, repeats))
            print("\n".join(_lines(found[-1])), flush=True)
    if to:
        write_text(to, json.dumps({"machine": machine(), "repeats": repeats, "results": found}, indent=1) + "\n")
        print(f"raw samples: {to}")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    ours = found["seconds"][OURS]
    yield f"{found['rule']}: {found['weights']:,} weights, {found['layers']} layers, {found['steps']} steps"
    for way, seconds in found["seconds"].items():
        low, middle, high = quartiles([mine / theirs for mine, theirs in zip(ours, seconds, strict=True)])
        ratio = "" if way == OURS else f"  ours takes {middle:.2f} of it ({low:.2f} to {high:.2f})"
        apart = "" if way == OURS else f"  apart {found['apart'][way]:.1e}"
        took, begun = 1e3 * statistics.median(seconds), 1e3 * found["first"][way]
        yield f"  {way:18}{took:10.1f} ms  first step {begun:10.1f} ms{ratio}{apart}"
    yield from (f"  {way:18}not installed" for way in found["missing"])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the median and the third."""
    ordered = sorted(values)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[(3 * len(ordered)) // 4]
