"""Parts of a model that are computed by our kernels: only what is proven, and the same model otherwise."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES
from interpreted import exact
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor, nn

from truetune.kernels.native.build import kernels
from truetune.kernels.product import available
from truetune.kernels.triton import KERNELS, switched_on
from truetune.models.swap import Swapped, swap, unswapped
from truetune.training.record import Step

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

plainly = contextlib.nullcontext


def swapped(model: nn.Module) -> Counter[str]:
    names = [type(m).__name__ for m in model.modules() if isinstance(m, Swapped)]
    return Counter(name for name in names if not name.endswith("DecoderLayer"))  # the last one has tests of its own


@pytest.mark.parametrize(
    ("family", "expected", "linears"),
    [
        ("llama", {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}, 14),
        ("qwen3", {"Qwen3Attention": 2, "Qwen3MLP": 2, "Qwen3RMSNorm": 9}, 14),
        ("gemma2", {"Gemma2Attention": 2, "Gemma2MLP": 2, "Gemma2RMSNorm": 9}, 14),
        ("granite", {"GraniteAttention": 2, "GraniteMLP": 2, "GraniteRMSNorm": 5}, 14),
        ("gpt2", {}, 0),
        ("opt", {}, 12),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_swapped(family: str, expected: dict[str, int], linears: int, lora: bool) -> None:
    trained = {} if lora or not linears or not available() else {"_OurLinear": linears}
    assert swapped(wrap(tiny(family), lora, torch.bfloat16)) == expected | trained
    assert swapped(wrap(tiny(family), lora, torch.float32)) == expected


class Norm(nn.Module):
    """An RMS norm, or something like one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(24) + 0.5)
        self.eps, self.how = 1e-5, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "centred":
            x = x - x.mean(-1, keepdim=True)
        size = x.abs().mean(-1, keepdim=True) ** 2 if self.how == "l1" else x.square().mean(-1, keepdim=True)
        scale = 1 / (size.sqrt() + self.eps) if self.how == "outside" else torch.rsqrt(size + self.eps)
        return x * scale * (self.weight + (2 if self.how == "two" else 0))


class Gated(nn.Module):
    """A gated feed-forward, its layers in an order of their own."""

    def __init__(self, activation: Any, clip: float | None = None) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(40, 24), nn.Linear(24, 40), nn.Linear(24, 40)
        self.activation, self.clip = activation, clip

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.b(x)) * self.a(x)
        return self.c(hidden if self.clip is None else hidden.clamp(max=self.clip))


@pytest.mark.parametrize(
    ("module", "taken"),
    [
        (Norm("rms"), True),
        (Norm("centred"), False),
        (Norm("l1"), False),
        (Norm("outside"), False),
        (Norm("two"), False),
        (Gated(nn.SiLU()), True),
        (Gated(nn.GELU()), False),  # torch's own is as fast
        (Gated(nn.GELU("tanh")), True),
        (Gated(nn.ReLU()), False),
        (Gated(nn.SiLU(), clip=1.0), False),
    ],
)
def test_what_computes_something_else_is_left_alone(module: nn.Module, taken: bool) -> None:
    before = {name: p.clone() for name, p in module.named_parameters()}
    x = torch.randn(5, 24)
    expected = module(x)
    assert swap(module, plainly) == taken == isinstance(module, Swapped)
    assert torch.allclose(module(x), expected, atol=1e-5)
    after = dict(module.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.grad is None for p in after.values())


PARTS = {"rms_norm": "LlamaRMSNorm", "gated": "LlamaMLP", "rope": "LlamaAttention"}


@pytest.mark.parametrize("on", [(), *((name,) for name in PARTS), tuple(PARTS)])
def test_a_device_swaps_what_it_has_an_equal_for(on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of GPUs in the place of this processor's, which are turned off."""
    monkeypatch.setenv("TRUETUNE_OFF", "native_pointwise")
    assert not any(KERNELS[name].has_equal(torch.device("cuda")) for name in PARTS), "none has been chosen"
    with exact(), switched_on("cpu", *on) if on else plainly():
        assert swapped(wrap(tiny("llama"))).keys() == {PARTS[name] for name in on}


@pytest.mark.parametrize("name", PARTS)
def test_what_errs_on_the_device_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = KERNELS[name]

    def wrong(*arguments: Any, **options: Any) -> Any:
        right: Any = op.reference(*arguments, **options)
        return right * 1.001 if isinstance(right, Tensor) else (right[0] * 1.001, right[1])

    monkeypatch.setitem(op.equals, "cpu", wrong)
    assert swapped(wrap(tiny("llama"))).keys() == {part for other, part in PARTS.items() if other != name}


def test_dropout_in_adapters_is_in_nobodys_way() -> None:
    model = wrap(tiny("llama"), True, dropout=0.3)
    assert swapped(model)["LlamaMLP"] == 2 and all(m.training for m in model.modules() if isinstance(m, nn.Dropout))


def test_it_is_taken_off_copied_and_saved_as_its_authors_wrote_it() -> None:
    model = wrap(tiny("llama"))
    found = swapped(model)
    assert found and swapped(copy.deepcopy(model)) == found
    with model.as_published() as published:
        assert not swapped(published)
    with unswapped(model.hf):
        assert not swapped(model)
    assert swapped(model) == found
    assert list(model.hf.state_dict()) == list(tiny("llama").state_dict())


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_OFF", "native_pointwise")
    assert not swapped(wrap(tiny("llama")))


def test_training_is_what_it_was_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        trainer = tiny_trainer(wrap(tiny("qwen3")), random_documents(60), length={"steps": 6})
        return [record.loss for record in trainer.steps() if isinstance(record, Step)]

    assert "qwen3" in FAMILIES
    ours = losses()
    monkeypatch.setenv("TRUETUNE_OFF", "native_pointwise")
    assert ours == pytest.approx(losses(), rel=1e-5)
