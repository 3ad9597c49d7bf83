"""Which parameter gets which rule: the kinds, the groups they make, and the keys that override them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folders import keys
from tiny import tiny, wrap
from torch import nn

from truetune.assembly import assemble
from truetune.errors import UserError
from truetune.optim import OPTIMIZERS, Rule, kinds_of, parameter_groups
from truetune.spelling import read

TOGETHER = [(3,), (7, 5), (3,), (2, 3, 4), (7, 5), (3,)]


class Matrices(Rule):
    """Takes matrices, and moves them by the rate."""

    takes = ("matrices",)

    def start(self, x: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros_like(x)}

    def update(self, x: torch.Tensor, g: torch.Tensor, t: int, state: Any, group: dict[str, Any]) -> None:
        state["seen"].add_(g)
        x.sub_(group["lr"])


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "matrices", Matrices)


def test_the_kinds_of_a_model_are_told_by_its_modules() -> None:
    model = wrap(tiny("llama"))
    kinds = kinds_of(model.model, model.head.weight)
    by_kind = {kind: {n for n in kinds if kinds[n] == kind} for kind in set(kinds.values())}
    assert by_kind["embeddings"] == {"model.embed_tokens.weight"} and by_kind["head"] == {"lm_head.weight"}
    assert all("norm" in name for name in by_kind["vectors"]) and len(by_kind["vectors"]) > 2
    assert all("proj" in name for name in by_kind["matrices"]) and len(by_kind["matrices"]) > 6
    tied = wrap(tiny("gpt2"))
    kinds = kinds_of(tied.model, tied.head.weight)
    assert {n for n in kinds if kinds[n] == "embeddings"} == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert "head" not in kinds.values()
    adapted = wrap(tiny("llama"), lora=True, also="head")
    kinds = kinds_of(adapted.model, adapted.head.weight)
    assert {kinds[n] for n in adapted.trainable()} == {"matrices", "head"}


def test_the_rest_has_groups_and_a_rate_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    rest = {"0.bias", "1.weight", "1.bias"}
    groups = parameter_groups(model.named_parameters(), 0.02, rest=rest, rest_rate=3e-4)
    assert [(g["name"], g["peak"], g.get("rest", False), len(g["params"])) for g in groups] == [
        ("weights", 0.02, False, 1),
        ("weights_rest", 3e-4, True, 1),
        ("weights_no_decay_rest", 3e-4, True, 2),
    ]
    assert all(g["weight_decay"] == 0 for g in groups if "no_decay" in g["name"])


def test_the_rest_is_updated_by_adamw() -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    rule = Matrices(parameter_groups(model.named_parameters(), 0.5, rest={"bias"}, rest_rate=0.1), 0.5)
    adamw = torch.optim.AdamW([twin.bias], 0.1, weight_decay=0.0)
    for _ in range(4):
        model.weight.grad, model.bias.grad = torch.randn(3, 4), torch.randn(3)
        twin.bias.grad = model.bias.grad.clone()
        rule.step()
        adamw.step()
    torch.testing.assert_close(model.bias, twin.bias)
    torch.testing.assert_close(model.weight, twin.weight - 4 * 0.5)
    assert rule.state_bytes() == 4 * (12 + 2 * 3)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("more", "own"),
    [
        ((), {"matrices"}),
        (("optimizer.takes=[matrices,embeddings]", "optimizer.rest_rate=1e-3"), {"matrices", "embeddings"}),
        (("optimizer.takes=[head]",), {"head"}),
    ],
)
def test_a_recipe_says_which_kinds_the_rule_takes(
    my_model: Path, my_data: Path, tmp_path: Path, more: tuple[str, ...], own: set[str]
) -> None:
    asked = keys(my_model, my_data, tmp_path / "run", "adapter.method=full", "optimizer.name=matrices", *more)
    trainer = assemble(read(None, asked)).trainer
    kinds = kinds_of(trainer.model.model, trainer.model.head.weight)
    left = {id(p): group["rest"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {kinds[n] for n, p in trainer.model.trainable().items() if not left[id(p)]} == own
    peaks = {group["peak"] for group in trainer.optimizer.param_groups if group["rest"]}
    assert peaks == ({1e-3} if len(more) > 1 else {1e-2})


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_rule_that_takes_all_has_the_second_rate_for_all_but_matrices(
    my_model: Path, my_data: Path, tmp_path: Path, name: str
) -> None:
    asked = keys(my_model, my_data, tmp_path / "run", "adapter.method=full", f"optimizer.name={name}")
    trainer = assemble(read(None, (*asked, "optimizer.rest_rate=8e-2"))).trainer
    kinds = kinds_of(trainer.model.model, trainer.model.head.weight)
    named, before = trainer.model.trainable(), {n: p.clone() for n, p in trainer.model.trainable().items()}
    for p in named.values():
        p.grad = torch.ones_like(p)
    trainer.optimizer.step()
    for n, p in named.items():  # the first step of both is of the rate's size, by the rule itself
        torch.testing.assert_close(before[n] - p, torch.full_like(p, 1e-2 if kinds[n] == "matrices" else 8e-2))
    assert not any(group.get("rest") for group in trainer.optimizer.param_groups)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (("optimizer.takes=[matrices]",), 'takes means nothing with optimizer "adamw"'),
        (
            ("optimizer.name=lion", "optimizer.rest_rate=1e-3", "adapter.method=lora"),
            "rest_rate means nothing where only matrices are trained",
        ),
        (
            ("optimizer.name=prodigy", "optimizer.rate=1", "optimizer.rest_rate=1"),
            'rest_rate means nothing with optimizer "prodigy", which finds one rate for all',
        ),
        (("optimizer.name=matrices", "optimizer.takes=[matrices,vectors]"), '"matrices" is for matrices; take it out'),
        (("optimizer.takes=[matrix]",), "optimizer.takes"),
        (("optimizer.takes=[]",), "optimizer.takes"),
    ],
)
def test_what_means_nothing_is_refused(
    my_model: Path, my_data: Path, tmp_path: Path, wrong: tuple[str, ...], sentence: str
) -> None:
    asked = keys(my_model, my_data, tmp_path / "run", "adapter.method=full", *wrong)
    with pytest.raises(UserError, match=sentence):
        assemble(read(None, asked))


def test_small_tensors_of_equal_shape_are_one_stack_and_their_state_stays_so() -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in TOGETHER]
    rule = OPTIMIZERS["lion"]([{"params": parameters, "lr": 0.1, "peak": 0.1}], 0.1)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        rule.step()
    assert isinstance(rule, Rule)
    with torch.no_grad():
        shapes = [tuple(x.shape) for x, *_ in rule.stacks()]
    assert shapes == [(3, 3), (2, 7, 5), (1, 2, 3, 4)]
    storages = {rule.state[p]["m"].untyped_storage().data_ptr() for p in parameters}
    assert len(storages) == 3
    before = rule.state[parameters[0]]["m"].data_ptr()
    rule.step()
    assert rule.state[parameters[0]]["m"].data_ptr() == before
