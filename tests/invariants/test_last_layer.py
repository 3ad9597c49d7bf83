"""The last layer computed where its output is read: the same training, and less of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import QUICK, random_documents, tiny, wrap
from torch import Tensor, nn

from truetune.data.batch import IGNORE, Batch
from truetune.models import last
from truetune.models.route import choose_route, narrow_disproof
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken


def gradients(model: CausalLM, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    terms = NextToken()(model, batch)
    terms.total.backward()
    found = [p.grad for p in model.trainable().values() if p.grad is not None]
    return [terms.total.detach(), *(g.clone() for g in found)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", [f for f in QUICK if f not in ("gpt2", "falcon alibi")] + ["gemma3", "qwen3"])
def test_in_float64_it_is_the_same_training(family: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of(random_documents(5, seed=3))
    narrow = wrap(tiny(family), lora).double()
    monkeypatch.setenv("TRUETUNE_OFF", "narrow_last_layer")
    wide = wrap(tiny(family), lora).double()
    assert narrow.route.whole is None and wide.route.whole == "turned off by TRUETUNE_OFF"
    with torch.no_grad():
        for model in (narrow, wide):
            torch.manual_seed(5)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    for ours, truth in zip(gradients(narrow, batch), gradients(wide, batch), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("every", [False, True])
def test_the_feed_forward_of_the_last_layer_sees_what_is_read(every: bool) -> None:
    model = wrap(tiny("llama"))
    batch = Batch.of(random_documents(4))
    rows: list[tuple[int, ...]] = []
    layers = model.hf.get_submodule("model.layers")
    for layer in layers:
        layer.get_submodule("mlp").register_forward_pre_hook(lambda _m, args: rows.append(tuple(args[0].shape[:2])))
    read = torch.arange(len(batch.tokens)) if every else (batch.labels != IGNORE).nonzero()[:, 0]
    hidden = model.hidden(batch, read)
    assert rows == [(1, len(batch.tokens)), (1, len(read))]
    torch.testing.assert_close(hidden, model.hidden(batch)[read], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_micro_batch_without_a_target(lora: bool) -> None:
    model = wrap(tiny("llama"), lora)
    documents = random_documents(2)
    without = Batch.of([replace(d, targets=np.zeros_like(d.targets)) for d in documents])
    loss, *found = gradients(model, without)
    assert loss == 0 and not any(g.any() for g in found)


def test_models_that_do_not_allow_it_compute_all() -> None:
    assert "shape" in (wrap(tiny("gpt2")).route.whole or "")  # its layer asks for that of all tokens
    assert wrap(tiny("falcon alibi")).route.whole == "documents run one at a time"


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("of_all", lambda self, q, k, v: (q, k, v)),  # keys of unread rows are lost
        ("of_rows", lambda self, out: out[:, : len(self.rows)]),
        ("rest", property(lambda self: torch.arange(self.tokens)[: self.tokens - len(self.rows)])),
    ],
)
def test_a_broken_one_is_not_taken(name: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    decoder = measure_tail(model).decoder
    monkeypatch.setattr(last.Reading, name, broken)
    assert choose_route(model, decoder).whole


def test_a_layer_that_mixes_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    decoder = measure_tail(model).decoder
    route = choose_route(model, decoder)
    assert narrow_disproof(model, decoder, route) is None
    norm = type(model.model.norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x + x.mean(1, keepdim=True)))
    assert "unread rows" in (narrow_disproof(model, decoder, route) or "")


def test_two_stacks_of_layers() -> None:
    decoder = nn.Module()
    decoder.a, decoder.b = nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="2 stacks"):
        last.narrow(decoder)
