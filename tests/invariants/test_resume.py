"""Stopped at any step and resumed = straight through, bit for bit."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import random_documents, tiny, tiny_trainer, wrap

from truetune.errors import UserError
from truetune.objectives.next_token import NextToken
from truetune.training.checkpoint import Checkpoints
from truetune.training.evaluate import Evaluator
from truetune.training.record import Saved, Step

STEPS = 6


METHODS = {
    "full": None,
    "lora": {"dropout": 0.3},
    "pissa": {"dropout": 0.3, "init": "pissa"},
    "dora, norms": {"dora": True, "also": "norms"},
}


def trainer_in(folder, method):
    """A run with dropout, evaluation and keep-best, so that random state and the best step matter."""
    options = METHODS[method]
    model = wrap(tiny("gpt2", resid_pdrop=0.2), options is not None, **(options or {}))
    documents = random_documents(30)
    trainer = tiny_trainer(
        model,
        documents,
        rate=1e-2,
        schedule="cosine",
        length={"steps": STEPS},
        checkpoints=Checkpoints(folder, keep=99),
        save_every=1,
        evaluate_every=2,
        evaluator=Evaluator(documents[:5], 128, NextToken()),
        keep_best=True,
    )
    torch.manual_seed(7)
    return trainer


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.trainable().items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_step_resumes_bit_for_bit(tmp_path, method):
    straight = trainer_in(tmp_path / "straight", method)
    records = [r for r in straight.steps() if isinstance(r, Step)]
    end = weights(straight)
    for step in range(1, STEPS + 1):
        again = trainer_in(tmp_path / "straight", method)
        again.checkpoints = Checkpoints(tmp_path / "straight", keep=99)
        torch.manual_seed(99)  # whatever the random state was, the checkpoint's counts
        again.resume(step)
        rest = [r for r in again.steps() if isinstance(r, Step)]
        assert [(r.step, r.loss, r.rate, r.gradient_norm) for r in rest] == [
            (r.step, r.loss, r.rate, r.gradient_norm) for r in records[step:]
        ]
        assert all(torch.equal(end[n], p) for n, p in weights(again).items())
        assert again.best.step == straight.best.step


def test_the_start_of_pissa_comes_from_the_checkpoint(tmp_path):
    """Another machine's singular vectors may have other signs: what was subtracted must go on being subtracted."""
    straight = trainer_in(tmp_path, "pissa")
    list(straight.steps())
    again = trainer_in(tmp_path, "pissa")
    frozen = [p for n, p in again.model.kept().items() if not p.requires_grad]
    with torch.no_grad():
        for p in frozen:
            p.neg_()
    again.resume(3)
    list(again.steps())
    assert frozen and all(torch.equal(weights(straight)[n], p) for n, p in weights(again).items())


def test_a_stop_is_saved_at_the_boundary(tmp_path):
    trainer = trainer_in(tmp_path, "lora")
    trainer.save_every = None
    seen = []
    for record in trainer.steps():
        seen.append(record)
        if isinstance(record, Step) and record.step == 3:
            trainer.stop = True
    assert isinstance(seen[-1], Saved)
    assert (seen[-1].step, seen[-1].reason) == (3, "interrupted")
    assert trainer.checkpoints.newest() == (3, [])


def test_a_long_time_without_a_save_ends_in_one(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path, "lora")
    trainer.save_every, trainer.keep_best, trainer.save_minutes = None, False, 30
    clock = itertools.count(0, 60)  # a minute from one look to the next
    monkeypatch.setattr(
        "truetune.training.trainer.time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    )
    trainer._saved = -28 * 60
    saved = [r for r in trainer.steps() if isinstance(r, Saved)]
    assert [(r.step, r.reason) for r in saved] == [(3, "time"), (STEPS, "end")]


def test_optimizer_state_matters(tmp_path):
    """The test above would see a resume that forgets the moments."""
    straight = trainer_in(tmp_path, "full")
    list(straight.steps())
    again = trainer_in(tmp_path, "full")
    again.resume(3)
    again.optimizer.state.clear()
    list(again.steps())
    assert any(not torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))


def test_another_models_checkpoint_is_refused(tmp_path):
    list(trainer_in(tmp_path, "lora").steps())
    with pytest.raises(UserError, match="train different tensors"):
        trainer_in(tmp_path, "full").resume(2)
