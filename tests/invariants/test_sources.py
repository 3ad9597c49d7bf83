"""Several sources in one run: weights, held-out rows and losses of each, resume, and the verifier."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from folders import chats, facts, invoke, keys, records, same_file, write_rows

from truetune import spelling
from truetune.assembly import assemble
from truetune.data.sources import canonical
from truetune.rows import choose_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import verify_run

TEXTS = [{"text": f"Number {i} is a number, and so is {i + 1}."} for i in range(30)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations, and one of texts that share nothing but a format of their own."""
    folder = tmp_path_factory.mktemp("two")
    write_rows(folder / "chats.jsonl", chats(40))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    return folder


def arguments(model: Path, two: Path, folder: Path, *more: str) -> list[str]:
    several = f"data.sources=[{{source: '{two}/chats.jsonl', weight: 0.5}}, {{source: '{two}/texts.json', weight: 2}}]"
    kept = [key for key in keys(model, "x", folder, *more) if not key.startswith("data.source=")]
    return [*kept, several]


@pytest.fixture(scope="module")
def run(my_model: Path, two: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run") / "out"
    result = invoke("train", *arguments(my_model, two, folder))
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_one_file_in_two_spellings_is_refused(my_model: Path, two: Path, tmp_path: Path) -> None:
    twice = f"data.sources=[{{source: '{two}/chats.jsonl'}}, {{source: '{two}/./chats.jsonl'}}]"
    result = invoke("train", *arguments(my_model, two, tmp_path / "out")[:-1], twice)
    assert result.exit_code == 2 and "data.sources has chats.jsonl (train) twice, in two spellings" in result.stderr


def test_a_source_of_which_no_row_is_trained_on_is_told(my_model: Path, two: Path, tmp_path: Path) -> None:
    rare = f"data.sources=[{{source: '{two}/chats.jsonl', weight: 0.01}}, {{source: '{two}/texts.json'}}]"
    folder = tmp_path / "out"
    result = invoke("train", *arguments(my_model, two, folder, "train.steps=none", "train.epochs=1")[:-1], rare)
    assert result.exit_code == 0, result.output
    assert facts(folder)["model"]["notes"] == [
        "less than one row of chats.jsonl is trained on in this run; raise its weight"
    ]


def test_each_source_has_its_loss_and_its_account(run: tuple[Path, str]) -> None:
    folder, said = run
    told = [r for r in records(folder) if r["kind"] == "evaluation"]
    assert all(set(r["by_source"]) == {"chats.jsonl", "texts.json"} for r in told)
    assert all(min(r["by_source"].values()) <= r["loss"] <= max(r["by_source"].values()) for r in told)
    assert f"texts.json: loss {told[0]['by_source']['texts.json']:.4f}" in said
    data = facts(folder)["data"]
    assert [(s["name"], s["weight"]) for s in data["sources"]] == [("chats.jsonl", 0.5), ("texts.json", 2)]
    for side in ("train", "evaluation"):
        for figure in ("rows", "documents", "tokens", "targets", "targets_cut", "truncated"):
            assert data[side][figure] == sum(s[side][figure] for s in data["sources"])
    assert [s["evaluation"]["rows"] for s in data["sources"]] == [2, 2]  # a twentieth of each
    rows = [json.loads(line) for line in (folder / "data" / "evaluation.jsonl").read_text().splitlines()]
    assert Counter(row["truetune.source"] for row in rows) == {"chats.jsonl": 2, "texts.json": 2}
    page = (folder / "report.html").read_text()
    assert "Loss of texts.json" in page and "<h3 style" in page and ">0.5</td>" in page


def test_the_verifier_agrees_on_every_source(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_run.main(run[0]) == 0
    said = capsys.readouterr().out
    assert said.count("of chats.jsonl") == said.count("of texts.json") == 2


def test_a_resumed_run_of_several_sources_is_the_run(
    run: tuple[Path, str], my_model: Path, two: Path, tmp_path: Path
) -> None:
    straight, folder = run[0], tmp_path / "out"
    shutil.copytree(straight, folder)
    values = facts(folder) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    last = Path("checkpoints", "step-00000008")
    assert same_file(straight / last / "weights.safetensors", folder / last / "weights.safetensors")
    losses = [[r["loss"] for r in records(f) if r["kind"] in ("step", "evaluation")] for f in (straight, folder)]
    assert losses[0] == losses[1]


def test_weights_decide_how_often_a_row_is_trained_on(
    my_model: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = spelling.read(None, arguments(my_model, two, tmp_path, "train.steps=none", "train.epochs=2"))
    job = assemble(recipe)
    stream = job.trainer.stream
    seen = Counter(i for t in range(len(stream)) for i in stream.step(t))
    chat, text = job.train.by_source.values()
    assert {seen[i] for i in chat} == {1} and {seen[i] for i in text} == {4}
    assert len(chat) == 38 and len(text) == 28


def test_a_row_that_another_source_holds_out_is_not_trained_on(my_model: Path, two: Path, tmp_path: Path) -> None:
    write_rows(two / "again.jsonl", [*chats(40), *chats(50)[40:]])
    several = f"data.sources=[{{source: '{two}/chats.jsonl'}}, {{source: '{two}/again.jsonl'}}]"
    recipe = spelling.read(None, [f"model.path={my_model}", several, "evaluation.fraction=0.2", "evaluation.rows=7"])
    train, held_out = choose_rows(recipe)
    aside = {canonical(row) for choice in held_out for row in choice.rows.rows}
    assert [len(choice.rows) for choice in held_out] == [3, 4] and [c.name for c in train] == [
        "chats.jsonl",
        "again.jsonl",
    ]
    assert not any(canonical(row) in aside for choice in train for row in choice.rows.rows)


def test_rows_of_a_source_and_one_evaluation_for_all(
    my_model: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = f"data.sources=[{{source: '{two}/chats.jsonl', rows: 5}}, {{source: '{two}/texts.json', format: text}}]"
    more = [f"evaluation.source={two}/other.jsonl", "evaluation.samples=2"]
    write_rows(two / "other.jsonl", chats(60)[50:])
    job = assemble(spelling.read(None, [f"model.path={my_model}", several, *more]))
    assert [part.report.rows for part in job.train.parts] == [5, 30] and len(job.evaluation.parts) == 1
    assert job.trainer.evaluator and not job.trainer.evaluator.sources
