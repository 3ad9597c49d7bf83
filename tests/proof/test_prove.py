"""Every promise holds on the quick start's recipe and its real model, and on tiny models of every family."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from families import FAMILIES
from folders import invoke, keys, write_model

from truetune.promises import PROMISES

pytestmark = pytest.mark.proof


def test_the_quick_start_keeps_every_promise(
    small_model: str, tmp_path: Path, all_cores: None, evidence: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    result = invoke("prove", "quickstart", f"model.path={small_model}", f"output.folder={tmp_path / 'run'}")
    minutes = (time.monotonic() - started) / 60
    with capsys.disabled():
        print(f"\n{result.stdout}{minutes:.1f} minutes")
    assert result.exit_code == 0, result.output
    lines = [re.split(r"  +", line, maxsplit=2) for line in result.stdout.splitlines()[: len(PROMISES)]]
    assert [line[:2] for line in lines] == [["holds", name] for name in PROMISES]
    evidence("prove-quickstart", minutes=f"{minutes:.1f}", **{name: figure for _, name, figure in lines})


def test_every_family_keeps_every_promise(my_data: Path, tmp_path: Path, evidence: Callable[..., None]) -> None:
    """In full and with LoRA; or is refused, before it trains, with one sentence."""
    failed, refused = {}, {}
    for family, method in product(FAMILIES, ("lora", "full")):
        place = tmp_path / f"{family} {method}"
        place.mkdir()
        more = ["adapter.method=full", "optimizer.rate=1e-3"] if method == "full" else []
        result = invoke("prove", *keys(write_model(place / "model", family), my_data, place / "run", *more))
        if result.exit_code == 2 and re.fullmatch(r"error: [^\n]+\n", result.stderr):
            refused[place.name] = result.stderr
        elif result.exit_code or result.stdout.count("holds  ") < len(PROMISES):
            failed[place.name] = result.output
    runs = 2 * len(FAMILIES)
    evidence("prove-families", runs=runs, held=runs - len(failed) - len(refused), refused=", ".join(refused) or "none")
    assert not failed
