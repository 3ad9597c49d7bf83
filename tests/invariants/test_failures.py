"""A run that fails says so, moves no weight, leaves what shows the failure again, and quotes no speed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import STEPS, at_record, facts, invoke, keep_jobs, keys, records, step_is, tokenizer, weights
from safetensors.torch import load_file

from truetune import spelling
from truetune.assembly import Job, assemble
from truetune.training import trainer as training
from truetune.training.checkpoint import Checkpoints
from truetune.training.gradient import accumulate, differentiate
from truetune.training.record import Verdict

SPEED = re.compile(r"\d\s*tokens/s|\d\s*targets/s")


def assert_nothing_quoted(folder: Path, after: int, shown: str = "") -> None:
    """No throughput in records after step ``after``, in run.json, on the page or in ``shown``."""
    found = facts(folder)
    assert found["void"]
    assert found["result"].get("tokens_per_second") is None and found["result"].get("targets_per_second") is None
    late = [r for r in records(folder) if r["kind"] == "step" and r["step"] >= after]
    assert all(r["tokens_per_second"] is None for r in late)
    page = (folder / "report.html").read_text()
    assert "Not quoted: " in page and not SPEED.search(page)
    assert not SPEED.search(shown)


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_nan_stops_the_run_before_a_weight_moves(
    where: str, my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, step, jobs = tmp_path / "out", 6, keep_jobs(monkeypatch)
    planted: list[dict[str, torch.Tensor]] = []

    def plant() -> None:
        trainer = jobs[0].trainer
        parameter = next(p for n, p in trainer.model.trainable().items() if "lora_B" in n)
        if where == "weight":
            with torch.no_grad():
                parameter[0, 0] = float("nan")
        else:
            monkeypatch.setattr(training, "differentiate", lambda *a: poison(differentiate(*a), parameter))
        planted.append(weights(jobs[0]))

    def poison(loss: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        assert parameter.grad is not None
        parameter.grad[0, 0] = float("nan")
        return loss

    at_record(monkeypatch, step_is(step - 1), plant)
    result = invoke("train", *keys(my_model, my_data, folder, "adapter.dropout=0.1"))
    figure = "loss" if where == "weight" else "gradient norm"
    says = (
        rf"error: the {figure} of step {step} is nan; no weight was changed; .*failure-step-{step}; lower the rate.*\n"
    )
    assert result.exit_code == 2 and re.search(says, result.stderr), result.stderr
    now = weights(jobs[0])
    assert all(torch.equal(now[n].nan_to_num(7.0), p.nan_to_num(7.0)) for n, p in planted[0].items())
    assert all(p.grad is None for p in jobs[0].trainer.model.parameters())
    assert [r["step"] for r in records(folder) if r["kind"] == "step"] == list(range(1, step))
    assert facts(folder)["status"] == "failed" and not (folder / "adapter").exists()
    assert_nothing_quoted(folder, after=step)
    # The bundle alone shows the failure again.
    kept = load_file(folder / f"failure-step-{step}" / "batch.safetensors")
    told = json.loads((folder / f"failure-step-{step}" / "step.json").read_text())
    again = assemble(spelling.read(str(folder / "recipe.yaml")), folder).trainer
    tensors, state = Checkpoints(folder / f"failure-step-{step}").load(step - 1)
    assert state["step"] == step - 1
    again._load_weights(tensors["weights"])
    batches = again.batches(step - 1)
    for i, batch in enumerate(batches):
        assert torch.equal(kept[f"{i}/tokens"], batch.tokens) and torch.equal(kept[f"{i}/labels"], batch.labels)
        assert kept[f"{i}/lengths"].tolist() == list(batch.lengths)
    assert f"{len(batches)}/tokens" not in kept
    rows = [json.loads(line) for line in my_data.read_text().splitlines()]
    decoded = "".join(tokenizer().decode(b.tokens) for b in batches)
    assert len(told["rows"]) == sum(len(b.lengths) for b in batches)
    assert all(rows[row]["messages"][0]["content"] in decoded for row in told["rows"])
    torch.set_rng_state(kept["random"])
    again.model.train()
    loss = float(accumulate(again.model, again.objective, batches))
    assert str(loss) == told["loss"] and (loss != loss) == (where == "weight")


def freeze(job: Job) -> None:
    """Take a tensor out of the optimizer."""
    job.trainer.optimizer.param_groups[0]["params"].pop(0)


def no_stop(job: Job) -> None:
    job.trainer.preflight.stop_ids = frozenset()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("harm", "name"),
    [(freeze, "every trained tensor moved"), (no_stop, "trained turns end in a stop token")],
    ids=["frozen adapter", "no stop token"],
)
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_a_failing_preflight_trains_nothing(
    harm: Callable[[Job], None],
    name: str,
    dry: bool,
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_jobs(monkeypatch, harm)
    folder = tmp_path / "out"
    result = invoke("train", *keys(my_model, my_data, folder), *(["--dry-run"] if dry else []))
    assert result.exit_code == 2 and re.fullmatch(rf"error: check failed: {name}: [^\n]+; [^\n]+\n", result.stderr)
    assert re.search(rf"^FAILED +{name}", result.stdout, re.MULTILINE)
    assert [r["kind"] for r in records(folder)] == ["checks"]
    assert facts(folder)["status"] == "failed" and not (folder / "checkpoints").exists()
    assert_nothing_quoted(folder, after=0, shown=result.output)


def test_a_check_that_fails_at_the_end_withdraws_the_speed(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = Verdict("every trained tensor moved", False, "27 of 28", "look")
    monkeypatch.setattr(training, "integrity", lambda *_: [verdict])
    result = invoke("train", *keys(my_model, my_data, tmp_path / "out"))
    assert result.exit_code == 2 and "check failed: every trained tensor moved: 27 of 28; look" in result.stderr
    assert not (tmp_path / "out" / "adapter").exists()
    assert_nothing_quoted(tmp_path / "out", after=STEPS + 1, shown=result.output.partition("FAILED")[2])


def test_zero_gradients_void_the_run_even_when_it_is_resumed(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*arguments: Any) -> torch.Tensor:
        loss = differentiate(*arguments)
        for p in arguments[1].parameters():
            if p.grad is not None:
                p.grad.zero_()
        return loss

    with monkeypatch.context() as patch:
        at_record(patch, step_is(3), lambda: patch.setattr(training, "differentiate", vanished))
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        result = invoke("train", *keys(my_model, my_data, tmp_path / "out"))
    assert result.exit_code == 130
    assert re.search(r"ALARM +step 4, zero gradient: .*; throughput is not quoted", result.stdout)
    assert_nothing_quoted(tmp_path / "out", after=4, shown=result.stdout.partition("ALARM")[2])
    resumed = invoke("train", "--resume", str(tmp_path / "out"))  # with gradients, but nothing is forgotten
    assert resumed.exit_code == 0
    assert_nothing_quoted(tmp_path / "out", after=4, shown=resumed.stdout)
    assert not SPEED.search((tmp_path / "out" / "README.md").read_text())
