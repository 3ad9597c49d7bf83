"""``truetune bench steps``: the same weights, gradients and rule on every side, and raw samples that say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import invoke

from truetune.bench import steps


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 32, "KEYS": 16, "INNER": 48, "VOCABULARY": 64}.items():
        monkeypatch.setattr(steps, name, value)


def test_every_rule_is_timed_beside_its_peers_and_gives_their_weights(tmp_path: Path) -> None:
    result = invoke("bench", "steps", "--layers", "1", "--repeats", "3", "--to", str(tmp_path / "raw.json"))
    assert result.exit_code == 0, result.output
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert raw["machine"]["command"].startswith("truetune")
    assert [found["rule"] for found in raw["results"]] == list(steps.RULES)
    for found in raw["results"]:
        ways = {"truetune", *steps.RULES[found["rule"]].peers} - set(found["missing"])
        assert set(found["seconds"]) == set(found["apart"]) == set(found["first"]) == ways and len(ways) > 1
        assert all(len(samples) == 3 and min(samples) > 0 for samples in found["seconds"].values())
        bound = 0.05 if found["rule"] == "muon" else 1e-4  # torch's multiplies in bf16
        assert all(apart < bound for way, apart in found["apart"].items()), found["apart"]
        assert found["rule"] in result.stdout and "of it" in result.stdout
        assert all(f"{way:18}not installed" in result.stdout for way in found["missing"])


def test_another_rule_comes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = steps._of("torch.optim", "AdamW", betas=(0.5, 0.9))
    monkeypatch.setitem(steps.RULES, "adamw", steps.RULES["adamw"]._replace(peers={"other": other}))
    assert steps.measure("adamw", 1, 3)["apart"]["other"] > 0.02


def test_an_unknown_rule_is_refused_and_quartiles_are_those() -> None:
    result = invoke("bench", "steps", "--only", "adam")
    assert result.exit_code == 2 and "there is no rule adam to time; choose among: adamw, muon" in result.output
    assert steps.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_shapes_are_those_of_135_million_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert sum(torch.Size(s).numel() for s in steps.shapes(30, matrices=False)) == 134_515_008
