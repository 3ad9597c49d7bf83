"""Every reproduction in full reaches the verdict that the documentation has of it, about a minute each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproductions.md").read_text(encoding="utf-8")
VERDICTS = dict(re.findall(r"^\| `python (reproductions/\w+\.py)` \|.*\*\*(.+?)\*\*", PAGE, re.MULTILINE))


@pytest.mark.proof
@pytest.mark.parametrize("file", VERDICTS)
def test_the_verdict_is_the_one_of_the_page(file: str) -> None:
    run = subprocess.run([sys.executable, file], cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"verdict: {VERDICTS[file]}\n" in run.stdout
