"""Real trials, of seconds: every method trains on both workloads, through a recipe, and the same trial is the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from folders import chats, invoke

from truetune.bench.optimizers import workload
from truetune.bench.optimizers.methods import METHODS, options, start
from truetune.bench.optimizers.trial import Outcome, Trial, run
from truetune.bench.optimizers.workload import Workload, prepare
from truetune.errors import UserError

TEXTS = [(f"{i}.py", f"def f{i}(x):\n    return x + {i}  # adds {i} to x\n" * 30) for i in range(20)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workloads of which little is left: a smaller model, and few rows."""
    monkeypatch.setattr(workload, "cache_folder", lambda: tmp_path / "cache")  # kernels stay where they are built
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(workload, "SHAPE", workload.SHAPE | shape)
    monkeypatch.setattr(workload, "_texts", lambda: TEXTS)
    monkeypatch.setattr(workload, "_docstrings", lambda: (chats(60), chats(64)[60:]))


def tried(ready: Workload, name: str, seed: int = 1, **changes: float) -> Outcome:
    values = start(name, ready.setting.full) | changes
    return run(ready.recipe(Trial(ready.setting, options(name, values, ready.setting.rank), METHODS[name].falls, seed)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_from_scratch(small: None, name: str) -> None:
    ready = prepare("text", 3 * 2048)
    found = tried(ready, name)
    assert found.failed is None and found.steps == 3 and 3 * 2048 <= found.tokens < 3 * 2048 + 256 * 3
    assert found.course[0][0] == 0 and found.course[-1] == (found.tokens, found.loss)
    assert abs(found.course[0][1] - math.log(300)) < 0.1  # untrained, all tokens alike
    moved = found.course[0][1] - found.loss
    assert moved > (-1e-3 if name == "prodigy" else 1e-3)  # which begins with next to no rate
    assert found.seconds > found.step_seconds > 0 and found.cpu_seconds > 0 and found.state_bytes > 0


@pytest.mark.parametrize("name", ["muon", "galore"])
def test_methods_train_an_adapter(small: None, my_model: Path, name: str) -> None:
    found = tried(prepare(str(my_model), 1024), name)
    assert found.failed is None and found.steps == 4 and found.loss < found.course[0][1]


def test_the_same_trial_is_the_same_and_another_seed_is_not(small: None) -> None:
    ready = prepare("text", 2 * 2048)
    first, again, other = tried(ready, "adamw"), tried(ready, "adamw"), tried(ready, "adamw", seed=2)
    assert first.course == again.course
    assert first.course[0][1] != other.course[0][1]  # other initial weights
    assert prepare("text", 2 * 2048).setting == ready.setting


def test_a_run_that_diverges_is_a_result(small: None) -> None:
    found = tried(prepare("text", 2048), "adamw", rate=1e30)
    assert found.loss == math.inf and found.failed


def test_a_workload_is_known_by_what_it_holds(small: None, my_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, lora = prepare("text", None).setting, prepare(str(my_model), None).setting
    assert (text.full, text.rank, text.tokens) == (True, 4, workload.TOKENS[True])
    assert (lora.workload, lora.full, lora.rank, lora.tokens) == ("my-model", False, 4, workload.TOKENS[False])
    assert prepare("text", 99).setting.tokens == 99
    monkeypatch.setattr(workload, "_texts", lambda: TEXTS[1:])
    monkeypatch.setattr(workload, "WARMUP", 0.2)
    assert (
        len({text.data, lora.data, prepare("text", None).setting.data, prepare(str(my_model), None).setting.data}) == 4
    )
    with pytest.raises(UserError, match="there is no workload nowhere"):
        prepare("nowhere", None)


def test_what_is_held_out_is_not_trained_on() -> None:
    long = [(path, f"# {path}\n" + text * 9 + f"# end of {path}\n") for path, text in TEXTS]
    train, test = workload._split(long)
    (excerpt,) = (row["text"] for row in test)
    (home,) = (text for _, text in long if excerpt in text)
    assert [{"text": text} for _, text in long if text != home] == sorted(train, key=lambda row: long_place(row, long))
    assert len(excerpt) == workload.EXCERPT and "# end" not in excerpt  # of the middle
    assert workload._split(long[::-1])[1] == test


def long_place(row: dict[str, str], texts: list[tuple[str, str]]) -> int:
    return [text for _, text in texts].index(row["text"])


def test_the_command_plans_and_then_runs_for_as_long_as_it_may(small: None, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    asked = ("bench", "optimizers", "--tokens", "2048", "--method", "muon", "--to", str(file))
    planned = invoke(*asked, "--hours", "0")
    assert planned.exit_code == 0 and file.read_text() == ""
    assert (
        "plan: 1 methods on text, 2,048 tokens a run" in planned.stdout
        and "note: muon: not tuned to its end (0" in planned.stdout
    )
    assert invoke(*asked, "--hours", "0.00001").exit_code == 0
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["trial"]["options"]["name"] == "adamw" and line["trial"]["seed"] == 0  # for the plan
    assert line["outcome"]["loss"] > 0 and line["machine"]["cores"] > 0
