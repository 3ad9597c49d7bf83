"""Results as a table and a picture: every figure against one that was worked out by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import invoke

from truetune.bench.table import Spread, figures, noisy


def side(seconds: list[float], **more: Any) -> dict[str, Any]:
    samples = [{"seconds": s, "loss": 3.0 - i, "own_cpu": 0.9, "other_cpu": 0.01} for i, s in enumerate(seconds)]
    return {
        "warm_up": {"loss": 4.0}, "samples": samples, "peak_bytes": 3 * 2**30, "moved": 7, "tensors": 7,
        "started_bytes": 2**29, "trained": 2**20, **more,
    }  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    verdict = {"name": "no frozen tensor moved", "passed": True, "figure": "0 of 9"}
    return {
        "format": 2,
        "frozen_bytes": 2**28,
        "apart": False,
        "machine": {"truetune": "0.1.0"},
        "workload": "tiny",
        "mode": "lora",
        "job": {"compute": "bf16"},
        "steps": [{"tokens": t, "targets": t // 2, "flops": 1e9} for t in (999, 100, 200, 300)],
        "rounds": [{"gemm": {"bf16": p, "fp32": 1.0}} for p in (1e9, 2e9, 1e9)],
        "sides": {
            "slow": side([4.0, 4.0, 6.0], started_bytes=2**20),
            "truetune": side([1.0, 1.0, 2.0], verdicts=[verdict], alarms=[]),
            "quick": side([2.0, 1.0, 3.0]),
        },
    }


def test_figures_are_medians_over_rounds(result: dict[str, Any]) -> None:
    ours, quick, slow = figures(result)
    assert [f.side for f in (ours, quick, slow)] == ["truetune", "quick", "slow"]
    assert ours.useful == Spread(150, 125, 175) and ours.target == 75 and ours.ratio is None
    assert quick.ratio == Spread(1.5, 1.25, 1.75) and slow.ratio == Spread(4.0, 3.5, 4.0)
    assert ours.mfu == 0.5 and slow.mfu == pytest.approx(1 / 6)  # of 1, 1/2, 1/2; of 1/4, 1/8, 1/6
    assert (
        ours.losses == (4.0, 1.0)
        and ours.peak_bytes == 3 * 2**30
        and (ours.sound, slow.sound) == ("7 of 7, 1 of 1", "7 of 7")
    )
    assert ours.above_bytes == slow.above_bytes == 3 * 2**30 - 2**29 - 2**28 - 12 * 2**20
    assert ours.targets == 999 // 2 + 50 + 100
    assert figures(result | {"apart": True})[0].targets == 999 // 2  # every round begins anew


def test_one_round_has_no_spread(result: dict[str, Any]) -> None:
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5)


def test_what_keeps_figures_from_being_trusted_is_said(result: dict[str, Any]) -> None:
    few = "tiny, lora, bf16 has 3 rounds, whose median means little; take 5 or more"
    assert list(noisy(result)) == [few]
    loud = copy.deepcopy(result)
    loud["sides"]["quick"]["samples"][1]["other_cpu"] = 0.12
    assert [*noisy(loud)] == [
        few,
        "1 of 3 rounds of tiny, lora, bf16 were noisy: something else used up to 12% of the machine",
    ]
    enough = result | {"rounds": result["rounds"] * 2, "steps": result["steps"] + result["steps"][1:]}
    enough["sides"] = {k: v | {"samples": v["samples"] * 2} for k, v in result["sides"].items()}
    assert list(noisy(enough)) == []
    result["sides"]["truetune"]["verdicts"][0]["passed"] = False
    result["sides"]["truetune"]["alarms"] = ["no gradient"]
    assert "a check of truetune failed: no frozen tensor moved: 0 of 9" in "".join(noisy(result))
    assert "truetune raised an alarm: no gradient" in "".join(noisy(result))


def test_table_and_picture_are_made_from_the_file(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps(result))
    shown = invoke("bench", "table", str(tmp_path / "raw.json"), "--picture", str(tmp_path / "speed.svg"))
    assert shown.exit_code == 0, shown.output
    assert "| tiny, lora, bf16 | quick | 100 |" in shown.stdout and "| 1.50 times | 1.25 to 1.75 |" in shown.stdout
    drawn = ElementTree.parse(tmp_path / "speed.svg").getroot()
    bars = [e for e in drawn.iter() if e.get("class") in ("ours", "peer")]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert [bar.get("class") for bar in bars] == ["ours", "peer", "peer"]
    medians = [f.useful.middle for f in figures(result)]
    assert [w / widths[0] for w in widths] == pytest.approx([m / medians[0] for m in medians], rel=1e-3)
    assert any("ours 4.00 times as fast" in (e.text or "") for e in drawn.iter())


@pytest.mark.parametrize(
    ("text", "picture", "says"),
    [
        ("{}", "a.svg", "is no result of truetune bench training"),
        ("[", "a.svg", "is no result of truetune bench training"),
        (None, "a.svg", "can't read"),
        ('{"format": 3, "machine": {"truetune": "9.9"}}', "a.svg", "has format 3, but truetune"),
        ("good", "a.png", "is not SVG"),
        ("good", "no/a.svg", "can't write"),
    ],
)
def test_wrong_files_are_one_sentence(
    result: dict[str, Any], tmp_path: Path, text: str | None, picture: str, says: str
) -> None:
    if text is not None:
        (tmp_path / "raw.json").write_text(json.dumps(result) if text == "good" else text)
    shown = invoke("bench", "table", str(tmp_path / "raw.json"), "--picture", str(tmp_path / picture))
    assert shown.exit_code == 2 and says in shown.stderr and shown.stderr.count("\n") == 1
