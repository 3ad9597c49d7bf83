"""A run as its user meets it: stopped in the midst of what changes no weight, read by a program, begun once more."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import assert_same_end
from folders import facts, invoke, keys, records

from truetune import run
from truetune.checks.preflight import Preflight
from truetune.facts import Facts
from truetune.training.checkpoint import Checkpoints
from truetune.training.evaluate import Evaluator, Sampler


def interrupted(patch: pytest.MonkeyPatch, kind: type, when: Callable[..., bool]) -> None:
    """A SIGINT, once, inside a call of ``kind`` for which ``when`` holds."""
    left, real = [1], kind.__call__  # type: ignore[operator]

    def call(self: Any, *arguments: Any) -> Any:
        if left and when(*arguments):
            left.pop()
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on after the signal")
        return real(self, *arguments)

    patch.setattr(kind, "__call__", call)


@pytest.mark.parametrize(("kind", "step"), [(Evaluator, 4), (Sampler, 4), (Evaluator, 8)])
def test_a_signal_inside_an_evaluation_gives_it_up_and_it_is_made_when_the_run_goes_on(
    kind: type,
    step: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(monkeypatch, kind, lambda model, at: at == step)
    folder = tmp_path / "out"
    result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 130 and f"stopped after step {step}; go on with: truetune train" in result.stderr
    missing = "evaluation" if kind is Evaluator else "samples"
    assert not [r for r in records(folder) if r["kind"] == missing and r["step"] == step]
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    assert_same_end(folder, straight[0])
    looks = [[(r["kind"], r["step"]) for r in records(f) if r["kind"] in ("evaluation", "samples")] for f in
             (folder, straight[0])]  # fmt: skip
    assert looks[0] == looks[1]


def test_a_signal_in_the_preflight_ends_it_and_the_folder_can_be_used_again(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, Preflight, lambda trainer: True)
    arguments = ["train", *keys(my_model, my_data, tmp_path / "out"), "--dry-run"]
    for dry in (arguments[:-1], arguments):
        result = invoke(*dry)
        if dry is arguments:
            assert result.exit_code == 0
        else:
            assert result.exit_code == 130 and "SIGINT" in result.stderr
            assert "stopped after step 0; no step was saved yet, so start the run again" in result.stderr
            assert facts(tmp_path / "out")["status"] == "interrupted" and not records(tmp_path / "out")
            assert not Checkpoints(tmp_path / "out" / "checkpoints").steps()


def test_a_signal_while_the_model_is_loaded_leaves_nothing(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "assemble", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = invoke("train", *keys(my_model, my_data, tmp_path / "out"))
    assert result.exit_code == 130 and "stopped before the run began, and nothing was written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_takes_long_is_told_before_it_is_done(straight: tuple[Path, str], my_data: Path, my_model: Path) -> None:
    lines = straight[1].splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["reading", "loading", "tokenising", "checking"]
    assert str(my_data) in lines[0] and str(my_model) in lines[1] and "rows to train on and" in lines[2]
    assert lines[4].startswith("ok ")


def test_json_is_all_that_is_on_stdout_and_quiet_prints_the_folder(
    my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    arguments = ["train", *keys(my_model, my_data, tmp_path / "out"), "--dry-run"]
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0 and "checking" in result.stderr and "nothing was trained" in result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == records(tmp_path / "out")
    result = invoke(*arguments, "--quiet")
    assert result.stdout == f"{tmp_path / 'out'}\n" and result.stderr == ""


def test_a_folder_whose_run_was_killed_before_it_saved_can_be_used_again(
    my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = ["train", *keys(my_model, my_data, folder), "--dry-run"]
    assert invoke(*arguments).exit_code == 0
    here = psutil.Process()
    Facts.read(folder).write(status="running", process=[here.pid, here.create_time()])
    refused = invoke(*arguments)
    assert refused.exit_code == 2 and "a run has just begun in" in refused.stderr
    for gone in ([here.pid, here.create_time() - 100], [1 << 30, 1.0], None):
        Facts.read(folder).write(status="running", process=gone)
        assert invoke(*arguments).exit_code == 0, gone
    Facts.read(folder).write(status="running")
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert "already holds something" in invoke(*arguments).stderr


@pytest.mark.parametrize("command", [("train", "--resume"), ("export",), ("report",)])
def test_facts_without_a_status_are_no_crash(straight: tuple[Path, str], tmp_path: Path, command: tuple) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("run.json", "recipe.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((straight[0] / name).read_bytes())
    told = facts(folder)
    del told["status"]
    (folder / "run.json").write_text(json.dumps(told))
    result = invoke(*command, str(folder))
    assert result.exit_code in (0, 2) and "KeyError" not in result.output


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.path=./nowhere", "neither a model folder nor a GGUF file"),
        ("data.source=no.jsonl", "there is no data at"),
    ],
)
def test_a_wrong_path_is_told_before_anything_heavy_is_imported(
    my_model: Path, my_data: Path, monkeypatch: pytest.MonkeyPatch, key: str, says: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "truetune.run", None)  # to import it would fail
    result = invoke("train", f"model.path={my_model}", f"data.source={my_data}", key)
    assert result.exit_code == 2 and says in result.stderr
