"""``truetune bench training``: a real comparison on a tiny model, and sides that break or don't train the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import invoke
from transformers import AutoConfig

from truetune.bench import training
from truetune.bench.training import Peer
from truetune.bench.workloads import Workload, _random_documents, _write_documents

SIDE = """
import json, os, sys
import numpy as np
folder, step = sys.argv[1], 0
job = json.load(open(os.path.join(folder, "job.json")))
with np.load(os.path.join(folder, "documents.npz")) as arrays:
    lengths, targets = arrays["lengths"], np.split(arrays["targets"], np.cumsum(arrays["lengths"])[:-1])
def say(**values):
    print(json.dumps(values), flush=True)
say(trained=10, dtypes=["float32"], started_bytes=1, loaded_bytes=1, versions={})
for word in sys.stdin:
    mine = slice(step * job["documents"], (step + 1) * job["documents"])
    tokens, asked = int(lengths[mine].sum()), sum(int(t.sum()) for t in targets[mine])
    if word.strip() == "end":
        say(peak_bytes=2**30, moved=2, tensors=2)
    else:
        say(seconds=0.5, loss=3.0, tokens=tokens, targets=asked)
    step += 1
"""
BROKEN = {
    "dies": (
        "    if word",
        "    if step == 2: raise MemoryError('no room')\n    if word",
        "dies ended before it was done (MemoryError: no room); run it alone, or leave it out",
    ),
    "killed": (
        "    if word",
        "    if step == 1: os.kill(os.getpid(), 9)\n    if word",
        "killed ended before it was done (signal 9, as a system sends that is out of memory)",
    ),
    "lacks": ("import numpy", "import no_such_framework, numpy", "lacks needs no_such_framework, which "),
    "other": ("loss=3.0", "loss=3.1", "the first losses differ, 3.1000 of other and 3.0000 of truetune"),
    "nan": ("loss=3.0", "loss=float('nan')", "the first losses differ, nan of nan"),
    "skips": ("tokens=tokens", "tokens=tokens - 1", "skips did not train on all "),
    "lazy": ("targets=asked", "targets=asked - 1", "lazy did not train on all "),
    "small": ("trained=10", "trained=9", "small trains 9 parameters, truetune 10 parameters; that is no comparison"),
    "coarse": ('["float32"]', '["bfloat16"]', "coarse trains in ['bfloat16'], truetune in ['float32']"),
}


def prepared(name: str, mode: str, rounds: int, folder: Path, *_: Any) -> Workload:
    """Documents alone."""
    documents = _random_documents(rounds + 1, 2, 64)
    _write_documents(documents, folder / "documents.npz")
    words = ("rate", "clip", "longest", "threads")
    job = {"compute": "bf16", "documents": 2, **dict.fromkeys(words, 1)}
    (folder / "job.json").write_text(json.dumps(job))
    config = AutoConfig.for_model("llama", hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=64)
    return Workload(name, mode, config, [documents[i : i + 2] for i in range(0, len(documents), 2)], job)


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sides that compute nothing, ours among them."""
    monkeypatch.setattr(training, "prepare", prepared)
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "ours.py").write_text(SIDE)
    (folder / "good.py").write_text(SIDE.replace("seconds=0.5", "seconds=2 + 0.5 * step"))
    for name, (here, there, _) in BROKEN.items():
        assert SIDE.count(here) == 1
        (folder / f"{name}.py").write_text(SIDE.replace(here, there))
    monkeypatch.setattr(training, "FOLDER", folder)
    monkeypatch.setattr(training, "GEMM", 64)
    monkeypatch.setattr(training, "PEERS", {name: Peer(name, (), "a try") for name in ("good", *BROKEN)})
    return folder


def bench(model: Path | str, *more: str, rounds: int = 3) -> Any:
    return invoke("bench", "training", str(model), "--documents", "2", "--rounds", str(rounds), *more)


@pytest.mark.parametrize("name", BROKEN)
def test_a_side_that_breaks_or_trains_something_else_is_one_sentence(sides: Path, name: str) -> None:
    result = bench("tiny", "--peer", "good", "--peer", name)
    assert result.exit_code == 2 and "times as fast" not in result.stdout
    assert result.stderr.count("\n") == 1 and f"error: {BROKEN[name][2]}" in result.stderr


def test_rounds_alternate_on_the_same_documents_and_every_sample_is_kept(
    sides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "results" / "raw.json"
    monkeypatch.setattr(
        sys, "argv", ["truetune", "bench", "training", "--peer", f"good={sys.executable}", "--rounds=3"]
    )
    result = bench("tiny", "--peer", f"good={sys.executable}", "--to", str(to))
    assert result.exit_code == 0, result.output
    kept = json.loads(to.read_text())
    assert [r["order"][0] for r in kept["rounds"]] == ["truetune", "good", "truetune"]
    assert all(r["gemm"]["bf16"] > 0 and r["gemm"]["fp32"] > 0 for r in kept["rounds"])
    assert len(kept["steps"]) == 4 and all(0 < s["targets"] < s["tokens"] < s["flops"] for s in kept["steps"])
    assert [s["seconds"] for s in kept["sides"]["good"]["samples"]] == [2.5, 3.0, 3.5]
    assert kept["sides"]["good"]["warm_up"]["seconds"] == 2.0
    assert all(0 <= s["other_cpu"] <= 1 for side in kept["sides"].values() for s in side["samples"])
    assert "6.00 times" in result.stdout and "5.50 to 6.50" in result.stdout and kept["machine"]["torch"]
    assert kept["machine"]["command"] == "truetune bench training --peer good --rounds=3"
    assert sys.executable not in to.read_text()


def test_apart_every_round_begins_anew_on_the_same_two_steps(sides: Path, tmp_path: Path) -> None:
    to = tmp_path / "raw.json"
    result = bench("tiny", "--peer", "good", "--apart", "--to", str(to))
    assert result.exit_code == 0, result.output
    kept = json.loads(to.read_text())
    assert [s["seconds"] for s in kept["sides"]["good"]["samples"]] == [2.5, 2.5, 2.5]
    assert [r["order"][0] for r in kept["rounds"]] == ["truetune", "good", "truetune"]
    assert len(kept["steps"]) == 4 and kept["steps"][1] == kept["steps"][2] == kept["steps"][3] != kept["steps"][0]
    broken = bench("tiny", "--peer", "good", "--apart", "--peer", "small")
    assert broken.exit_code == 2 and f"error: {BROKEN['small'][2]}" in broken.stderr


@pytest.mark.parametrize(
    ("peers", "chosen"),
    [
        (("loop",), "model.precision=fp32"),
        (("loop-single",), "train.clip=none"),
        pytest.param(("hf-trainer", "loop-compiled"), "model.precision=fp32", marks=pytest.mark.proof),
        pytest.param(("loop", "hf-trainer"), "model.precision=bf16", marks=pytest.mark.proof),
        pytest.param(("hf-trainer",), "train.clip=none", marks=pytest.mark.proof),
    ],
)
def test_all_sides_really_train_the_same(my_model: Path, tmp_path: Path, peers: tuple[str, ...], chosen: str) -> None:
    to, named = tmp_path / "raw.json", [word for peer in peers for word in ("--peer", peer)]
    result = bench(my_model, *named, "--set", chosen, "--to", str(to), rounds=2)
    assert result.exit_code == 0, result.output
    kept = json.loads(to.read_text())
    ours = kept["sides"]["truetune"]
    near = 2e-5 if "fp32" in chosen else 2e-3
    for name in ("truetune", *peers):
        side = kept["sides"][name]
        assert side["moved"] == side["tensors"] == ours["tensors"] > 0 and side["peak_bytes"] > 1e8
        assert {*side["versions"]} >= {"torch", "transformers", "peft"} and len(side["samples"]) == 2
        losses = [s["loss"] for s in (side["warm_up"], *side["samples"])]
        assert losses == pytest.approx([s["loss"] for s in (ours["warm_up"], *ours["samples"])], rel=near)
        assert f"| {name} |" in result.stdout
    assert all(v["passed"] for v in ours["verdicts"]) and not ours["alarms"]
    verdicts = " ".join(v["name"] for v in ours["verdicts"])
    assert "no frozen tensor moved" in verdicts and "neighbours do not change my loss" in verdicts


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--peer", "unsloth"), "there is no peer unsloth; choose among: loop (a careful loop"),
        (("--peer", "loop", "--peer", "loop"), "--peer loop is there twice; keep one"),
        (("--mode", "qlora"), "--mode is lora or full, not qlora; choose one"),
        (("--peer", "loop=no/such/python"), "loop: can't run no/such/python (No such file or directory)"),
        (
            ("--set", "train.epochs=2"),
            "--set takes model.precision, optimizer.rate, train.clip, train.tokens_per_micro_batch, not",
        ),
        (("--set", "optimizer.rate=fast"), "optimizer.rate"),
        (("--to", "."), "can't write .; name another file with --to"),
        (("--to", "/proc/none/raw.json"), "can't create /proc/none ("),
    ],
)
def test_a_wrong_request_is_one_sentence(my_model: Path, arguments: tuple[str, ...], says: str) -> None:
    result = bench(my_model, *arguments)
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


def test_the_peak_is_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "GEMM", 512)
    assert training.gemm(torch.float32) > 1e9


def test_the_loop_pads_little_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(training.FOLDER))
    import numpy as np
    from loop import BUDGET, batches, padded
    from protocol import IGNORE, Row

    rows = [Row(np.arange(n), np.where(np.arange(n) > n // 2, np.arange(n), IGNORE)) for n in (5, 900, 300, 340, 300)]
    found = batches(rows, BUDGET)
    assert sorted(len(row.ids) for batch in found for row in batch) == [5, 300, 300, 340, 900]
    assert [len(batch) for batch in found] == [1, 3, 1]
    assert [len(batch) for batch in batches(rows, 0)] == [1] * 5
    for batch in found:
        ids, labels = padded(batch)
        assert ids.numel() <= BUDGET
        for row, tokens, wanted in zip(batch, ids, labels, strict=True):
            assert tokens[: len(row.ids)].tolist() == row.ids.tolist()
            assert wanted.tolist() == row.labels.tolist() + [IGNORE] * (len(wanted) - len(row.ids))
