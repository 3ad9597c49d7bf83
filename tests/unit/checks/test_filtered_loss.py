"""A run that filters its gradient: the key has its effect, losses stay, and the preflight says what it changes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders import facts, invoke, keys, records, write_model
from tiny import random_documents, tiny, tiny_trainer, wrap

from truetune.assembly import assemble
from truetune.checks.preflight import Preflight
from truetune.objectives.next_token import NextToken
from truetune.spelling import read
from truetune.training.record import Verdict
from truetune.training.trainer import Trainer

# The package exports the operation under the name of its module.
loss = sys.modules["truetune.kernels.linear_cross_entropy"]
NAME = "filtering hardly changes the gradient"


def filtering(dtype: torch.dtype = torch.bfloat16) -> Trainer:
    model = wrap(tiny("llama").to(dtype), True, dtype)
    documents = random_documents(20, longest=60)
    trainer = tiny_trainer(model, documents, tokens_per_step=300, tokens_per_micro_batch=300)
    trainer.objective = NextToken(filtered=True)
    return trainer


def verdicts(trainer: Trainer) -> dict[str, Verdict]:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    checks = Preflight(SimpleNamespace(tokenizer=tokenizer, stop_ids=frozenset({2})))(trainer)  # type: ignore[arg-type]
    return {v.name: v for v in checks.verdicts}


def test_what_it_changes_is_measured_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(filtering())
    assert found[NAME].passed and found[NAME].figure == "0.0e+00 relative, bound 1e-01"  # nothing is small here
    monkeypatch.setattr(loss, "filter_threshold", lambda _: 0.9)  # all but labels is
    monkeypatch.setattr(loss, "FEW", 1.0)
    assert found[NAME].passed and found[NAME].figure != verdicts(filtering())[NAME].figure
    merged = loss._Sweep._merged

    def losing_the_rest(*arguments: Any) -> Any:
        slopes = merged(*arguments)
        return slopes if slopes.share_V is None else slopes._replace(share_V=torch.zeros_like(slopes.share_V))

    monkeypatch.setattr(loss._Sweep, "_merged", losing_the_rest)
    found = verdicts(filtering())
    assert [name for name, verdict in found.items() if not verdict.passed] == [NAME]
    assert "remove train.filtered_loss" in found[NAME].advice


def test_without_it_nothing_is_said_of_it() -> None:
    trainer = filtering()
    trainer.objective = trainer.objective.exact
    assert not trainer.objective.filtered and NAME not in verdicts(trainer)


def test_the_key_reaches_the_loss(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    for more, filtered in (((), False), (("train.filtered_loss=true",), True)):
        objective = assemble(read(None, keys(my_model, my_data, tmp_path / str(filtered), *more))).trainer.objective
        assert objective.filtered == filtered and not objective.exact.filtered


def test_a_run_takes_other_steps_and_tells_losses_as_they_are(
    my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "filter_threshold", lambda _: 0.02)
    monkeypatch.setattr("truetune.checks.preflight.GRADIENT_BOUND", {torch.float32: 1.0, torch.bfloat16: 1.0})
    model = write_model(tmp_path / "model", "llama")
    for key in ("false", "true"):
        given = keys(model, my_data, tmp_path / key, "train.steps=2", f"train.filtered_loss={key}")
        result = invoke("train", *given)
        assert result.exit_code == 0, result.output
        assert facts(tmp_path / key)["recipe"]["train"]["filtered_loss"] == (key == "true")
    exact, filtered = (records(tmp_path / key) for key in ("false", "true"))
    steps, others = ([r for r in all_ if r["kind"] == "step"] for all_ in (exact, filtered))
    assert others[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-6)
    assert others[0]["gradient_norm"] != pytest.approx(steps[0]["gradient_norm"], rel=1e-3)
    held, others_held = ([r["loss"] for r in all_ if r["kind"] == "evaluation"] for all_ in (exact, filtered))
    assert others_held[0] == pytest.approx(held[0], rel=1e-6) and others_held[-1] != held[-1]
