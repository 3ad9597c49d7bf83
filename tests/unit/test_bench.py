"""``truetune bench``: every way is timed, and a wrong one is seen by its error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import invoke
from interpreted import exact
from torch import Tensor

from truetune.bench import kernels
from truetune.bench.kernels import with_triton


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"TOKENS": 32, "HIDDEN": 24, "INNER": 40, "ENTRIES": (96,), "RANK": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels, name, value)


def test_raw_samples_machine_and_command_are_kept(tmp_path: Path) -> None:
    result = invoke("bench", "kernels", "--repeats", "3", "--to", str(tmp_path / "raw.json"))
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "raw.json").read_text())
    assert kept["machine"]["torch"] == torch.__version__ and kept["machine"]["command"]
    names = [found["name"] for found in kept["results"]]
    assert set(names) == {
        "packed_attention",
        "rms_norm",
        "gated",
        "rope",
        "lora_linear",
        "linears",
        "linear_cross_entropy",
        "newton_schulz",
        "adamw",
        "adamw_8bit",
    }
    for found in kept["results"]:
        assert "truetune" in found["seconds"] and "reference" in found["seconds"]
        assert all(len(samples) == 3 and min(samples) > 0 for samples in found["seconds"].values())
        assert all(error < 0.05 for error in found["errors"].values()), found["name"]
        assert f"{found['name']}: {found['asked']}" in result.stdout
        assert len(found.get("products", [])) == (3 if found["name"] == "linear_cross_entropy" else 0)
    assert "products" in result.stdout


def test_what_is_fast_and_wrong_shows_its_error() -> None:
    (case,) = (case for case in kernels.cases() if case.name == "gated")
    wrong = case._replace(ways=case.ways | {"truetune": lambda gate, up: gate * up})
    errors = kernels.measure(wrong, 1)["errors"]
    assert errors["truetune"] > 0.2 > errors["reference"]


def test_what_is_no_number_or_wrong_once_is_an_error() -> None:
    (case,) = (case for case in kernels.cases() if case.name == "gated")
    turns = iter(range(100))

    def broken(gate: Tensor, up: Tensor) -> Tensor:
        return case.ways["truetune"](gate, up) * (3.0 if next(turns) == 0 else 1.0)

    def undefined(gate: Tensor, up: Tensor) -> Tensor:
        out = case.ways["truetune"](gate, up)
        if out.requires_grad:
            out.register_hook(lambda g: g * math.nan)
        return out

    errors = kernels.measure(case._replace(ways=case.ways | {"once": broken, "undefined": undefined}), 1)["errors"]
    assert errors["once"] > 1 and errors["undefined"] == math.inf > errors["truetune"]


def test_an_operation_that_there_is_not_is_one_sentence() -> None:
    result = invoke("bench", "kernels", "--only", "flash")
    assert result.exit_code == 2 and "there is no operation flash to time; choose among: " in result.stderr


def measured(triton: list[float], error: float = 1e-3, name: str = "gated") -> dict[str, Any]:
    seconds = {"truetune": [2.0] * 4, "torch": [1.0] * 4, "triton": triton}
    return {"name": name, "seconds": seconds, "errors": {"truetune": 1e-3, "torch": 1e-3, "triton": error}}


@pytest.mark.parametrize(
    ("results", "won"),
    [
        ([measured([0.5, 0.5, 0.5, 1.5])], ["gated"]),
        ([measured([0.5, 0.5, 1.5, 1.5])], []),  # of torch's own it loses every other turn
        ([measured([0.5] * 4, error=2.1e-3)], []),
        ([measured([0.5] * 4), measured([1.5] * 4)], []),  # it has to win whatever is asked
        ([measured([0.5] * 4), measured([1.5] * 4, name="rope")], ["gated"]),
    ],
)
def test_a_kernel_is_chosen_that_is_faster_and_as_right(results: list[dict[str, Any]], won: list[str]) -> None:
    assert kernels.winners(results) == won


def test_the_choice_is_kept_for_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The GPU's place is taken by this processor, and the kernels' times by injected ones."""
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Imagined GPU")
    monkeypatch.setattr(kernels, "cases", list)
    monkeypatch.setattr(kernels, "winners", lambda results: ["lora_linear"])
    kernels.write([], 1, None, choose=True)
    assert json.loads((tmp_path / "kernels" / "imagined-gpu.json").read_text())["chosen"] == ["lora_linear"]


def test_without_a_gpu_there_is_nothing_to_choose() -> None:
    result = invoke("bench", "kernels", "--choose")
    assert result.exit_code == 2 and "torch sees none; see truetune doctor" in result.stderr


@pytest.mark.parametrize("name", ["gated", "adamw", "adamw_8bit"])
def test_our_kernel_is_one_more_way(name: str) -> None:
    torch.manual_seed(0)
    for case in (case for case in kernels.cases() if case.name == name):
        with exact():
            errors = kernels.measure(with_triton(case, "cpu"), 1)["errors"]
        assert errors["triton"] <= 2 * errors["reference"]


def test_what_changes_its_tensors_gets_fresh_ones() -> None:
    case = next(case for case in kernels.cases() if case.name == "adamw")
    before = [t.clone() for t in case.tensors]
    errors = kernels.measure(case._replace(ways=case.ways | {"idle": lambda *tensors: None}), 2)["errors"]
    assert all(torch.equal(a, b) for a, b in zip(case.tensors, before, strict=True))
    assert errors["idle"] > 10 * errors["truetune"]
