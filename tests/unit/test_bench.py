"""``truetune bench``: every way is timed, and a wrong one is seen by its error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folders import invoke

from truetune.bench import kernels


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENS": 32, "HIDDEN": 24, "INNER": 40, "ENTRIES": 96, "RANK": 4}.items():
        monkeypatch.setattr(kernels, name, value)


def test_raw_samples_machine_and_command_are_kept(tmp_path: Path) -> None:
    result = invoke("bench", "kernels", "--repeats", "3", "--to", str(tmp_path / "raw.json"))
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "raw.json").read_text())
    assert kept["machine"]["torch"] == torch.__version__ and kept["machine"]["command"]
    names = [found["name"] for found in kept["results"]]
    assert set(names) == {"packed_attention", "rms_norm", "gated", "rope", "lora_linear", "linear_cross_entropy"}
    for found in kept["results"]:
        assert "truetune" in found["seconds"] and "reference" in found["seconds"]
        assert all(len(samples) == 3 and min(samples) > 0 for samples in found["seconds"].values())
        assert all(error < 0.05 for error in found["errors"].values()), found["name"]
        assert f"{found['name']}: {found['asked']}" in result.stdout


def test_what_is_fast_and_wrong_shows_its_error() -> None:
    (case,) = (case for case in kernels.cases() if case.name == "gated")
    wrong = case._replace(ways=case.ways | {"truetune": lambda gate, up: gate * up})
    errors = kernels.measure(wrong, 1)["errors"]
    assert errors["truetune"] > 0.2 > errors["reference"]


def test_an_operation_that_there_is_not_is_one_sentence() -> None:
    result = invoke("bench", "kernels", "--only", "flash")
    assert result.exit_code == 2 and "there is no operation flash to time; choose among: " in result.stderr
