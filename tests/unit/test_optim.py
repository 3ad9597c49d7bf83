"""Parameter groups against PEFT's, the rate's one setter, and AdamW against its formula."""

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from truetune.errors import UserError
from truetune.optim import OPTIMIZERS, adamw, parameter_groups, set_rate


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(self.embed(x))))


def with_lora() -> Any:
    config = LoraConfig(r=2, target_modules=["embed", "up", "down"], modules_to_save=["norm"], bias="all")
    return get_peft_model(Tiny(), config)


def rates_and_decays(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("ratio", [16.0, 0.5])
def test_lora_plus_groups_are_those_of_peft_but_for_modules_in_full(ratio: float) -> None:
    model = with_lora()
    names = {id(p): n for n, p in model.named_parameters()}
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1
    )
    ours = adamw(parameter_groups(model.named_parameters(), 1e-3, ratio), 1e-3, weight_decay=0.1)
    found, peft = (rates_and_decays(o.param_groups, names) for o in (ours, theirs))
    in_full = {n for n in found if "modules_to_save" in n}
    assert in_full and {found.pop(n) for n in in_full} == {(1e-3, 0.0)} != {peft.pop(n) for n in in_full}
    assert found == peft
    assert {rate for rate, _ in found.values()} == {1e-3, ratio * 1e-3, 1e-6}
    assert [g["name"] for g in ours.param_groups] == ["weights_no_decay", "A", "embedding", "B", "B_no_decay"]


def test_with_one_rate_only_biases_and_vectors_do_not_decay() -> None:
    model = Tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer = adamw(parameter_groups(model.named_parameters(), 1e-3), 1e-3, weight_decay=0.1)
    decays, rest = optimizer.param_groups
    assert (decays["name"], decays["weight_decay"]) == ("weights", 0.1)
    assert (rest["name"], rest["weight_decay"]) == ("weights_no_decay", 0.0)
    assert [names[id(p)] for p in decays["params"]] == ["down.weight", "embed.weight", "up.weight"]
    assert [names[id(p)] for p in rest["params"]] == ["down.bias", "norm.bias", "norm.weight", "up.bias"]
    assert all(g["lr"] == g["peak"] == 1e-3 for g in optimizer.param_groups)


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_order_of_the_parameters_does_not_matter(ratio: float) -> None:
    pairs = list(with_lora().named_parameters())
    expected = parameter_groups(pairs, 1e-3, ratio)
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        groups = parameter_groups(pairs, 1e-3, ratio)
        assert [g["name"] for g in groups] == [g["name"] for g in expected]
        for group, other in zip(groups, expected, strict=True):
            assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]


def test_every_trained_parameter_is_in_one_group() -> None:
    model = with_lora()
    grouped = [id(p) for g in parameter_groups(model.named_parameters(), 1e-3, 4.0) for p in g["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained) and len(set(grouped)) == len(grouped)
    assert len(trained) < len(list(model.parameters()))


def test_set_rate_keeps_the_ratio_of_the_groups() -> None:
    optimizer = adamw(parameter_groups(with_lora().named_parameters(), 1e-3, 16.0), 1e-3)
    for factor in (0.5, 0.25, 1.0):
        set_rate(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [
            pytest.approx(factor * peak) for peak in (1e-3, 1e-3, 1e-6, 16e-3, 16e-3)
        ]


def test_trained_fp16_is_refused_and_frozen_is_not() -> None:
    half, single = nn.Parameter(torch.ones(2, 2, dtype=torch.float16)), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match=r"w is trained in torch\.float16.*keep trained parameters in fp32"):
        parameter_groups([("w", half), ("v", single)], 1e-3)
    half.requires_grad_(False)
    assert len(parameter_groups([("w", half), ("v", single)], 1e-3)) == 1


def test_nothing_to_train_and_a_ratio_without_lora_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        parameter_groups([("w", parameter)], 1e-3)
    with pytest.raises(UserError, match="lora_plus_ratio"):
        parameter_groups(Tiny().named_parameters(), 1e-3, 16.0)


def test_adamw_is_its_formula() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3))
    x, m, v = weight.detach().double(), torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    optimizer = OPTIMIZERS["adamw"](
        parameter_groups([("w", weight)], 0.1), 0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2
    )
    for t in range(1, 6):
        gradient = torch.randn(5, 3)
        weight.grad = gradient
        set_rate(optimizer, 1 / t)
        optimizer.step()
        g, rate = gradient.double(), 0.1 / t
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        x = x * (1 - rate * 0.2) - rate * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach().double(), x, rtol=1e-5, atol=1e-6)


def test_the_peak_survives_a_checkpoint() -> None:
    pairs = list(with_lora().named_parameters())
    saved = adamw(parameter_groups(pairs, 1e-3, 16.0), 1e-3)
    set_rate(saved, 0.5)
    other = adamw(parameter_groups(pairs, 9.0, 2.0), 9.0)
    other.load_state_dict(saved.state_dict())
    set_rate(other, 1.0)
    assert [g["lr"] for g in other.param_groups] == [1e-3, 1e-3, 1e-6, 16e-3, 16e-3]
