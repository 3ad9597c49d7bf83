"""The oldest transformers that ``pyproject.toml`` allows runs the fast invariants, in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parents[2]
MOVING = ("transformers", "huggingface_hub", "tokenizers")
"""Packages whose pins belong to the newest transformers."""
TESTS = ("tests/invariants", "tests/unit/models")


def lower_bound() -> str:
    """Its lowest version that ``pyproject.toml`` allows."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (version,) = (found[1] for line in stated if (found := re.fullmatch(r"transformers>=([\d.]+)", line)))
    return version


def environment(version: str) -> Path:
    """The Python of an environment with that transformers, and all else as ``constraints.txt`` pins it."""
    folder = ROOT / ".cache" / f"transformers-{version}"
    python, pins = folder / "bin" / "python", folder / "constraints.txt"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins.write_text("\n".join(line for line in lines if line.split("==")[0] not in MOVING) + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "-q", "-c", str(pins), "-e", f"{ROOT}[gguf,dev]"]
    subprocess.run([*command, f"transformers=={version}"], check=True)
    return python


def test_the_oldest_transformers_runs_the_fast_invariants(evidence: Callable[..., None]) -> None:
    version, started = lower_bound(), time.monotonic()
    python = environment(version)
    show = (
        "import transformers as t, peft as p, huggingface_hub as h; print(t.__version__, p.__version__, h.__version__)"
    )
    found = subprocess.run([str(python), "-c", show], check=True, capture_output=True, text=True).stdout.split()
    assert found[0] == version
    command = [str(python), "-m", "pytest", "-rs", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:]
    last = result.stdout.strip().splitlines()[-1]
    assert "skipped" not in last, result.stdout[-8000:]
    evidence(
        "oldest-transformers",
        transformers=found[0],
        peft=found[1],
        huggingface_hub=found[2],
        passed=int(re.findall(r"(\d+) passed", last)[0]),
        minutes=f"{(time.monotonic() - started) / 60:.1f}",
    )
