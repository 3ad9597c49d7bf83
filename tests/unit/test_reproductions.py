"""The rule of the verdicts on made-up figures, the search for rates, and every reproduction in a very short setting."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path

import common
import low_rank_rules
import pytest
from common import Comparison, report, tuned, verdict
from torch import nn

ROOT = Path(__file__).parents[2]
FILES = sorted(file.stem for file in (ROOT / "reproductions").glob("*.py") if file.stem != "common")


@pytest.mark.parametrize(
    ("differences", "speaks"),
    [
        ([-2, -1.1], 1),  # mean -1.55, standard error 0.45
        ([-2, -1], 0),  # three standard errors, and not more
        ([2, 1], 0),
        ([2, 1.1], -1),
        ([0, 0], 0),
        ([-1, -1], 1),
        ([-1, -1, -1, 0.5], 0),
    ],
)
def test_a_comparison_speaks_beyond_three_standard_errors(differences: list[float], speaks: int) -> None:
    higher = [float(5 + place) for place in range(len(differences))]  # the seeds' own spread does not count
    lower = [b + d for b, d in zip(higher, differences, strict=True)]
    assert Comparison("", lower, higher).speaks() == speaks


@pytest.mark.parametrize(
    ("spoken", "says"),
    [
        ([1, 1], "holds"),
        ([1, 0], "can't be told at this scale"),
        ([1, 0, -1], "does not hold"),
        ([-1], "does not hold"),
    ],
)
def test_the_verdict(spoken: list[int], says: str) -> None:
    assert verdict(spoken) == says


def test_the_report_shows_what_it_does_not_judge(capsys: pytest.CaptureFixture[str]) -> None:
    wins, loses = Comparison("first", [1.0, 1.0], [2.0, 2.1]), Comparison("second", [3.0, 3.0], [2.0, 2.1])
    assert report("A claim", [wins], [loses]) == "holds"
    claim, _, first, second, _, last = capsys.readouterr().out.splitlines()
    assert (claim, last) == ("claim: A claim", "verdict: holds")
    assert first.endswith("1.0000 < 2.0500?  -1.0500 ± 0.0500 (2 seeds)  yes")
    assert second.endswith("no (not judged)")


def test_a_rate_is_tuned_to_where_both_neighbours_are_worse_on_seeds_of_its_own() -> None:
    seen = set()

    def loss(rate: float, seed: int) -> float:
        seen.add(seed)
        return (math.log2(rate) - 5.4) ** 2 + seed

    assert tuned(loss, 2.0) == pytest.approx(2**5.5)
    assert tuned(loss, 1024.0) == pytest.approx(2**5.5)
    assert seen == set(common.TUNING) and not seen & set(range(100))


def test_a_run_that_ends_in_no_number_is_the_worst() -> None:
    problem = common.logistic()
    net = problem.start(0)
    assert 0 < problem.loss(net) < common.WORST
    for bad in (math.nan, math.inf, 1e30):
        nn.init.constant_(net[0].get_parameter("bias")[:1], bad)
        assert problem.loss(net) == common.WORST


def test_one_seed_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rex.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        common.main(lambda seeds, scale: "")
    assert "give --seeds 2 or more" in capsys.readouterr().err


def test_low_rank_rules_are_given_no_less_memory_than_what_they_are_compared_with() -> None:
    memory, width = low_rank_rules.memory, low_rank_rules.WIDTH
    low = {name: memory(name, width, **low_rank_rules.LOW) for name in ("galore", "fira")}
    narrow = low_rank_rules.widest_within(low["galore"])
    assert memory("adamw", narrow) <= low["galore"] < memory("adamw", narrow + 1)
    assert memory("adamw-8bit", width) <= low["galore"] <= low["fira"] <= low["galore"] + 8
    assert memory("galore", width, rank=low_rank_rules.LOW["rank"] - 1) < memory("adamw-8bit", width)


@pytest.mark.parametrize("name", FILES)
def test_a_reproduction_reaches_its_verdict(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In runs of a few steps at the first rate of each search; the same figures when run again."""
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "tuned", lambda loss, first: first)
    found = module.run(range(2), 0.02)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == f"claim: {module.CLAIM}" and re.search(r"arXiv \d{4}\.\d{5}", module.__doc__ or "")
    answers = {"yes": 1, "open": 0, "no": -1}
    judged = [answers[line.split()[-1]] for line in lines[2:-2] if not line.endswith("(not judged)")]
    assert len(judged) > 1 and lines[-1] == f"verdict: {found}" == f"verdict: {verdict(judged)}"
    assert all("(2 seeds)" in line for line in lines[2:-2])
    if name == "rex":
        assert module.run(range(2), 0.02) == found and capsys.readouterr().out == printed


def test_the_page_has_a_verdict_of_every_reproduction() -> None:
    text = (ROOT / "docs" / "reproductions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `python reproductions/(\w+)\.py` \|.*\*\*(.+?)\*\*", text, re.MULTILINE))
    assert sorted(rows) == FILES
    assert set(rows.values()) <= {common.HOLDS, common.FAILS, common.OPEN}
