"""tools/audit.py: a known vulnerability fails the build, and nothing looked up is never called clean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "audit.py"
SKIPPED: dict[str, Any] = {"name": "a", "skip_reason": "not found"}
CLEAN: dict[str, Any] = {"name": "b", "version": "1", "vulns": []}
HOLED: dict[str, Any] = {"name": "c", "version": "2", "vulns": [{"id": "X-1"}, {"id": "X-2"}]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        (None, 0, "NOT AUDITED"),
        ([SKIPPED], 0, "NOT AUDITED"),
        ([SKIPPED, CLEAN], 0, "1 of 2 packages were looked up; known vulnerabilities: 0"),
        ([SKIPPED, CLEAN, HOLED], 1, "2 of 3 packages were looked up; known vulnerabilities: 2\nc 2: X-1\nc 2: X-2"),
    ],
)
def test_what_was_found_is_said(packages: list[dict[str, Any]] | None, code: int, said: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    if packages is not None:
        file.write_text(json.dumps({"dependencies": packages}))
    done = subprocess.run([sys.executable, str(TOOL), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout.strip().startswith(said), done.stdout + done.stderr
