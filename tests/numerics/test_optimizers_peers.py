"""Optimizers against other packages that have the same rule: the same weights over twenty steps, in float64.

Rules without an equal here differ from what there is: NAdam of torch has a momentum of its own schedule; Shampoo is not
one algorithm; DoG averages in another object. Options make peers equal where their defaults are others. Low-rank peers
count the steps to the next projection from another step, so that here there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dadaptation
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
from optimizer_references import newton_schulz
from torch import Tensor

from truetune.optim import OPTIMIZERS, averaged, take_step

RATE = 0.01
VECTORS = [(3,), (7, 5), (5, 7), (7, 5), (16, 24)]
MATRICES = [(7, 5), (5, 7), (7, 5), (16, 24)]
SQUARES = [(5, 5), (16, 16), (5, 5)]
"""For SOAP: a first gradient with a null space has no basis of its own, so roundings would choose one."""

Peer = Callable[[list[Tensor]], torch.optim.Optimizer]
PEERS: dict[str, tuple[str, dict[str, Any], Peer]] = {
    "sgd": ("sgd", {"weight_decay": 0.1}, lambda ps: torch.optim.SGD(ps, RATE, momentum=0.9, weight_decay=0.1)),
    "nesterov": ("sgd", {"nesterov": True}, lambda ps: torch.optim.SGD(ps, RATE, momentum=0.9, nesterov=True)),
    "adafactor": ("adafactor", {"weight_decay": 0.1}, lambda ps: torch.optim.Adafactor(ps, RATE, weight_decay=0.1)),
    "lion": ("lion", {"weight_decay": 0.1}, lambda ps: pytorch_optimizer.Lion(ps, RATE, weight_decay=0.1)),
    "diffgrad": ("diffgrad", {}, lambda ps: pytorch_optimizer.DiffGrad(ps, RATE)),
    "soap": (
        "soap",
        {"weight_decay": 0.1, "frequency": 8},
        lambda ps: pytorch_optimizer.SOAP(ps, RATE, weight_decay=0.1, precondition_frequency=8),
    ),
    "galore": ("galore", {"rank": 3}, lambda ps: pytorch_optimizer.GaLore(low_rank(ps, 0.25), RATE)),
    "fira": ("fira", {"rank": 3}, lambda ps: pytorch_optimizer.Fira(low_rank(ps, 1.0), RATE)),
    "schedule-free-adamw": (
        "schedule-free-adamw",
        {"weight_decay": 0.1},
        lambda ps: schedulefree.AdamWScheduleFree(ps, RATE, weight_decay=0.1),
    ),
    "schedule-free-sgd": (
        "schedule-free-sgd",
        {"weight_decay": 0.1},
        lambda ps: schedulefree.SGDScheduleFree(ps, RATE, weight_decay=0.1),
    ),
    "dadapt-adam": (
        "dadapt-adam",
        {"weight_decay": 0.1},
        lambda ps: dadaptation.DAdaptAdam(ps, RATE, weight_decay=0.1, decouple=True),
    ),
    "prodigy": ("prodigy", {"weight_decay": 0.1}, lambda ps: prodigyopt.Prodigy(ps, RATE, weight_decay=0.1)),
}
"""Case -> rule, options, and the other package's of the same parameters."""

FP32 = ("soap", "galore", "fira")
"""Peers that take QR and SVD in fp32 whatever the weights are."""


def low_rank(parameters: list[Tensor], scale: float) -> list[dict[str, Any]]:
    return [{"params": parameters, "rank": 3, "update_proj_gap": 200, "scale": scale, "projection_type": "std"}]


@pytest.mark.parametrize("case", PEERS)
def test_a_rule_is_that_of_another_package(case: str) -> None:
    name, options, peer = PEERS[case]
    shapes = {"soap": SQUARES, "galore": MATRICES, "fira": MATRICES}.get(name, VECTORS)
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    ours = [torch.nn.Parameter(x) for x in random()]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours, "lr": RATE, "peak": RATE}]
    one, two = OPTIMIZERS[name](groups, RATE, **options), peer(theirs)
    free = isinstance(two, schedulefree.AdamWScheduleFree | schedulefree.SGDScheduleFree)
    if free:
        two.train()
    for _ in range(20):
        for p, q, g in zip(ours, theirs, random(), strict=True):
            p.grad, q.grad = g, g.clone()
        one.step()
        two.step()
    if free:
        two.eval()
    with averaged(one):
        for p, q in zip(ours, theirs, strict=True):
            bound = 1e-6 if case in FP32 else 1e-9
            torch.testing.assert_close(p, q, rtol=bound, atol=bound)


@pytest.mark.parametrize(("scale", "theirs_is"), [("rms", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("product", ["float64", "bfloat16"])
def test_muon_is_that_of_torch(
    scale: str, theirs_is: str, nesterov: bool, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's multiplies in bfloat16 whatever the weights are. With its products in float64 both are the same; as it
    is, it differs by what that rounds, a hundredth or so of how far the weights have moved."""
    if product == "float64":
        theirs_in_full = "torch.optim._muon._zeropower_via_newtonschulz"
        monkeypatch.setattr(theirs_in_full, lambda update, _coefficients, rounds, _eps: newton_schulz(update, rounds))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in MATRICES]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    one = OPTIMIZERS["muon"](
        [{"params": ours, "lr": RATE, "peak": RATE}], RATE, scale=scale, nesterov=nesterov, weight_decay=0.1
    )
    two = torch.optim.Muon(theirs, RATE, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs_is)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    for p, q, x in zip(ours, theirs, start, strict=True):
        apart = float((p - q).detach().norm() / (p - x).detach().norm())
        assert apart < 1e-9 if product == "float64" else 1e-4 < apart < 2e-2


@pytest.mark.parametrize("name", ["momo", "momo-adam"])
def test_momo_is_that_of_its_authors(name: str) -> None:
    momo = pytest.importorskip("momo", reason="pip install momo-opt")
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in VECTORS]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = OPTIMIZERS[name]([{"params": ours, "lr": 0.5, "peak": 0.5}], 0.5, weight_decay=0.1)
    two = {"momo": momo.Momo, "momo-adam": momo.MomoAdam}[name](theirs, lr=0.5, weight_decay=0.1)
    for _ in range(20):
        noise = [0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in ours]
        for ps in (ours, theirs):
            for p, n in zip(ps, noise, strict=True):
                p.grad = p.detach() + n
        losses = [sum((p.grad.square().sum() / 2 for p in ps), torch.zeros(())) for ps in (ours, theirs)]
        take_step(one, losses[0])
        with torch.no_grad():
            two.step(loss=losses[1])
    bound = 1e-9 if name == "momo" else 1e-5  # its Adam adds up <g, x> in fp32
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)
