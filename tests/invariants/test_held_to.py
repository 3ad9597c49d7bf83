"""What a run that goes on and an adapter that is used are held to; the best weights lost; keys that mean nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from folders import CHATML, STEPS, at_record, chats, facts, invoke, keep_jobs, keys, same_file, step_is, write_rows
from safetensors.torch import load_file, save_file
from typer.testing import Result

EXPORTED = "adapter_model.safetensors"


@pytest.fixture
def stopped(my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after step 5, with a model and data of its own."""
    shutil.copytree(my_model, tmp_path / "model")
    shutil.copy(my_data, tmp_path / "data.jsonl")
    with monkeypatch.context() as patch:
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        arguments = keys(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out")
        assert invoke("train", *arguments).exit_code == 130
    return tmp_path / "out"


def refused(result: Result, says: str) -> None:
    assert result.exit_code == 2 and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", result.stderr), result.stderr


# Tokens.


def swapped_words(model: Path) -> None:
    """A tokenizer in which two tokens have changed places: as many tokens, and all the same text."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["?"], vocabulary[","] = vocabulary[","], vocabulary["?"]
    file.write_text(json.dumps(content))


def test_other_tokens_of_the_same_number_are_refused(stopped: Path) -> None:
    swapped_words(stopped.parent / "model")
    refused(
        invoke("train", "--resume", str(stopped)), "the train data has other tokens than when the run began; restore"
    )


def test_a_template_that_prints_the_date_is_refused_on_another_day(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.chat_template_utils as templates

    class Day:
        today = "2031-01-01"

        @classmethod
        def now(cls) -> Day:
            return cls()

        def strftime(self, _: str) -> str:
            return self.today

    monkeypatch.setattr(templates, "datetime", Day)
    model, out = tmp_path / "model", str(tmp_path / "out")
    shutil.copytree(my_model, model)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}\n" + CHATML)
    with monkeypatch.context() as patch:
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        assert invoke("train", *keys(model, my_data, Path(out))).exit_code == 130
    Day.today = "2031-01-02"
    refused(
        invoke("train", "--resume", out), "other tokens .* start a new run if they print what changes, such as the date"
    )
    Day.today = "2031-01-01"
    assert invoke("train", "--resume", out).exit_code == 0


# Precision and machine.


def test_another_precision_is_refused(stopped: Path) -> None:
    file = stopped / "recipe.yaml"
    text = file.read_text()
    file.write_text(text.replace("precision: fp32", "precision: bf16"))
    refused(
        invoke("train", "--resume", str(stopped)), "began in float32 and would go on in bfloat16; write .*: fp32 into"
    )
    file.write_text(text)
    assert invoke("train", "--resume", str(stopped)).exit_code == 0


def test_another_machine_is_said(stopped: Path) -> None:
    found = facts(stopped)
    found["environment"] |= {"device": "some GPU", "torch": "1.0"}
    (stopped / "run.json").write_text(json.dumps(found))
    result = invoke("train", "--resume", str(stopped))
    assert result.exit_code == 0
    assert re.findall(r"note: (\w+) was", result.stderr) == ["device", "torch"]
    assert "note: device was some GPU and is cpu; the last digits may differ" in result.stderr


# The base of an adapter.


def test_an_adapter_is_used_on_its_own_base_alone(straight: tuple[Path, str], my_model: Path, tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(my_model, model)
    shutil.copytree(straight[0] / "adapter", adapter)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(model)}))
    asked = ("generate", str(adapter), "--prompt", "x", "--max-tokens", "2")
    assert invoke(*asked).exit_code == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refused(invoke(*asked), "trained on other weights than .*model has now .*; restore that model, or use the merged")
    (adapter / "truetune.json").unlink()  # an adapter from elsewhere says nothing of its base
    assert invoke(*asked).exit_code == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": '])
def test_a_damaged_note_beside_an_adapter_is_said(text: str, straight: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(straight[0] / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "truetune.json").write_text(text)
    refused(invoke("generate", str(tmp_path / "adapter"), "--prompt", "x"), "truetune.json is damaged .*; export")


# The best checkpoint is damaged.


def harm(folder: Path) -> None:
    file = folder / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def with_a_best_before_the_end(my_model: Path, tmp_path: Path) -> list[str]:
    """A run whose best evaluation is not its last."""
    words = ["quite", "zebra", "fjord", "xylem", "jumpy"]
    rows = [{"prompt": f"What is {i}?", "completion": word} for i, word in enumerate(words)]
    other = write_rows(tmp_path / "other.jsonl", rows)
    data = write_rows(tmp_path / "data.jsonl", chats())
    more = ("schedule.name=constant", "schedule.warmup=0", "optimizer.rate=0.02", f"evaluation.source={other}")
    return ["train", *keys(my_model, data, tmp_path / "out", *more, "evaluation.every=2", "output.merged=false")]


def test_a_run_whose_best_weights_are_lost_ends_with_its_last(
    my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, jobs = tmp_path / "out", keep_jobs(monkeypatch)

    def lose() -> None:
        best = jobs[0].trainer.best
        assert best and best.step < STEPS
        harm(folder / "checkpoints" / f"step-{best.step:08d}")

    at_record(monkeypatch, step_is(STEPS), lose)
    result = invoke(*with_a_best_before_the_end(my_model, tmp_path))
    assert result.exit_code == 0, result.output
    assert re.search(
        r"ALARM +step 8, best weights lost: .*damaged .*; those of step 8 stay instead", result.stdout, re.S
    )
    assert "tokens/s not quoted" not in result.stdout
    result = facts(folder)["result"]
    assert result["after"]["step"] == STEPS and not result["after"]["best"]
    last = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "weights.safetensors")
    assert all(torch.equal(p.detach(), last[n]) for n, p in jobs[0].trainer.model.trainable().items())
    assert "best weights lost" in (folder / "report.html").read_text()


def test_an_export_whose_best_weights_are_lost_takes_the_newest(my_model: Path, tmp_path: Path) -> None:
    folder, arguments = tmp_path / "out", with_a_best_before_the_end(my_model, tmp_path)
    assert invoke(*arguments).exit_code == 0
    best = facts(folder)["result"]["after"]["step"]
    assert 0 < best < STEPS
    good, newest = tmp_path / "good", tmp_path / "newest"
    assert invoke("export", str(folder), "--adapter", "--to", str(good)).stderr == ""
    assert same_file(good / EXPORTED, folder / "adapter" / EXPORTED)
    harm(folder / "checkpoints" / f"step-{best:08d}")
    result = invoke("export", str(folder), "--adapter", "--to", str(newest))
    assert result.exit_code == 0
    assert re.search(rf"best evaluation are lost \(.*damaged.*; those of step {STEPS} stay instead", result.stderr)
    assert not same_file(good / EXPORTED, newest / EXPORTED)
    assert "**Warning:**" in (newest / "README.md").read_text() and "are lost" in (newest / "README.md").read_text()


# Empty answers.


def test_empty_answers_are_counted_and_shown(my_model: Path, tmp_path: Path) -> None:
    rows = chats(40)
    for i in (3, 4, 20):
        rows[i]["messages"][1]["content"] = " " if i == 4 else ""
    folder = tmp_path / "out"
    assert invoke("train", *keys(my_model, write_rows(tmp_path / "d.jsonl", rows), folder), "--dry-run").exit_code == 0
    found = facts(folder)["data"]
    empty = [found[side]["empty"] for side in ("train", "evaluation")]
    assert sum(empty) == 3
    cells = rf"Empty answers</th><td>{empty[0]}</td><td>{empty[1]}</td>"
    assert re.search(cells, (folder / "report.html").read_text())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ("adapter=none", "adapter.method=full", "adapter.dropout=0.1"),
            "adapter.dropout means nothing with adapter.method=full",
        ),
        (
            ("adapter.init=pissa", "adapter.path=x"),
            "adapter.init=pissa does not go with adapter.path, which has its weights already; remove one",
        ),
        (
            ("adapter.init=pissa", "adapter.dora=true"),
            "adapter.init=pissa does not go with adapter.dora, with which .*; remove one of them",
        ),
        (
            ("adapter=none", "adapter.method=full", "adapter.also=norms"),
            "adapter.also means nothing with adapter.method",
        ),
        (("adapter.method=full", "adapter.rank=4"), "adapter.rank means nothing with adapter.method=full"),
        (
            ("evaluation.source=x.jsonl", "evaluation.fraction=0.1"),
            "evaluation.fraction means nothing with evaluation.source",
        ),
        (
            ("evaluation.split=test", "evaluation.fraction=0.05"),
            "evaluation.fraction means nothing with evaluation.split",
        ),
        (
            ("schedule.warmup=0", "schedule.warmup_from=0.1"),
            "schedule.warmup_from means nothing with schedule.warmup=0",
        ),
        (("model.revision=main",), "model.revision is for the hub, but .* is on this machine; remove model.revision"),
    ],
)
def test_what_would_be_ignored_is_refused(
    more: tuple[str, ...], says: str, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    refused(invoke("train", *keys(my_model, my_data, tmp_path / "out", *more)), says)


def test_a_section_can_be_dropped(my_model: Path) -> None:
    result = invoke("show", "recipe", "quickstart", f"model.path={my_model}", "adapter=none", "adapter.method=full")
    assert result.exit_code == 0, result.stderr
    marked = re.findall(r"(adapter\.\w+) +\*", result.stdout)
    assert marked == ["adapter.method"]


def test_a_finished_run_is_not_touched_again(straight: tuple[Path, str]) -> None:
    folder, _ = straight
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    refused(invoke("train", "--resume", str(folder)), "is finished, .*; start a new run")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
