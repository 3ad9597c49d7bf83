"""Optimizers in whole runs: a stop and a resume leave no trace, and averages are what is evaluated and kept."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from folders import at_record, invoke, keys, records, same_file, step_is
from safetensors.torch import load_file

from truetune.assembly import assemble, disk_need
from truetune.errors import UserError
from truetune.optim import averaged
from truetune.spelling import read
from truetune.training.checkpoint import Checkpoints

SHORT = ("evaluation.samples=0", "output.merged=false", "checkpoint.keep=1", "train.steps=6")
RUNS = {
    "soap": ("optimizer.frequency=2",),
    "galore": (
        "adapter.method=full",
        "optimizer.rank=4",
        "optimizer.gap=2",
        "optimizer.takes=[matrices,embeddings,head]",
    ),
    "schedule-free-adamw": ("schedule.name=constant",),
    "prodigy": ("optimizer.rate=1", "optimizer.first=1e-4"),
}


def asked(name: str, model: Path, data: Path, folder: Path) -> list[str]:
    return keys(model, data, folder, *SHORT, f"optimizer.name={name}", *RUNS[name])


@pytest.mark.parametrize("name", ["soap", "schedule-free-adamw", "prodigy"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    name: str, my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = invoke("train", *asked(name, my_model, my_data, straight))
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:
        at_record(patch, step_is(3), lambda: signal.raise_signal(signal.SIGTERM))
        assert invoke("train", *asked(name, my_model, my_data, stopped)).exit_code == 130
    assert invoke("train", "--resume", str(stopped)).exit_code == 0
    losses = [[r["loss"] for r in records(run) if r["kind"] in ("step", "evaluation")] for run in (straight, stopped)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    last = Path("checkpoints") / "step-00000006"
    for file in (straight / last).glob("*.safetensors"):
        assert same_file(file, stopped / last / file.name), file.name


@pytest.mark.parametrize("name", ["prodigy", "schedule-free-adamw", "dog", "adamw-8bit"])
def test_a_run_of_one_step_ends_well(name: str, my_model: Path, my_data: Path, tmp_path: Path) -> None:
    """LoRA's A can't move in it, though rules remember where it began."""
    more = ("train.steps=1", "schedule.warmup=0", "optimizer.rate=1", f"optimizer.name={name}")
    small = ("optimizer.smallest=4", "optimizer.rate=1e-2") if name == "adamw-8bit" else ()
    result = invoke("train", *keys(my_model, my_data, tmp_path / "run", *SHORT, *more, *small))
    assert result.exit_code == 0, result.output


def test_the_average_is_evaluated_kept_and_exported_and_training_goes_on_from_elsewhere(
    my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = asked("schedule-free-adamw", my_model, my_data, folder)
    assert invoke("train", *more, "optimizer.betas=[0.5, 0.999]").exit_code == 0
    tensors, _ = Checkpoints(folder / "checkpoints").load(6)
    assert tensors["averages"].keys() == tensors["weights"].keys()
    z = {name: tensors["optimizer"][f"{name}/z"] for name in tensors["weights"]}
    for name, y in tensors["weights"].items():
        torch.testing.assert_close(tensors["averages"][name], y + (z[name] - y) * (1 - 1 / 0.5))
        assert not torch.equal(tensors["averages"][name], y)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = {t.abs().sum().item() for t in tensors["averages"].values()}
    assert {t.abs().sum().item() for t in adapter.values()} == kept
    trainer = assemble(read(None, [*more, "optimizer.betas=[0.5, 0.999]"]), folder).trainer
    trainer.resume(6)
    before = {n: p.clone() for n, p in trainer.model.trainable().items()}
    evaluated = [r for r in records(folder) if r["kind"] == "evaluation"][-1]["loss"]
    assert trainer.evaluator
    assert trainer.evaluator(trainer.model, 6).loss != evaluated
    with averaged(trainer.optimizer):
        assert trainer.evaluator(trainer.model, 6).loss == evaluated
    assert all(torch.equal(before[n], p) for n, p in trainer.model.trainable().items())
    result = invoke("export", str(folder), "--adapter", "--step", "6", "--to", str(tmp_path / "again"))
    assert result.exit_code == 0, result.output
    assert same_file(folder / "adapter" / "adapter_model.safetensors", tmp_path / "again" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["galore", "schedule-free-adamw"])
def test_the_disk_is_asked_for_what_a_checkpoint_holds(
    name: str, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    more = asked(name, my_model, my_data, tmp_path)
    jobs = [assemble(read(None, [*more, f"checkpoint.keep={keep}"])) for keep in (1, 2)]
    trainer = jobs[0].trainer
    trainer.preflight = trainer.evaluator = trainer.sampler = None
    next(r for r in trainer.steps() if r.kind == "step")
    tensors, _ = trainer.state()
    held = sum(t.nbytes for kind in ("weights", "optimizer", "averages") for t in tensors.get(kind, {}).values())
    small = sum(t.nbytes for n, t in tensors["optimizer"].items() if n.endswith("/step") or "/shared_" in n)
    assert disk_need(jobs[1]) - disk_need(jobs[0]) == held - small


def test_a_rule_that_finds_its_rate_wants_the_rate_written(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    more = [key for key in asked("prodigy", my_model, my_data, tmp_path / "run") if "optimizer.rate" not in key]
    with pytest.raises(UserError, match=r'"prodigy" finds its rate, and optimizer.rate multiplies it; set it to 1'):
        assemble(read(None, more))
