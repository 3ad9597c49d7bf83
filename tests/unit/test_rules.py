"""What the recipe names is asked, before the run, whether it can do what it is there for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from truetune.errors import UserError
from truetune.optim import OPTIMIZERS, Rule
from truetune.recipe import Recipe
from truetune.rules import _built


def sgd(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, rate)


def of_its_own_groups(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": group["params"]} for group in groups], rate)


def test_an_optimizer_keeps_the_groups_whose_rate_is_set() -> None:
    recipe = Recipe(model={"path": "m"}, data={"source": "s"})  # type: ignore[arg-type]
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "peak": 3e-4, "lr": 3e-4}]
    assert _built(sgd, groups, recipe).param_groups[0]["peak"] == 3e-4
    with pytest.raises(UserError, match=re.escape("over the groups that it was given; subclass it")):
        _built(of_its_own_groups, groups, recipe)


def test_bf16_weights_are_for_rules_that_round_stochastically() -> None:
    recipe = Recipe(model={"path": "m"}, data={"source": "s"}, optimizer={"name": "mine:sgd"})  # type: ignore[arg-type]
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    groups = [{"params": [weight], "peak": 3e-4, "lr": 3e-4}]
    with pytest.raises(UserError, match=r'"mine:sgd" would round .* lose small updates; make it a .*fp32'):
        _built(sgd, groups, recipe)
    for name in OPTIMIZERS:
        assert isinstance(_built(OPTIMIZERS[name], [dict(group) for group in groups], recipe), Rule)
