"""Layers of one input compute together, and nobody can tell but by the clock."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from tiny import QUICK, random_documents, tiny, wrap
from torch import Tensor, nn

from truetune.data.batch import Batch
from truetune.models.adapt import FusedLoraLinear, lora_layers, unfused
from truetune.models.together import Together, of_one_input


def doubled(x: Tensor, layers: Any) -> list[Tensor]:
    doubled.calls += 1  # type: ignore[attr-defined]
    return [layer(x) for layer in layers]


@pytest.fixture
def pair() -> Together:
    doubled.calls = 0  # type: ignore[attr-defined]
    return Together([nn.Linear(3, 2), nn.Linear(3, 4)], doubled)


def test_one_computation_for_all(pair: Together) -> None:
    x = torch.randn(5, 3)
    for _ in range(2):
        outputs = [pair.output(layer, x) for layer in pair.layers]
        assert all(torch.equal(y, layer(x)) for y, layer in zip(outputs, pair.layers, strict=True))
    assert doubled.calls == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["written to", "gradients", "another", "trained", "forgotten"])
def test_nothing_of_before_is_given_out(pair: Together, change: str) -> None:
    first, second = pair.layers
    x = torch.randn(5, 3)
    with torch.no_grad():
        pair.output(first, x)
        if change == "written to":
            x.mul_(2)
        if change == "another":
            x = x.clone()
        if change == "trained":
            second.weight.add_(1)
        if change == "forgotten":
            pair.forget()
    with torch.set_grad_enabled(change == "gradients"):
        y = pair.output(second, x)
    assert torch.equal(y, second(x))
    assert y.requires_grad == (change == "gradients")
    assert doubled.calls == 2  # type: ignore[attr-defined]


def test_a_layer_called_twice(pair: Together) -> None:
    x, first = torch.randn(5, 3), pair.layers[0]
    assert torch.equal(pair.output(first, x), pair.output(first, x))


def test_nothing_is_held_once_all_are_given_out(pair: Together) -> None:
    x = torch.randn(5, 3)
    for layer in pair.layers:
        pair.output(layer, x)
    assert pair._x is None
    assert not pair._waiting


def test_a_copy_is_of_the_layers_and_holds_nothing(pair: Together) -> None:
    x = torch.randn(5, 3)
    pair.output(pair.layers[0], x)
    made = copy.deepcopy(pair)
    assert not made._waiting
    assert made.layers[0] is not pair.layers[0]
    assert torch.equal(made.output(made.layers[1], x), pair.output(pair.layers[1], x))


def test_queries_keys_and_values_are_found() -> None:
    names = {tuple(n.rsplit(".", 1)[-1] for n in group) for group in of_one_input(tiny("llama"))}
    assert names == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert of_one_input(tiny("gpt2")) == []  # there queries, keys and values are one layer


@pytest.mark.parametrize("family", QUICK)
def test_a_model_computes_as_without(family: str) -> None:
    model = wrap(tiny(family), lora=True).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    batch = Batch.of(random_documents(3))
    found = []
    for context in (contextlib.nullcontext, lambda: unfused(model)):
        model.zero_grad()
        with context():
            hidden = model.hidden(batch)
        hidden.sin().sum().backward()
        found.append([hidden.detach(), *(p.grad for p in model.trainable().values() if p.grad is not None)])
    together = [layer for layer in lora_layers(model).values() if getattr(layer, "together", None)]
    assert len(together) == {"llama": 10, "mistral": 10, "qwen2": 10, "gemma2": 10}.get(family, 0)
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_an_adapter_that_is_turned_off_alone() -> None:
    model = wrap(tiny("llama"), lora=True)
    layers = [m for m in lora_layers(model).values() if isinstance(m, FusedLoraLinear) and m.together]
    layers[0].enable_adapters(False)
    x = torch.randn(2, layers[0].in_features)
    assert torch.equal(layers[0](x), layers[0].base_layer(x))
    assert torch.equal(layers[1](x), layers[1].base_layer(x))  # B is zero
