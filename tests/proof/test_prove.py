"""Every promise holds on the quick start's recipe and its real model."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import invoke

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
