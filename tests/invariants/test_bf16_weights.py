"""Runs whose trained weights are kept in bf16 alone: checked, learned, resumed and exported as any other."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from folders import at_record, facts, invoke, keys, records, same_file, step_is, write_model

from truetune.assembly import assemble, disk_need
from truetune.errors import UserError
from truetune.spelling import read
from truetune.training.checkpoint import Checkpoints
from truetune.training.record import Step

LOW = ("model.weights=bf16", "model.precision=bf16")
SHORT = (
    "evaluation.samples=1",
    "checkpoint.keep=1",
    "train.steps=6",
    "optimizer.rate=2e-3",
    "optimizer.weight_decay=0.1",
)
FULL = "adapter.method=full"
RUNS = {
    "dora": ("llama", ("adapter.dora=true", "adapter.also=[embeddings, norms]")),
    "pissa": ("gpt2", ("adapter.init=pissa", "optimizer.ema=0.9")),
    "full": ("qwen2", (FULL, "optimizer.name=schedule-free-adamw")),
    "muon": ("qwen2", (FULL, "optimizer.name=muon", "optimizer.nap=true", "train.activation_memory=0.001")),
}


def asked(case: str, data: Path, folder: Path, *more: str) -> list[str]:
    family, own = RUNS[case]
    model = folder.parent / family
    if not model.is_dir():
        write_model(model, family)
    return keys(model, data, folder, *SHORT, *own, *LOW, *more)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    case: str, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it exports has been read back, and weights and state are what they are said to be."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = invoke("train", *asked(case, my_data, straight))
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:
        at_record(patch, step_is(3), lambda: signal.raise_signal(signal.SIGTERM))
        assert invoke("train", *asked(case, my_data, stopped)).exit_code == 130
    assert invoke("train", "--resume", str(stopped)).exit_code == 0
    losses = [[r["loss"] for r in records(run) if r["kind"] in ("step", "evaluation")] for run in (straight, stopped)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    last = Path("checkpoints") / "step-00000006"
    for file in (straight / last).glob("*.safetensors"):
        assert same_file(file, stopped / last / file.name), file.name
    tensors, _ = Checkpoints(straight / "checkpoints").load(6)
    trained = tensors["weights"].items()
    assert {(p.ndim > 1, p.dtype) for n, p in trained if ".start." not in n} <= {
        (True, torch.bfloat16),
        (False, torch.float32),
    }
    assert not any(state.dtype == torch.bfloat16 for state in tensors["optimizer"].values())
    assert not facts(straight)["void"]


def test_weights_and_gradients_take_half_and_disks_are_told_what_comes(my_data: Path, tmp_path: Path) -> None:
    sizes, needs = [], []
    for more in ((), ("model.weights=fp32",)):
        job = assemble(read(None, asked("full", my_data, tmp_path / "run", *more)), tmp_path / "run")
        trainer = job.trainer
        next(r for r in trainer.steps() if isinstance(r, Step))
        matrices = [p for p in trainer.model.trainable().values() if p.ndim > 1]
        sizes.append(sum(p.nbytes for p in matrices))
        needs.append(disk_need(job))
        tensors, _ = trainer.state()
        assert sum(t.nbytes for part in tensors.values() for t in part.values()) * 3 < needs[-1]
    assert sizes[1] == 2 * sizes[0] and needs[0] < needs[1]


def test_a_step_whose_updates_are_below_half_a_step_of_bf16_moves_some_weights(my_data: Path, tmp_path: Path) -> None:
    asked_ = asked(
        "full", my_data, tmp_path / "run", "optimizer.name=adamw", "optimizer.rate=1e-6", "schedule.warmup=0"
    )
    trainer = assemble(read(None, asked_)).trainer
    trainer.preflight = None
    matrices = {n: p for n, p in trainer.model.trainable().items() if p.ndim > 1}
    before = {n: p.detach().clone() for n, p in matrices.items()}
    next(r for r in trainer.steps() if isinstance(r, Step))
    large = {n: x.abs() > 1e-3 for n, x in before.items()}  # whose half step of bf16 is 2e-6 or more
    moved = torch.cat([(p.detach() != before[n])[large[n]] for n, p in matrices.items()])
    assert 0 < float(moved.float().mean()) < 0.1


def test_what_computes_in_fp32_refuses_bf16_weights(my_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.weights=bf16 does not go with model.precision=fp32.*set model.prec"):
        read(None, asked("dora", my_data, tmp_path / "run", "model.precision=fp32"))
    job = assemble(read(None, [k for k in asked("dora", my_data, tmp_path / "run") if "precision" not in k]))
    assert job.trainer.model.dtype == torch.bfloat16, "auto computes in what the weights have"
