"""The preflight passes on healthy runs, restores what it touches, and names each planted fault."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import nn

from truetune.checks.preflight import Preflight, crop, off, stops
from truetune.data.batch import Document
from truetune.models import route as routes
from truetune.models import wrap as wrapping


class Words:
    """A tokenizer that decodes an id to its digits."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


LOADED = SimpleNamespace(tokenizer=Words(), stop_ids=frozenset({2}))


def healthy(family="llama", lora=True, dtype=torch.float32, **options):
    base = tiny(family)
    model = wrap(base.to(dtype) if lora else base, lora, dtype, **options)
    return tiny_trainer(model, random_documents(20, longest=60), tokens_per_step=300, tokens_per_micro_batch=300)


def failures(trainer):
    return {v.name for v in Preflight(LOADED)(trainer).verdicts if not v.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "falcon alibi"])
def test_healthy_runs_pass(family, lora, dtype):
    checks = Preflight(LOADED)(healthy(family, lora, dtype))
    assert [v for v in checks.verdicts if not v.passed] == []
    assert len(checks.verdicts) == 10


def test_everything_is_put_back():
    trainer = healthy(dropout=0.1)
    trainer.model.train()
    before = copy.deepcopy(trainer.model.model.state_dict())
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    torch.manual_seed(3)
    random = torch.get_rng_state()
    Preflight(LOADED)(trainer)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[n], t) for n, t in trainer.model.model.state_dict().items())
    assert str(optimizer) == str(trainer.optimizer.state_dict())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.model.training
    assert trainer.model.hf.config._attn_implementation == routes.ATTENTION


def test_nothing_trainable():
    trainer = healthy()
    trainer.model.requires_grad_(False)
    assert failures(trainer) == {"something is trainable"}


def test_no_targets():
    trainer = healthy()
    for d in trainer.documents:
        d.targets[:] = False
    assert failures(trainer) == {"targets exist"}


def test_turns_without_a_trained_stop():
    good = Document(np.array([5, 6, 2]), np.array([False, True, True]), 0, ends=(2,))
    wrong_token = Document(np.array([5, 6, 7]), np.array([False, True, True]), 1, ends=(2,))
    untrained = Document(np.array([5, 6, 2]), np.array([False, True, False]), 2, ends=(2,))
    assert stops([good], frozenset({2})).passed
    for bad in (wrong_token, untrained):
        verdict = stops([good, bad], frozenset({2}))
        assert not verdict.passed
        assert f"row {bad.row}" in verdict.figure
    assert not stops([good], frozenset()).passed


def test_a_tensor_outside_the_forward():
    trainer = healthy(lora=False)
    trainer.model.hf.register_parameter("lost", nn.Parameter(torch.ones(2)))
    trainer.optimizer.param_groups[0]["params"].append(trainer.model.hf.lost)
    assert failures(trainer) == {"every trained tensor gets a finite gradient", "every trained tensor moved"}


def test_a_tensor_that_no_optimizer_has():
    trainer = healthy()
    trainer.optimizer.param_groups[0]["params"].pop(0)
    assert failures(trainer) == {"every trained tensor moved"}


def test_a_frozen_tensor_that_moves():
    trainer = healthy()
    frozen = next(p for p in trainer.model.parameters() if not p.requires_grad)
    step = trainer.optimizer.step

    def stray():
        step()
        with torch.no_grad():
            frozen.add_(1e-3)

    trainer.optimizer.step = stray
    assert "no frozen tensor moved" in failures(trainer)


def test_a_rate_of_zero():
    trainer = healthy()
    for group in trainer.optimizer.param_groups:
        group["peak"] = 0.0
    assert "every trained tensor moved" in failures(trainer)


def test_a_nan_in_the_weights():
    trainer = healthy(lora=False)
    with torch.no_grad():
        next(trainer.model.parameters())[5] = float("nan")
    assert "every trained tensor gets a finite gradient" in failures(trainer)


def test_a_head_that_is_misread():
    trainer = healthy()
    head = trainer.model.head
    scaled = wrapping.Head(head.weight, head.bias, 1.1, None)
    type(trainer.model).head, original = property(lambda _: scaled), type(trainer.model).head
    try:
        assert failures(trainer) == {"loss equals plain Hugging Face"}
    finally:
        type(trainer.model).head = original


def test_documents_that_leak(monkeypatch):
    trainer = healthy()
    real = routes.packed_attention

    def leaking(q, k, v, lengths, **options):
        return real(q, k, v, (sum(lengths),), **options)

    monkeypatch.setattr(routes, "packed_attention", leaking)
    assert {"neighbours do not change my loss", "neighbours do not change my gradient"} <= failures(trainer)


def test_experts_that_were_not_routed_to_are_named():
    model = tiny("llama")
    experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
    layer = model.model.layers[0].mlp
    layer.experts = experts
    forward = layer.forward
    layer.forward = lambda x: forward(x) + experts[0](x)
    trainer = tiny_trainer(
        wrap_as(model), random_documents(20, longest=60), tokens_per_step=300, tokens_per_micro_batch=300
    )
    checks = Preflight(LOADED)(trainer)
    assert [v for v in checks.verdicts if not v.passed] == []
    assert any("4 belong to experts" in v.figure for v in checks.verdicts)


def wrap_as(model):
    """Wrapped without the proof, which rebuilds the model from its config and knows nothing of the experts."""
    from truetune.models.tail import measure_tail

    tail = measure_tail(model)
    return wrapping.CausalLM(model, tail, routes.Route("flat", routes._flat, routes.ATTENTION, "sdpa"), torch.float32)


def test_long_documents_are_cut_around_their_targets():
    document = Document(np.arange(1000), np.arange(1000) >= 900)
    cut = crop(document, 128)
    assert len(cut) == 128
    assert cut.target_count > 0
    assert not cut.targets[0]


def test_a_step_of_one_long_document_is_checked_too():
    (short,) = random_documents(1, longest=60)
    document = Document(np.tile(short.tokens, 100)[:300], np.tile(short.targets, 100)[:300])
    document.targets[0] = False
    model = wrap(tiny("llama"), lora=True)
    assert failures(tiny_trainer(model, [document], tokens_per_step=300, tokens_per_micro_batch=300)) == set()


def test_shown_marks_the_targets():
    document = Document(np.array([5, 6, 7, 8]), np.array([False, False, True, True]))
    assert Preflight(LOADED).shown(document) == "5 6⟦7 8⟧"


def test_a_model_that_knows_its_rows_by_heart_is_not_accused():
    """A rounded logit moves a loss near zero by as many nats as one near five."""
    assert off(0.0470, 0.0442) == pytest.approx(0.0028)
    assert off(4.7, 4.0) == pytest.approx(0.175)
    assert off(0.5, 0.0) == pytest.approx(0.5)
