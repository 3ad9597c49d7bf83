"""Optimizers whose step is an operation of ``kernels``: as torch's own, and the same on our Triton kernels.

The kernels run in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from interpreted import exact

from truetune.kernels.triton import switched_on
from truetune.optim import OPTIMIZERS, parameter_groups, steps_apart

SHAPES = [(40, 30), (17,), (3, 5), (1,)]
RULES = ["adamw", "adamw in bf16", "adamw-8bit", "adamw-8bit in bf16", "muon"]


def made(rule: str) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    name, _, low = rule.partition(" in ")
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if low else torch.float32
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    rest = {"1", "3"} if name == "muon" else set()
    groups = parameter_groups(((str(i), p) for i, p in enumerate(parameters)), 1e-2, rest=rest)
    options = {"smallest": 100} if name == "adamw-8bit" else {}
    return OPTIMIZERS[name](groups, 1e-2, weight_decay=0.1, **options), parameters


def descend(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], steps: range) -> None:
    """One parameter has no gradient in every other step."""
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for i, p in enumerate(parameters):
            g = p.detach() + torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if t % 2 and i == 2 else g
        optimizer.step()


@contextlib.contextmanager
def on_kernels() -> Iterator[None]:
    with exact(), switched_on("cpu", "adamw", "adamw_8bit"):
        yield


def test_in_fp32_it_is_torch_s_bit_for_bit_and_keeps_what_torch_keeps() -> None:
    ours, parameters = made("adamw")
    twins = copy.deepcopy(parameters)
    theirs = torch.optim.AdamW(parameter_groups(((str(i), p) for i, p in enumerate(twins)), 1e-2), 1e-2)
    for group, own in zip(theirs.param_groups, ours.param_groups, strict=True):
        group |= {"fused": True, "weight_decay": own["weight_decay"]}
    for optimizer, ps in ((ours, parameters), (theirs, twins)):
        descend(optimizer, ps, range(5))
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))
    for a, b in zip(parameters, twins, strict=True):
        one, two = ours.state[a], theirs.state[b]
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert steps_apart(ours) and ours._step_supports_amp_scaling  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES)
def test_on_our_kernels_a_rule_goes_where_it_goes_without(rule: str) -> None:
    ends = []
    for way in (on_kernels, contextlib.nullcontext):
        optimizer, parameters = made(rule)
        with way():
            descend(optimizer, parameters, range(4))
        ends.append([p.detach().double() for p in parameters])
    rounding = 2**-7 if "bf16" in rule else 1e-6  # of a step; there are four, on either side
    for ours, theirs, start in zip(*ends, made(rule)[1], strict=True):
        far = (ours - theirs).abs() / theirs.abs().clamp(min=0.1)
        assert float(far.max()) <= 8 * rounding and float(far.mean()) <= rounding
        assert float((theirs - start).norm()) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_on_our_kernels_a_rule_resumes_bit_for_bit(rule: str) -> None:
    with on_kernels():
        optimizer, straight = made(rule)
        descend(optimizer, straight, range(2))
        state, kept = copy.deepcopy((optimizer.state_dict(), straight))
        descend(optimizer, straight, range(2, 5))
        other, resumed = made(rule)
        other.load_state_dict(state)
        with torch.no_grad():
            for p, x in zip(resumed, kept, strict=True):
                p.copy_(x)
        descend(other, resumed, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("way", [on_kernels, contextlib.nullcontext], ids=["kernel", "torch"])
def test_a_step_that_found_no_number_is_left_out_and_not_counted(way: object) -> None:
    optimizer, parameters = made("adamw")
    with way():  # type: ignore[operator]
        descend(optimizer, parameters, range(2))
        before = copy.deepcopy((optimizer.state_dict()["state"], parameters))
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        for p in parameters:
            p.grad = torch.full_like(p, torch.nan)
        optimizer.step()
    after = (optimizer.state_dict()["state"], parameters)
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert all(torch.equal(before[0][i][key], after[0][i][key]) for i in before[0] for key in before[0][i])
    assert int(after[0][0]["step"]) == 2
