"""``truetune bench optimizers`` with a made-up loss, whose answer is known: cut off, taken up, ranked, shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import invoke

from truetune.bench import optimizers
from truetune.bench.optimizers import comparison
from truetune.bench.optimizers.comparison import SEEDS, compare, least
from truetune.bench.optimizers.methods import METHODS, axes
from truetune.bench.optimizers.table import notes, table
from truetune.bench.optimizers.trial import Left, Outcome, Setting, Trial, Trials
from truetune.bench.optimizers.workload import Workload

SETTING = Setting("text", "0123", 1000, full=True, rank=8)
BETTER = {"adamw": 1.0, "muon": 1.5, "soap": 0.8, "galore": 0.1, "nadamw": 9.0}
"""How many times its tokens a method is worth; the others are worth AdamW's."""


def worth(trial: Trial) -> float:
    """A loss that falls with tokens as 1 / sqrt(T), and is least at twice the start's rate and at a decay of 0.1."""
    method = METHODS[trial.method]
    tokens = trial.budget * BETTER.get(trial.method, 1.0)
    off = math.log2(trial.options["rate"] / method.rate) - 1
    decay = abs(math.log10((trial.options["weight_decay"] + 1e-3) / 0.101))
    return 2 + tokens**-0.5 + 0.1 * off**2 + 0.05 * decay + 0.001 * (trial.seed - 2)


def outcome(trial: Trial, loss: float) -> Outcome:
    tokens = round(trial.budget * trial.setting.tokens)
    seconds = 3.0 if trial.method == "muon" else 2.0
    cost, failed = 36.0 * trial.budget, None if math.isfinite(loss) else "no number"
    return Outcome(loss, (), tokens, 10, 10 * seconds, seconds, cost, 4_000_000, failed)


class Fake:
    """Trains nothing; ``after`` so many trials it is out of time."""

    def __init__(self, after: float = math.inf) -> None:
        self.after = after
        self.trials: list[Trial] = []

    def __call__(self, trial: Trial) -> Outcome:
        if len(self.trials) >= self.after:
            raise Left
        self.trials.append(trial)
        return outcome(trial, worth(trial))


def test_methods_are_ranked_where_each_is_at_its_best() -> None:
    fake = Fake()
    found = compare(SETTING, list(METHODS), fake)
    assert [s.method for s in found.standings][:2] == ["nadamw", "muon"] and found.standings[-1].method == "galore"
    assert all(s.left is None and s.values["decay"] == 0.1 for s in found.standings)
    assert all(s.values["rate"] == pytest.approx(2 * METHODS[s.method].rate, rel=0.01) for s in found.standings)
    told = {s.method: [str(one) for one in found.speedups(s)] for s in found.standings}
    assert told["adamw"][0] == "1.00" and told["nadamw"] == ["more than 4.00"] * 4
    assert told["muon"][0] == "1.50" and told["soap"][0] == "0.80" and told["galore"] == ["less than 0.50"] * 4
    muon = found.speedups(found.standings[1])
    assert muon[1].times < muon[2].times == pytest.approx(1.5) and muon[2].times < muon[3].times
    assert len(fake.trials) >= least(SETTING, list(METHODS)) - 7  # the curve's 39 stand for 18 trials


def test_no_search_sees_a_seed_that_ranks_and_all_are_compared_alike() -> None:
    fake = Fake()
    compare(SETTING, list(METHODS), fake)
    assert not any(trial.seed in SEEDS for trial in fake.trials[: 2 * len(axes("adamw", True))])
    final = {name: [t for t in fake.trials if t.method == name and t.seed in SEEDS] for name in METHODS}
    assert all(Counter(t.seed for t in final[name]) == dict.fromkeys(SEEDS, 1) for name in METHODS if name != "adamw")
    assert {t.seed for t in fake.trials} == {0, *SEEDS} and SEEDS == (1, 2, 3)
    assert {t.method for t in fake.trials if not t.falls} == {"schedule-free-adamw"}
    assert {t.budget for t in fake.trials if t.method != "adamw"} == {1.0}


def test_the_rate_of_the_curve_is_tuned_at_each_length() -> None:
    tried: list[Trial] = []

    def ask(trial: Trial) -> Outcome:
        tried.append(trial)
        off = math.log2(trial.options["rate"] / METHODS["adamw"].rate) + math.log2(trial.budget) / 2
        return outcome(trial, 2 + trial.budget**-0.5 + off**2 + 0.001 * trial.seed)

    compare(SETTING, ["adamw"], ask)
    final = {t.budget: t.options["rate"] for t in tried if t.seed == SEEDS[-1]}
    assert final == pytest.approx({b: 1e-3 * b**-0.5 for b in (0.5, 1.0, 2.0, 4.0)}, rel=0.01)


def test_a_failed_run_is_worse_than_all_others_and_the_others_go_on() -> None:
    def ask(trial: Trial) -> Outcome:
        fails = trial.options["rate"] > METHODS[trial.method].rate * 1.1
        return outcome(trial, math.inf if fails else worth(trial))

    found = compare(SETTING, ["adamw", "muon"], ask)
    assert all(s.values["rate"] == METHODS[s.method].rate for s in found.standings)


def test_losses_that_do_not_fall_make_no_curve_but_a_ranking() -> None:
    found = compare(SETTING, ["adamw", "muon"], lambda t: outcome(t, worth(t) + 2 * t.budget))
    assert found.curve is None and found.standings[0].method == "muon"
    assert "does not fall" in str(next(s.left for s in found.standings if s.method == "adamw"))
    assert not found.speedups(found.standings[0])


@pytest.mark.parametrize("after", [0, 9])
def test_what_is_left_is_said(after: int) -> None:
    found = compare(SETTING, ["adamw", "muon"], Fake(after))
    assert {s.left for s in found.standings} == {"not tuned to its end"} and found.curve is None
    assert table(found, Trials()).endswith("1,000 tokens a run: nothing is ranked yet")


# The command.


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The command over a made-up loss; ``after`` so many new trials its hours are over."""

    def invoked(*arguments: str, after: float = math.inf, fails: str = "") -> tuple[Any, list[Trial]]:
        done: list[Trial] = []

        def run(trial: Trial) -> Outcome:
            done.append(trial)
            return outcome(trial, math.inf if trial.method == fails else worth(trial))

        class Ready(Workload):
            def recipe(self, trial: Trial) -> Any:
                return trial

        monkeypatch.setattr(optimizers, "prepare", lambda *_: Ready(SETTING, tmp_path, None))
        monkeypatch.setattr(optimizers, "run", run)
        clock = iter(range(10**6))
        monkeypatch.setattr(optimizers.time, "monotonic", lambda: 0 if len(done) < after else 3601 + next(clock))
        return invoke("bench", "optimizers", *arguments), done

    return invoked


def test_a_comparison_that_was_cut_off_goes_on_where_it_stopped(bench: Callable[..., Any], tmp_path: Path) -> None:
    file, whole = str(tmp_path / "runs.jsonl"), str(tmp_path / "whole.jsonl")
    first, done = bench("--to", file, "--method", "adamw", "--method", "muon", "--hours", "1", after=12)
    assert first.exit_code == 0 and len(done) == 12
    assert "note: muon: not tuned to its end" in first.stdout
    Path(file).write_bytes(Path(file).read_bytes() + b'{"format": 1, "tri')  # as a crash leaves it
    second, more = bench("--to", file, "--method", "adamw", "--method", "muon", "--hours", "1")
    straight, every = bench("--to", whole, "--method", "adamw", "--method", "muon")
    assert done + more == every and len({t.key for t in every}) == len(every)
    lines = [line for line in second.stdout.splitlines() if line.startswith(("| muon", "| adamw"))]
    assert lines == [line for line in straight.stdout.splitlines() if line.startswith(("| muon", "| adamw"))]
    assert "plan: 2 methods on text, 1,000 tokens a run" in straight.stdout
    assert "plan: 36.0 CPU-seconds a run of AdamW" in straight.stdout
    again, none = bench("--to", whole, "--method", "adamw", "--method", "muon")
    assert not none and again.stdout.splitlines()[-5:] == straight.stdout.splitlines()[-5:]


def test_the_table_and_the_picture_are_of_the_files(bench: Callable[..., Any], tmp_path: Path) -> None:
    parts = [str(tmp_path / f"{name}.jsonl") for name in ("adamw", "muon")]
    for name, file in zip(("adamw", "muon"), parts, strict=True):
        assert bench("--to", file, "--method", name)[0].exit_code == 0
    shown, done = bench("--table", parts[0], "--table", parts[1], "--picture", str(tmp_path / "speed.svg"))
    assert shown.exit_code == 0 and not done
    muon = next(line for line in shown.stdout.splitlines() if line.startswith("| muon"))
    cells = [cell.strip() for cell in muon.strip("|").split("|")]
    assert cells[1] == "`rate=0.002 weight_decay=0.1 momentum=0.95 rest_rate=0.002`"
    assert cells[4:8] == ["1.50", cells[5], "1.50", "4.0 MB"]
    assert cells[2] == "2.8165" and cells[3] == "2.8155 to 2.8175"
    own = [json.loads(line) for line in Path(parts[1]).read_text().splitlines()]
    own = [line for line in own if line["trial"]["options"]["name"] == "muon"]
    assert cells[8] == str(len(own)) and cells[9] == f"{len(own) * 36 / 3600:.2f}"
    assert "note: soap: not tuned to its end (0 trials so far)" in shown.stdout
    assert "note: AdamW's loss at T times 500 tokens is 2.0000 + 1.4142 / T^0.500" in shown.stdout
    drawn = ElementTree.parse(tmp_path / "speed.svg").getroot()
    bars = [e for e in drawn.iter() if e.get("class") in ("ours", "peer")]
    assert [bar.get("class") for bar in bars] == ["peer", "ours"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[0] / widths[1] == pytest.approx(1.5, rel=0.01)


def test_what_failed_and_what_ended_at_an_edge_is_said(bench: Callable[..., Any], tmp_path: Path) -> None:
    shown, done = bench("--to", str(tmp_path / "a"), "--method", "muon", fails="muon")
    tried = len([trial for trial in done if trial.method == "muon"])
    assert f"note: muon: {tried} of {tried} trials failed, and counted as worse than all others" in shown.stdout
    assert "| inf |" in shown.stdout and "failed: no number" in shown.stdout
    for sign, edges in ((-1, "decay"), (1, "")):
        found = compare(SETTING, ["adamw"], lambda t, s=sign: outcome(t, worth(t) + 30 * s * t.options["weight_decay"]))
        said = [note for note in notes(found, Trials()) if "edge of the grid" in note]
        assert said == [f"adamw: the search ended at an edge of the grid ({edges})"] * bool(edges)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "adam", "--to", "a"], "adam is none of the methods"),
        ([], "name a file for them with --to FILE"),
        (["--to", "no/such/folder/a"], "can't write no/such/folder/a"),
        (["--table", "none.jsonl"], "can't read none.jsonl"),
        (["--table", "bad.jsonl"], "bad.jsonl: line 2 is no trial"),
        (["--table", "later.jsonl"], "has format 2, but truetune"),
        (["--table", "empty.jsonl"], "empty.jsonl has no runs yet"),
        (["--table", "good.jsonl", "--hours", "1"], "--table trains nothing"),
        (["--table", "good.jsonl", "--picture", "a.png"], "is not SVG"),
    ],
)
def test_wrong_use_is_one_sentence(
    bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bench("--to", "good.jsonl", "--method", "muon", "--hours", "1", after=1)
    line = Path("good.jsonl").read_text()
    Path("empty.jsonl").touch()
    Path("bad.jsonl").write_text(line + "{}\n")
    Path("later.jsonl").write_text(line.replace('"format": 1', '"format": 2'))
    shown, _ = bench(*arguments)
    assert shown.exit_code == 2 and says in shown.stderr and shown.stderr.count("\n") == 1


def test_the_least_cost_is_that_of_searches_that_do_not_move() -> None:
    looked = sum(1 + 2 * len(axes(name, True)) for name in ("muon", "soap"))
    assert least(SETTING, ["muon", "soap"]) == looked + 6
    assert least(SETTING, ["adamw"]) == 1 + 2 * 5 + 3 + 6 * 6.5
    assert comparison.BUDGETS == (0.5, 1.0, 2.0, 4.0)
