"""Weights moved within the backward pass: the same run, with a part of the gradient in memory, and never by NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor

from truetune.optim import EMA, KINDS, OPTIMIZERS, enough, kinds_of, parameter_groups, steps_apart
from truetune.training import parts, trainer
from truetune.training.gradient import NonFinite
from truetune.training.record import Step
from truetune.training.trainer import Trainer

SMALL = 1 << 12
STEPS = 4


@pytest.fixture(autouse=True)
def _many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", SMALL)
    monkeypatch.setattr(trainer, "PART", SMALL)


def run_of(family: str = "llama", rule: str = "adamw", **chosen: Any) -> Trainer:
    """A run of one micro-batch a step that does not clip."""
    chosen = {"clip": None, "tokens_per_step": 60, "tokens_per_micro_batch": 200, "length": {"steps": STEPS}} | chosen
    made = tiny_trainer(wrap(tiny(family)), random_documents(30), **chosen)
    named, kinds = made.model.trainable(), kinds_of(made.model.model, made.model.head.weight)
    takes = getattr(OPTIMIZERS[rule], "takes", KINDS)
    rate = 1e-3 * enough(OPTIMIZERS[rule])
    groups = parameter_groups(named.items(), rate, rest={name for name in named if kinds[name] not in takes})
    made.optimizer = OPTIMIZERS[rule](groups, rate)
    return made


def taken(run: Trainer) -> list[Step]:
    return [record for record in run.steps() if isinstance(record, Step)]


def kept(run: Trainer) -> dict[str, Tensor]:
    tensors, _ = run.state()
    return tensors["weights"] | {f"optimizer/{name}": t for name, t in tensors["optimizer"].items()}


def calls(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gradients that there are at each step of the optimizer, in bytes."""
    sizes: list[int] = []
    step: Callable[..., Any] = run.optimizer.step

    def counted(*args: Any) -> Any:
        sizes.append(sum(p.grad.nbytes for p in run.model.trainable().values() if p.grad is not None))
        return step(*args)

    monkeypatch.setattr(run.optimizer, "step", counted)
    return sizes


APART = sorted(name for name in OPTIMIZERS if steps_apart(run_of(rule=name).optimizer))


def test_rules_whose_parameters_decide_together_step_together() -> None:
    together = {"dadapt-adam", "dog", "mezo", "momo", "momo-adam", "prodigy"}
    assert set(OPTIMIZERS) - set(APART) == together
    assert not steps_apart(EMA(OPTIMIZERS["sgd"]([{"params": [torch.zeros(2, requires_grad=True)]}], 1e-3), 0.9))


@pytest.mark.parametrize(
    ("family", "rule"),
    [("llama", rule) for rule in APART] + [(family, "adamw") for family in ("gpt2", "gemma2", "qwen2", "mixtral")],
)
def test_the_run_is_the_same(family: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(family, rule)
    sizes = calls(run, monkeypatch)
    steps = taken(run)
    monkeypatch.setenv("TRUETUNE_OFF", "step_by_parts")
    whole = run_of(family, rule)
    at_once = calls(whole, monkeypatch)
    truth = taken(whole)
    assert len(at_once) == STEPS and len(sizes) >= 3 * STEPS
    largest = max(p.nbytes for p in run.model.trainable().values())
    assert max(sizes) < SMALL + largest < at_once[0]
    assert [s.loss for s in steps] == [s.loss for s in truth]
    assert [s.gradient_norm for s in steps] == pytest.approx([s.gradient_norm for s in truth], rel=1e-5)
    assert [s.gradient_norm_l1 for s in steps] == pytest.approx([s.gradient_norm_l1 for s in truth], rel=1e-5)
    expected, found = kept(whole), kept(run)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert not any(p.grad is not None for p in run.model.trainable().values())


def test_layers_that_are_computed_again_see_the_weights_that_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for off in ("", "step_by_parts"):
        monkeypatch.setenv("TRUETUNE_OFF", off)
        run = run_of()
        run.model.keep_within(0)
        taken(run)
        runs.append(kept(run))
    assert all(torch.equal(runs[0][name], tensor) for name, tensor in runs[1].items())


@pytest.mark.parametrize(
    "chosen", [{"clip": 1.0}, {"tokens_per_micro_batch": 40}, {"rule": "prodigy"}], ids=["clip", "two", "together"]
)
def test_what_asks_for_the_whole_gradient_gets_it(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(**chosen)
    sizes = calls(run, monkeypatch)
    assert len(taken(run)) == len(sizes)


@pytest.mark.parametrize("ahead", [False, True], ids=["read at once", "read later"])
def test_a_gradient_that_is_no_number_reaches_no_weight(
    ahead: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It begins in the midst: what came before it in the backward pass has moved, and nothing from it on."""
    monkeypatch.setattr(Trainer, "_runs_ahead", ahead)
    run = run_of(failures=tmp_path)
    weights = run.model.trainable()
    names = list(weights)
    broken = next(name for name in names if "layers.1.mlp.up" in name)
    weights[broken].register_hook(lambda g: g * float("nan"))
    before = {name: p.detach().clone() for name, p in weights.items()}
    said = "the gradient norm of step 1 is nan; weights that came before it have moved, so go on from a checkpoint; "
    with pytest.raises(NonFinite, match=f"{said}batch and random state are in .*failure-step-1; lower the rate"):
        taken(run)
    moved = {name for name in names if not torch.equal(weights[name], before[name])}
    assert all(torch.isfinite(tensor).all() for tensor in kept(run).values())
    assert broken not in moved and not any("layers.0." in name for name in moved)
    assert any("layers.1." in name for name in moved)
    assert not (tmp_path / "failure-step-1" / "checkpoint-0").exists()
