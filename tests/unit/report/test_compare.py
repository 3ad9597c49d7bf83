"""Runs beside each other: what differs, what came of them, and when they cannot be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import invoke

from truetune.errors import UserError
from truetune.report.compare import SAME, Comparison, compare, looks

PLACES = {
    ("data.evaluation", "digest"): "The held-out rows of b differ from a's, so losses cannot be compared.",
    ("data.evaluation", "document_digest"): "The tokens of the held-out rows of b differ",
    ("data.evaluation", "template"): "The chat templates of b differ from a's, so losses",
    ("model", "sha256"): "The weights of the base of b differ from a's, so losses cannot",
    ("environment", "cpu"): "The processors of b differ from a's, so speeds cannot be compared.",
    ("environment", "device"): "The devices of b differ",
    ("environment", "threads"): "The numbers of threads of b differ",
}


def complete(facts: dict[str, Any]) -> dict[str, Any]:
    facts["environment"]["threads"] = 2
    facts["data"]["evaluation"]["document_digest"] = "d" * 64
    return facts


def changed(part: str, key: str, value: Any):
    def change(facts: dict[str, Any]) -> dict[str, Any]:
        place = complete(facts)
        for name in part.split("."):
            place = place[name]
        place[key] = value
        return facts

    return change


def test_equal_runs_are_comparable_and_say_nothing(make_run) -> None:
    found = Comparison.read([make_run(name=name, facts=complete) for name in "ab"])
    assert found.comparable and not found.doubts and not found.recipe and found.names == ["a", "b"]


@pytest.mark.parametrize(("part", "key"), PLACES)
def test_what_keeps_figures_from_being_compared_is_a_sentence(make_run, part: str, key: str) -> None:
    a, b = make_run(name="a", facts=complete), make_run(name="b", facts=changed(part, key, "another"))
    (doubt,) = Comparison.read([a, b]).doubts
    assert doubt.startswith(PLACES[part, key])
    assert len(PLACES) == len(SAME)


def test_a_run_that_does_not_say_is_not_trusted(make_run) -> None:
    found = Comparison.read([make_run(name="a", facts=complete), make_run(name="b", facts=None)])
    assert len(found.doubts) == len(SAME)
    assert found.doubts[0] == "b did not record the held-out rows, so losses cannot be compared."


def test_recipes_show_only_the_keys_that_differ(make_run) -> None:
    def other(facts: dict[str, Any]) -> dict[str, Any]:
        facts["recipe"]["adapter"]["rank"] = 64
        del facts["recipe"]["train"]["seed"]
        facts["recipe"]["output"] = {"folder": "elsewhere"}
        return complete(facts)

    found = Comparison.read([make_run(name="a", facts=complete), make_run(name="b", facts=other)])
    assert dict(found.recipe) == {"adapter.rank": ["16", "64"], "train.seed": ["0", ""]}


def test_sources_that_differ_are_told_one_by_one(make_run) -> None:
    def several(weight: float) -> Any:
        def change(facts: dict[str, Any]) -> dict[str, Any]:
            facts["recipe"]["data"]["sources"] = [
                {"source": "a.jsonl", "weight": 1.0},
                {"source": "b", "weight": weight},
            ]
            facts["recipe"]["adapter"]["also"] = ["norms", "head"] if weight > 1 else []
            return complete(facts)

        return change

    found = Comparison.read([make_run(name="a", facts=several(1.0)), make_run(name="b", facts=several(2.5))])
    assert dict(found.recipe) == {"adapter.also": ["", "norms, head"], "data.sources.1.weight": ["1.0", "2.5"]}


def test_results_quote_no_speed_of_a_void_run(make_run) -> None:
    a, b = make_run(name="a", facts=complete), make_run(name="b", facts=complete, failing=("packing",))
    found = Comparison.read([a, b])
    results = dict(found.results)
    assert results["Throughput"] == ["771 tokens/s", "not quoted"]
    assert results["Held-out loss after"] == ["2.882", "2.882"] and results["Steps"] == ["70", "70"]
    assert results["Checks that failed"] == ["0", "1"]
    assert [run["tokens_per_second"] for run in found.as_json()["runs"]] == [771.4, None]
    assert "771 tokens/s" in compare([a, b])[1].read_text()


def test_curves_run_over_the_tokens_that_were_trained(make_run) -> None:
    found = Comparison.read([make_run(name="a", facts=complete), make_run(name="b", facts=complete)])
    points = looks(found.runs[0])
    steps = {s["step"]: s["tokens"] for s in found.runs[0].steps}
    assert [p["steps"] for p in points] == [0, 18, 36, 54, 70]
    assert points[0]["tokens"] == 0 and points[1]["tokens"] == sum(steps[n] for n in range(1, 19))
    (over_steps, _), (over_tokens, _) = found.plots()
    assert [c.name for c in over_steps.shown()] == ["a", "b"]
    assert over_tokens.curves[0].points[-1] == (sum(steps.values()), points[-1]["loss"])


@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_is_one_file_that_runs_nothing(make_run, hostile: bool) -> None:
    folders = [make_run(name=name, hostile=hostile, facts=complete) for name in ("a", "b", "c")]
    _, page = compare(folders)
    text = page.read_text()
    assert page == folders[0] / "compare.html" and text.count("<figure>") == 2
    assert "<script" not in text and "onerror=alert" not in text.replace("&lt;img src=x onerror=alert", "")
    assert not re.search(r'(src|href)="', text)
    assert all(f'class="run{n}"' in text for n in range(3))


def test_the_command_prints_tables_or_json(make_run, tmp_path: Path) -> None:
    a, b = make_run(name="a", facts=complete), make_run(name="b", facts=changed("model", "sha256", "x"))
    shown = invoke("compare", str(a), str(b), "--to", str(tmp_path / "page.html"))
    assert shown.exit_code == 0 and re.search(r"^Held-out loss before +3\.587 +3\.587$", shown.stdout, re.MULTILINE)
    assert "ATTENTION  The weights of the base of b differ" in shown.stdout
    assert f"page  {tmp_path / 'page.html'}" in shown.stdout
    (line,) = invoke("compare", str(a), str(b), "--json").stdout.splitlines()
    told = json.loads(line)
    assert told["comparable"] is False and told["runs"][1]["name"] == "b" and Path(told["page"]).is_file()
    assert invoke("compare", str(a), str(b), "--quiet").stdout == f"{a / 'compare.html'}\n"


def test_a_comparison_needs_two_different_runs(make_run) -> None:
    a = make_run(name="a")
    for folders in ([a], [a, a]):
        with pytest.raises(UserError, match="two or more different runs"):
            compare(folders)
