"""What goes around a rule, in whole runs: a resume is the run, averages are what is kept, and nonsense is refused."""

from __future__ import annotations

import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from folders import at_record, invoke, keys, records, same_file, step_is
from safetensors.torch import load_file

from truetune.assembly import assemble, disk_need
from truetune.errors import UserError
from truetune.optim import averaged, kinds_of
from truetune.spelling import read
from truetune.training.checkpoint import Checkpoints

SHORT = ("evaluation.samples=0", "output.merged=false", "checkpoint.keep=1", "train.steps=6", "schedule.name=constant")
RUNS = {
    "mechanic": ("optimizer.mechanic=true", "optimizer.rate=1", "optimizer.ema=0.5", "train.clip_growth=1.01"),
    "nap": ("adapter.method=full", "optimizer.nap=true", "optimizer.ema=0.9", "optimizer.name=muon"),
    "momo-adam": ("optimizer.name=momo-adam", "train.clip=none", "optimizer.ema=0.9"),
}


def asked(case: str, model: Path, data: Path, folder: Path) -> list[str]:
    return keys(model, data, folder, *SHORT, *RUNS[case])


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    case: str, my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    result = invoke("train", *asked(case, my_model, my_data, straight))
    assert result.exit_code == 0, result.output
    with monkeypatch.context() as patch:
        at_record(patch, step_is(3), lambda: signal.raise_signal(signal.SIGTERM))
        assert invoke("train", *asked(case, my_model, my_data, stopped)).exit_code == 130
    assert invoke("train", "--resume", str(stopped)).exit_code == 0
    losses = [[r["loss"] for r in records(run) if r["kind"] in ("step", "evaluation")] for run in (straight, stopped)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    last = Path("checkpoints") / "step-00000006"
    for file in (straight / last).glob("*.safetensors"):
        assert same_file(file, stopped / last / file.name), file.name


def test_the_average_is_evaluated_kept_and_exported(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = [*keys(my_model, my_data, folder, *SHORT), "optimizer.ema=0.5"]
    assert invoke("train", *more).exit_code == 0
    tensors, _ = Checkpoints(folder / "checkpoints").load(6)
    assert tensors["averages"].keys() == tensors["weights"].keys()
    assert all(torch.equal(t, tensors["optimizer"][f"{n}/around_ema_average"]) for n, t in tensors["averages"].items())
    assert not any(torch.equal(t, tensors["weights"][n]) for n, t in tensors["averages"].items())
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = {t.abs().sum().item() for t in tensors["averages"].values()}
    assert {t.abs().sum().item() for t in adapter.values()} == kept
    trainer = assemble(read(None, more), folder).trainer
    trainer.resume(6)
    evaluated = [r for r in records(folder) if r["kind"] == "evaluation"][-1]["loss"]
    assert trainer.evaluator
    assert trainer.evaluator(trainer.model, 6).loss != evaluated
    with averaged(trainer.optimizer):
        assert trainer.evaluator(trainer.model, 6).loss == evaluated


@pytest.mark.parametrize("case", RUNS)
def test_the_disk_is_asked_for_what_a_checkpoint_holds(
    case: str, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    more = asked(case, my_model, my_data, tmp_path)
    jobs = [assemble(read(None, [*more, f"checkpoint.keep={keep}"])) for keep in (1, 2)]
    trainer = jobs[0].trainer
    trainer.preflight = trainer.evaluator = trainer.sampler = None
    next(r for r in trainer.steps() if r.kind == "step")
    tensors, _ = trainer.state()
    held = sum(t.nbytes for kind in ("weights", "optimizer", "averages") for t in tensors.get(kind, {}).values())
    small = sum(t.nbytes for n, t in tensors["optimizer"].items() if n.endswith("/step") or "/shared_" in n)
    assert disk_need(jobs[1]) - disk_need(jobs[0]) == held - small


def test_what_a_recipe_puts_around_a_rule_does_its_work(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    more = ("adapter.method=full", "optimizer.nap=true", "train.clip_growth=1.001", "train.clip=none")
    trainer = assemble(read(None, keys(my_model, my_data, tmp_path / "run", *SHORT, *more))).trainer
    trainer.preflight = trainer.evaluator = trainer.sampler = None
    kinds = kinds_of(trainer.model.model, trainer.model.head.weight)
    start = {name: p.detach().clone() for name, p in trainer.model.trainable().items()}
    norms = []
    for record in trainer.steps():
        if record.kind == "step":
            joint = next(iter(trainer.optimizer.state.values()))
            norms.append((float(joint["shared_growth_norm"]), record.gradient_norm))
    for name, p in trainer.model.trainable().items():
        kept = torch.allclose(p.norm(), start[name].norm(), rtol=1e-5)
        assert kept == (kinds[name] == "matrices") and not torch.equal(p, start[name]), name
    assert any(limited < 0.99 * own for limited, own in norms), "else nothing was held back"
    assert all(after <= 1.0011 * before for (before, _), (after, _) in pairwise(norms))


def test_a_run_of_one_step_moves_all_that_can(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    """LoRA's A has no gradient in it, though something around the rule remembers A."""
    more = [*asked("mechanic", my_model, my_data, tmp_path / "run"), "train.steps=1", "schedule.warmup=0"]
    result = invoke("train", *more)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["optimizer.mechanic=true", "optimizer.name=prodigy"], 'mechanic means nothing with optimizer "prodigy", whi'),
        (["optimizer.mechanic=true", "optimizer.name=schedule-free-sgd"], "keeps an average of its weights; remove it"),
        (
            ["optimizer.mechanic=true", "optimizer.name=momo", "train.clip=none"],
            "takes its rate from the loss; remove",
        ),
        (["optimizer.ema=0.9", "optimizer.name=dog"], 'ema means nothing with optimizer "dog", which keeps an average'),
        (["optimizer.ema=1"], "optimizer.ema"),
        (["optimizer.nap=true"], "optimizer.nap means nothing with adapter.method=lora"),
        (
            ["optimizer.nap=true", "adapter.method=full", "optimizer.mechanic=true"],
            "optimizer.nap means nothing with optimizer.mechanic",
        ),
        (
            ["optimizer.nap=true", "adapter.method=full", "optimizer.name=schedule-free-adamw"],
            'optimizer.nap means nothing with optimizer "schedule-free-adamw"',
        ),
        (["optimizer.name=momo"], "so it must not be clipped; set train.clip=none"),
        (["optimizer.name=momo", "train.clip=none", "train.clip_growth=1.01"], "set train.clip_growth=none"),
        (["train.clip_growth=1"], "train.clip_growth"),
    ],
)
def test_what_means_nothing_is_refused(
    my_model: Path, my_data: Path, tmp_path: Path, wrong: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        assemble(read(None, keys(my_model, my_data, tmp_path / "run", *SHORT, *wrong)))


def test_mechanic_wants_the_rate_written(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    more = keys(my_model, my_data, tmp_path / "run", *SHORT, "optimizer.mechanic=true")
    with pytest.raises(UserError, match=r"optimizer\.mechanic finds its rate, and .* multiplies it; set it to 1"):
        assemble(read(None, [key for key in more if "optimizer.rate" not in key]))
