"""``truetune prove`` on tiny models of three families, LoRA and full, through the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from folders import facts, invoke, keys, write_model, write_rows

from truetune.kernels import int8_linear, nf4_linear
from truetune.promises import PROMISES

BYTES = pytest.mark.skipif(not int8_linear.available(torch.device("cpu")), reason="no compiled products of bytes")
LIBRARY = pytest.mark.skipif(not nf4_linear.available(), reason="no bitsandbytes")
WSD = ("schedule.name=wsd", "schedule.decay=300")
CASES = [
    ("llama", ["adapter.lora_plus_ratio=4"]),
    ("qwen2", ["adapter.dropout=0.1", "model.precision=bf16"]),
    ("gpt2", ["optimizer.name=prodigy", "optimizer.rate=1"]),
    ("llama", ["adapter.method=full", "optimizer.rate=1e-3"]),
    ("qwen2", ["adapter.method=full", "optimizer.rate=1e-3", "schedule.warmup=30", *WSD]),
    ("gpt2", ["adapter.method=full", "optimizer.rate=1e-3", "model.precision=bf16"]),
    pytest.param("qwen2", ["model.base=int8", "model.precision=bf16"], marks=BYTES),
    pytest.param("llama", ["model.base=nf4"], marks=LIBRARY),
]


@pytest.mark.parametrize(("family", "more"), CASES)
def test_every_promise_holds(family: str, more: list[str], my_data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family)
    result = invoke("prove", *keys(model, my_data, tmp_path / "run", *more))
    lines = result.stdout.splitlines()
    assert result.exit_code == 0, result.output
    assert [re.split(r"  +", line)[:2] for line in lines[: len(PROMISES)]] == [["holds", name] for name in PROMISES]
    assert lines[len(PROMISES) :] == ["10 of 10 promises hold", f"report  {tmp_path / 'run-proof' / 'report.html'}"]
    told = {v["name"]: v for v in facts(tmp_path / "run-proof")["verdicts"]}
    assert all(told[name]["passed"] and told[name]["figure"] in result.stdout for name in PROMISES)
    page = (tmp_path / "run-proof" / "report.html").read_text(encoding="utf-8")
    assert all(f">{name}</td>" in page for name in PROMISES)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "run-proof"}, "something temporary stays"


def test_long_rows_and_rows_without_answers_are_counted(my_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "so " * (40 if i % 9 == 0 else 3) + str(i)} for i in range(50)]
    rows += [{"prompt": "What? " * 60, "completion": f"No room for {i}."} for i in range(2)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    more = ["data.max_length=96", "data.cut_limit=0.5", "train.epochs=1.5", "train.steps=none"]
    result = invoke("prove", *keys(my_model, data, tmp_path / "run", *more))
    assert result.exit_code == 0, result.output
    assert re.search(r"conservation .* [1-9]\d* cut", result.stdout)
    assert re.search(r"[1-9]\d* dropped and [1-9]\d* truncated rows were reported", result.stdout)


def test_a_key_that_nothing_reads_is_found(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    more = ["evaluation.samples=0", "evaluation.sample_tokens=9"]
    result = invoke("prove", *keys(my_model, my_data, tmp_path / "run", *more))
    assert result.exit_code == 1
    assert re.search(r"FAILS  nothing silent .*evaluation.sample_tokens was written .* never read", result.stdout)
    assert re.search(r"FAILS  honest speed .*withheld, since nothing silent does not hold", result.stdout)
    assert "8 of 10 promises hold" in result.stdout
    assert "8 of 10" not in facts(tmp_path / "run-proof")["status"]
    assert "Not quoted" in (tmp_path / "run-proof" / "report.html").read_text(encoding="utf-8")


def test_bad_input_is_one_sentence_and_leaves_nothing(my_data: Path, tmp_path: Path) -> None:
    result = invoke("prove", *keys(tmp_path / "gone", my_data, tmp_path / "run"))
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+; correct model\.path\n", result.stderr)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_proof_is_not_overwritten(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run-proof").mkdir()
    (tmp_path / "run-proof" / "mine.txt").write_text("precious")
    result = invoke("prove", *keys(my_model, my_data, tmp_path / "run"))
    assert result.exit_code == 2 and "already holds something" in result.stderr
