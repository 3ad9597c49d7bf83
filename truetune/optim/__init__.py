"""Optimizers by name, the parameter groups that they share, and the one way to set their rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from truetune.optim.adamw import adamw
from truetune.optim.adaptive import SGD, Adafactor, DiffGrad, Lion, NadamW
from truetune.optim.around import EMA, Growth, Mechanic, NaP, state_bytes
from truetune.optim.cosine import DCTAdamW, Trion
from truetune.optim.eight_bit import AdamW8bit, GaLore8bit
from truetune.optim.groups import KINDS, MUP, kinds_of, parameter_groups
from truetune.optim.low_rank import Apollo, Fira, GaLore
from truetune.optim.matrix import SOAP, Muon, Shampoo
from truetune.optim.model_based import MoMo, MoMoAdam
from truetune.optim.rate_free import DAdaptAdam, DoG, Prodigy
from truetune.optim.rule import AROUND, SHARED, Rule, averaged, averages, take_averages, total_norm
from truetune.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from truetune.optim.zeroth import MeZO

__all__ = [
    "AROUND",
    "EMA",
    "KINDS",
    "MUP",
    "OPTIMIZERS",
    "SHARED",
    "Growth",
    "Mechanic",
    "NaP",
    "Rule",
    "adamw",
    "averaged",
    "averages",
    "enough",
    "kinds_of",
    "parameter_groups",
    "set_rate",
    "state_bytes",
    "steps_apart",
    "take_averages",
    "take_step",
    "total_norm",
]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "nadamw": NadamW,
    "sgd": SGD,
    "lion": Lion,
    "adafactor": Adafactor,
    "diffgrad": DiffGrad,
    "muon": Muon,
    "soap": SOAP,
    "shampoo": Shampoo,
    "galore": GaLore,
    "fira": Fira,
    "apollo": Apollo,
    "adamw-8bit": AdamW8bit,
    "galore-8bit": GaLore8bit,
    "dct-adamw": DCTAdamW,
    "trion": Trion,
    "schedule-free-adamw": ScheduleFreeAdamW,
    "schedule-free-sgd": ScheduleFreeSGD,
    "dog": DoG,
    "dadapt-adam": DAdaptAdam,
    "prodigy": Prodigy,
    "momo": MoMo,
    "momo-adam": MoMoAdam,
    "mezo": MeZO,
}


def enough(rule: object) -> float:
    """Factor of the peak rate at which fp32 shows what a few steps of ``rule`` move: those that find their own rate
    begin with almost none."""
    return 1e4 if getattr(rule, "finds_rate", False) else 1.0


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to ``factor`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def steps_apart(optimizer: torch.optim.Optimizer) -> bool:
    """``Rule.steps_apart`` of any optimizer; torch's AdamW does."""
    return isinstance(optimizer, torch.optim.AdamW) or getattr(optimizer, "steps_apart", False)


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step along the gradients that the parameters have; ``loss`` is what they are of, for rules that ask."""
    if getattr(optimizer, "sees_loss", False):
        optimizer.step(lambda: loss)  # type: ignore[arg-type, return-value]  # a tensor: a GPU is not waited for
    else:
        optimizer.step()
