"""What whole runs leave: every file, every figure, the best weights; and what plain transformers say of it."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import STEPS, chats, equal, facts, invoke, keep_jobs, keys, records, same_file, weights, write_rows
from safetensors.torch import load_file, save_file
from tiny import random_documents, tiny

from truetune import spelling
from truetune.training.checkpoint import Checkpoints, verify

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of PEFT's

ROOT = Path(__file__).parents[2]
EXPORTED = "adapter_model.safetensors"
SPEED = re.compile(r"\d\s*tokens/s|\d\s*targets/s")

# What a run leaves.


def test_a_run_leaves_all_that_it_promises(straight: tuple[Path, str], my_model: Path, my_data: Path) -> None:
    folder, shown = straight
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter", "checkpoints", "data", "merged",
        "metrics.jsonl", "recipe.yaml", "report.html", "run.json",
    ]  # fmt: skip
    assert spelling.read(str(folder / "recipe.yaml")) == spelling.read(None, keys(my_model, my_data, folder))
    for place in ("adapter", "merged", "checkpoints/step-00000008"):
        verify(folder / place)
    assert Checkpoints(folder / "checkpoints").steps() == [4, 6, 8]
    found = facts(folder)
    assert found["status"] == "finished" and found["void"] is None
    assert all(v["passed"] for v in found["verdicts"]) and len(found["verdicts"]) >= 10
    assert [(e["kind"], e["passed"]) for e in found["exports"]] == [("adapter", True), ("merged", True)]
    page = (folder / "report.html").read_text()
    assert f"Finished at step {STEPS} of {STEPS}." in page and SPEED.search(page)
    assert "loss" in (folder / "README.md").read_text().lower()
    assert SPEED.search(shown) and f"truetune generate {folder}" in shown
    assert not [p for p in folder.rglob("*") if p.name.startswith(".") or p.suffix in (".tmp", ".new")]


def test_records_are_in_order_and_run_json_is_their_sum(straight: tuple[Path, str]) -> None:
    found, result = records(straight[0]), facts(straight[0])["result"]
    step = ["step"]
    assert [r["kind"] for r in found] == [
        "checks", "evaluation", "samples",
        *step * 2, "saved", *step * 2, "evaluation", "samples", "saved",
        *step * 2, "saved", *step * 2, "evaluation", "saved", "checks", "samples",
    ]  # fmt: skip
    steps = [r for r in found if r["kind"] == "step"]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))
    assert all(a["step"] <= b["step"] for a, b in pairwise(found))
    for name in ("tokens", "targets", "seconds"):
        assert result[name] == pytest.approx(sum(s[name] for s in steps))
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
    evaluations = [r for r in found if r["kind"] == "evaluation"]
    assert result["before"] == evaluations[0] and result["after"] == evaluations[-1]
    assert result["after"]["loss"] < 0.9 * result["before"]["loss"]


def test_the_rows_that_figures_rest_on_are_kept(straight: tuple[Path, str], my_data: Path) -> None:
    rows = [json.loads(line) for line in my_data.read_text().splitlines()]
    kept = {
        name: [json.loads(line) for line in (straight[0] / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("evaluation", "first_step")
    }
    assert kept["evaluation"] and kept["first_step"]
    assert all(row in rows for part in kept.values() for row in part)
    assert not [row for row in kept["evaluation"] if row in kept["first_step"]]


def test_a_run_can_be_used_by_its_folder(straight: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = straight
    said = [
        invoke("generate", str(place), "--prompt", "What is 3?", "--max-tokens", "6")
        for place in (folder, folder / "merged")
    ]
    assert said[0].exit_code == 0 and said[0].stdout == said[1].stdout
    out = tmp_path / "out"
    assert invoke("export", str(folder), "--adapter", "--to", str(out)).exit_code == 0
    assert same_file(out / EXPORTED, folder / "adapter" / EXPORTED)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused = invoke("export", str(folder), "--to", str(precious))
    assert refused.exit_code == 2 and "already holds something; name another folder" in refused.stderr
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_dry_run_trains_nothing_and_says_so(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, jobs = ["train", *keys(my_model, my_data, tmp_path / "out")], keep_jobs(monkeypatch)
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0 and f"nothing was trained; the plan is {STEPS} steps" in result.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "data", "metrics.jsonl", "recipe.yaml", "report.html", "run.json",
    ]  # fmt: skip
    assert [r["kind"] for r in records(tmp_path / "out")] == ["checks"]
    assert facts(tmp_path / "out")["status"] == "dry run" and not SPEED.search(result.output)
    assert all(not p.any() for name, p in weights(jobs[0]).items() if "lora_B" in name)
    assert "A dry run: only the checks ran." in (tmp_path / "out" / "report.html").read_text()
    assert invoke(*arguments).exit_code == 0  # the run that was tried out may follow in the same folder
    again = invoke(*arguments)
    assert again.exit_code == 2 and "already holds something" in again.stderr


# The weights that the run ends with, and the independent verifier.

VERIFY = runpy.run_path(str(ROOT / "tools" / "verify_run.py"), run_name="verify")["main"]


def test_keep_best_ends_with_the_best_evaluation(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, words = keep_jobs(monkeypatch), ["quite", "zebra", "fjord", "xylem", "jumpy"]
    other = write_rows(
        tmp_path / "other.jsonl", [{"prompt": f"What is {i}?", "completion": word} for i, word in enumerate(words)]
    )
    shape = ("schedule.name=constant", "schedule.warmup=0", "optimizer.rate=0.02", f"evaluation.source={other}")
    more = (*shape, "evaluation.every=2", "checkpoint.every=1", "checkpoint.keep=1")
    folder = tmp_path / "out"
    assert invoke("train", *keys(my_model, my_data, folder, *more)).exit_code == 0
    evaluations = [r for r in records(folder) if r["kind"] == "evaluation"]
    best = min(evaluations[1:], key=lambda e: e["loss"])
    assert 0 < best["step"] < STEPS and best["loss"] < evaluations[-1]["loss"] - 0.01
    assert facts(folder)["result"]["after"] == best
    assert Checkpoints(folder / "checkpoints").steps() == [best["step"], STEPS]
    kept = load_file(folder / "checkpoints" / f"step-{best['step']:08d}" / "weights.safetensors")
    assert equal(weights(jobs[0]), kept)
    assert VERIFY(folder) == 0
    # Exported again from the checkpoints, it is the best too; without keep_best it is the last.
    assert invoke("export", str(folder), "--adapter", "--to", str(tmp_path / "again")).exit_code == 0
    assert same_file(folder / "adapter" / EXPORTED, tmp_path / "again" / EXPORTED)
    last = tmp_path / "last"
    assert invoke("train", *keys(my_model, my_data, last, *more, "checkpoint.keep_best=false")).exit_code == 0
    assert facts(last)["result"]["after"]["step"] == STEPS
    assert not same_file(folder / "adapter" / EXPORTED, last / "adapter" / EXPORTED)
    assert VERIFY(last) == 0


def test_the_verifier_allows_for_rounding_and_for_nothing_else() -> None:
    """A false loss is seen in both precisions; what bf16 does to few targets is not called false."""
    tools = runpy.run_path(str(ROOT / "tools" / "verify_run.py"), run_name="verify")
    model = tiny("llama")
    documents = [(d.tokens.tolist(), d.targets.tolist()) for d in random_documents(6)]
    plain = float(tools["measure"](model, documents).mean())
    rounded = float(tools["measure"](model, documents, torch.bfloat16).mean())
    assert plain != rounded

    def agrees(said: float, dtype: torch.dtype) -> bool:
        return tools["compared"]("loss", said, model, documents, dtype)[3]

    assert agrees(plain, torch.float32) and agrees(plain, torch.bfloat16) and agrees(rounded, torch.bfloat16)
    assert not agrees(1.01 * plain, torch.float32) and not agrees(1.02 * plain, torch.bfloat16)


PAIRS = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, of course."} for i in range(40)]
TEXTS = [{"text": f"Item {i} of the list is {i * i}. " * (1 + i % 3)} for i in range(40)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("rows", [chats(40), PAIRS, TEXTS], ids=["messages", "prompt-completion", "text"])
def test_plain_transformers_recompute_the_figures(
    rows: list[dict[str, Any]], method: str, precision: str, my_model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data.jsonl", rows)
    kind = (f"model.precision={precision}", f"adapter.method={method}")
    more = (*kind, "train.steps=3", "evaluation.samples=0", "output.merged=false")
    assert invoke("train", *keys(my_model, data, tmp_path / "out", *more)).exit_code == 0
    assert VERIFY(tmp_path / "out") == 0


def tamper_loss(folder: Path, name: str) -> None:
    found = facts(folder)
    found["result"][name]["loss"] *= 1.002
    (folder / "run.json").write_text(json.dumps(found))


def tamper_adapter(folder: Path) -> None:
    file = folder / "adapter" / EXPORTED
    tensors = load_file(file)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= 0.5
    save_file(tensors, file, {"format": "pt"})


def without_learning(folder: Path) -> None:
    file = folder / "adapter" / EXPORTED
    save_file({n: torch.zeros_like(t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    found = facts(folder)
    found["result"]["after"]["loss"] = found["result"]["before"]["loss"]
    (folder / "run.json").write_text(json.dumps(found))


def tamper_rows(folder: Path) -> None:
    file = folder / "data" / "evaluation.jsonl"
    file.write_text(file.read_text().replace("of course", "of coarse"))


def drop_row(folder: Path) -> None:
    file = folder / "data" / "evaluation.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda f: tamper_loss(f, "before"), "held-out loss before .*DISAGREES"),
        (lambda f: tamper_loss(f, "after"), "held-out loss after .*DISAGREES"),
        (tamper_adapter, "held-out loss after .*DISAGREES"),
        (without_learning, "NOTHING WAS LEARNED"),
        (tamper_rows, "held-out loss after .*DISAGREES"),
        (drop_row, "held-out tokens .*DISAGREES"),
    ],
    ids=["before", "after", "adapter", "nothing learned", "rows", "row"],
)
def test_what_was_tampered_with_is_seen(
    tamper: Callable[[Path], None],
    says: str,
    straight: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    assert VERIFY(folder) == 0 and "DISAGREES" not in capsys.readouterr().out
    tamper(folder)
    assert VERIFY(folder) == 1
    assert re.search(says, capsys.readouterr().out)


def test_a_run_of_one_step_ends_well(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    """LoRA's A has no gradient before B has moved, so it stands still for good reason."""
    result = invoke("train", *keys(my_model, my_data, tmp_path / "run", "train.steps=1"))
    assert result.exit_code == 0, result.output
    moved = next(v for v in facts(tmp_path / "run")["verdicts"] if v["name"] == "every trained tensor moved")
    assert moved["figure"] == "14 of 14"
