"""LoRA reaches what PEFT adapts as it is; what it does not reach is told."""

from __future__ import annotations

import pytest
from tiny import tiny, wrap

from truetune.errors import UserError
from truetune.models.coverage import adaptable, coverage


def test_every_linear_of_a_dense_model_is_reached() -> None:
    model = wrap(tiny("llama"), lora=True).model
    reach = coverage(model)
    matrices = sum(p.numel() for n, p in model.get_base_model().named_parameters() if "base_layer" in n)
    assert (reach.adapted, reach.experts) == (matrices, 0)
    assert reach.total == sum(p.numel() for p in tiny("llama").parameters())
    assert str(reach) == f"the adapter's layers hold {matrices / reach.total:.0%} of the model's weights"


def test_experts_are_counted_and_said_to_be_left() -> None:
    reach = coverage(wrap(tiny("mixtral"), lora=True).model)
    assert reach.experts == 2 * 4 * 3 * 32 * 48
    assert "the experts (74%) are not adapted" in str(reach)


def test_convolutions_are_no_experts() -> None:
    assert coverage(wrap(tiny("lfm2"), lora=True).model).experts == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [("deepseek-v3", "model.layers.0.mlp.gate_proj"), ("mamba", "backbone.layers.0.mixer.out_proj")],
)
def test_what_peft_would_rewrite_or_refuse_is_left_out_or_said(family: str, name: str) -> None:
    model = tiny(family)
    assert adaptable(model, [name]) == []
    with pytest.raises(UserError, match=rf"PEFT can't adapt '{name}' .*; leave it out of adapter\.targets"):
        wrap(model, lora=True, targets=[name])
