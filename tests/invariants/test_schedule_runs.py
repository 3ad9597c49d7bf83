"""Schedules that look beyond the step, in whole runs: at tokens, at an earlier run, and at more than one end."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
from folders import at_record, facts, invoke, keys, records, same_file, step_is
from safetensors.torch import load_file

from truetune.assembly import assemble, disk_need
from truetune.spelling import read
from truetune.training.checkpoint import Checkpoints

SHORT = ("evaluation.samples=0", "evaluation.every=8", "output.merged=false", "checkpoint.keep=1")
BRANCH = tuple(f"schedule.{option}" for option in ("name=wsd-s", "warmup=1", "budgets=[3]", "decay=2", "shape=linear"))


def run(model: Path, data: Path, folder: Path, *more: str) -> Path:
    result = invoke("train", *keys(model, data, folder, *SHORT, *more))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def branch(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with a budget at 3, that keeps one checkpoint else."""
    return run(my_model, my_data, tmp_path_factory.mktemp("branch") / "run", *BRANCH, "checkpoint.keep_best=false")


def steps(folder: Path) -> list[dict]:
    return [r for r in records(folder) if r["kind"] == "step"]


def test_a_budget_is_evaluated_and_its_checkpoint_stays_whatever_else_is_dropped(branch: Path) -> None:
    rates = [s["rate"] / 1e-2 for s in steps(branch)]
    assert rates == pytest.approx([1, 1, 0.55, 1, 1, 1, 1, 0.55])
    assert [r["step"] for r in records(branch) if r["kind"] == "evaluation"] == [0, 3, 8]
    assert {r["step"]: r["reason"] for r in records(branch) if r["kind"] == "saved"}[3] == "budget"
    assert Checkpoints(branch / "checkpoints").steps() == [3, 8]


def test_the_checkpoint_of_a_budget_leaves_by_itself(branch: Path) -> None:
    result = invoke("export", str(branch), "--adapter", "--step", "3")
    assert result.exit_code == 0, result.output
    (exported,) = (e for e in facts(branch)["exports"] if e["path"].endswith("adapter-step-3"))
    assert exported["passed"] and "weights of step 3" in exported["note"]
    assert "weights of step 3" in (branch / "adapter-step-3" / "README.md").read_text()
    adapter = load_file(branch / "adapter-step-3" / "adapter_model.safetensors")
    kept = load_file(branch / "checkpoints" / "step-00000003" / "weights.safetensors")
    assert sorted(map(float, map(abs_sum, adapter.values()))) == sorted(map(float, map(abs_sum, kept.values())))
    assert not same_file(
        branch / "adapter-step-3" / "adapter_model.safetensors", branch / "adapter" / "adapter_model.safetensors"
    )
    result = invoke("export", str(branch), "--adapter", "--step", "4")
    assert result.exit_code == 2 and "kept no checkpoint of step 4 (of these: 3, 8); choose" in result.stderr


def abs_sum(tensor):
    return tensor.abs().sum()


def test_a_refined_schedule_is_found_again_from_any_folder(
    branch: Path, my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(branch.parent)
    result = invoke(
        "train",
        "--dry-run",
        *keys(my_model, my_data, tmp_path / "run", *SHORT, "schedule.name=refined", f"schedule.run={branch.name}"),
        "schedule.warmup=0",
        "schedule.smoothing=0",
    )
    assert result.exit_code == 0, result.output
    assert f"run: {branch}" in (tmp_path / "run" / "recipe.yaml").read_text()
    weights = [1 / s["gradient_norm_l1"] for s in steps(branch)]
    products = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
    planned = [rate / 1e-2 for _, rate in facts(tmp_path / "run")["plan"]["schedule"]]
    assert len(planned) == len(products) == 8
    assert planned[0] == pytest.approx(products[0] / max(products))
    assert planned[4] == pytest.approx((products[3] + products[4]) / 2 / max(products))  # halfway, at 3.5 of 7


def test_power_sees_the_tokens_and_documents_of_the_run(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    shape = ("schedule.name=power", "schedule.a=0.2", "schedule.decay=0", "schedule.warmup=1", "optimizer.rate=0.05")
    made = steps(run(my_model, my_data, tmp_path / "run", *shape, "train.clip=1e-9"))
    batch = sum(s["documents"] for s in made) / len(made)
    tokens = [sum(s["tokens"] for s in made[:t]) for t in range(8)]
    expected = [min(0.05, batch * 0.2 * n**-0.51) for n in tokens[1:]]
    assert min(expected) < 0.05 and math.isclose(made[0]["rate"], expected[0])
    assert [s["rate"] for s in made[1:]] == pytest.approx(expected)


def test_a_warmup_begins_where_it_is_said_to(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    rises = ("schedule.name=constant", "schedule.warmup=4", "schedule.warmup_from=0.2")
    result = invoke("train", "--dry-run", *keys(my_model, my_data, tmp_path / "run", *SHORT, *rises))
    assert result.exit_code == 0, result.output
    planned = [rate / 1e-2 for _, rate in facts(tmp_path / "run")["plan"]["schedule"]]
    assert planned == pytest.approx([0.4, 0.6, 0.8, 1, 1, 1, 1, 1])


def test_a_run_that_goes_on_with_other_rates_is_refused(
    branch: Path, my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, folder = tmp_path / "earlier", tmp_path / "run"
    earlier.mkdir()
    text = (branch / "metrics.jsonl").read_text()
    (earlier / "metrics.jsonl").write_text(text)
    with monkeypatch.context() as patch:
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        asked = keys(my_model, my_data, folder, *SHORT, "schedule.name=refined", f"schedule.run={earlier}")
        assert invoke("train", *asked).exit_code == 130
    (earlier / "metrics.jsonl").write_text("".join(text.splitlines(True)[:-6]))
    result = invoke("train", "--resume", str(folder))
    assert result.exit_code == 2 and "rates are others than those that the run began with" in result.stderr
    (earlier / "metrics.jsonl").write_text(text)
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    assert [s["rate"] for s in steps(folder)] == [rate for _, rate in facts(folder)["plan"]["schedule"]]


def test_the_disk_is_asked_for_the_checkpoints_of_budgets_too(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    asked = keys(my_model, my_data, tmp_path / "run", *SHORT)
    branched, plain = (assemble(read(None, [*asked, *more])) for more in (BRANCH, ()))
    trained = sum(p.nbytes for p in plain.trainer.model.trainable().values())
    assert disk_need(branched) - disk_need(plain) == 3 * trained  # the weights of an adapter, and two moments of each
