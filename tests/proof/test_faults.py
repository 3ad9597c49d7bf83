"""A real process, killed by SIGKILL at random moments, goes on each time and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import facts, keys, records, same_file

from truetune.training.checkpoint import Checkpoints

pytestmark = pytest.mark.proof

KILLS = 5
STEPS = 60
ENTRY = "from truetune.cli import main; main()"


def start(*arguments: str, place: Path) -> subprocess.Popen[bytes]:
    """The command line as a process; what it prints goes to ``place``."""
    with (place / "printed.txt").open("ab") as printed:
        return subprocess.Popen([sys.executable, "-c", ENTRY, *arguments], stdout=printed, stderr=printed)


def newest(folder: Path) -> int:
    return max(Checkpoints(folder / "checkpoints").steps(), default=0)


def wait_for(step: int, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the checkpoint of ``step`` is there."""
    end = time.monotonic() + 60
    while newest(folder) < step:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end, f"step {step} did not come within a minute"
        time.sleep(0.001)


def test_five_kills_change_nothing(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown if the test fails
    chance = random.Random(seed)
    more = (
        f"train.steps={STEPS}",
        "checkpoint.every=1",
        "evaluation.every=7",
        "checkpoint.keep=2",
        "adapter.dropout=0.1",
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start("train", *keys(my_model, my_data, straight, *more), place=tmp_path).wait(120) == 0
    arguments = keys(my_model, my_data, killed, *more)
    stopped = []
    for kill in range(KILLS):
        process = start("train", *arguments, place=tmp_path)
        try:
            # At least one more step each time, then at any moment of a step: computing, writing or renaming.
            wait_for(max(newest(killed) + 1, kill * STEPS // (KILLS + 1) + chance.randrange(6)), killed, process)
            time.sleep(chance.random() * 0.05)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        stopped.append(newest(killed))
        arguments = ["--resume", str(killed)]
    assert start("train", *arguments, place=tmp_path).wait(120) == 0, (tmp_path / "printed.txt").read_text()
    print(f"killed after steps {stopped}")
    assert len(set(stopped)) == KILLS and max(stopped) < STEPS
    last = f"checkpoints/step-{STEPS:08d}"
    for file in ("adapter/adapter_model", "merged/model", f"{last}/weights", f"{last}/optimizer", f"{last}/random"):
        assert same_file(straight / f"{file}.safetensors", killed / f"{file}.safetensors"), file
    figures = ("step", "loss", "rate", "gradient_norm", "tokens", "targets")
    a, b = ([[r[k] for k in figures] for r in records(f) if r["kind"] == "step"] for f in (straight, killed))
    assert a == b and [row[0] for row in b] == list(range(1, STEPS + 1))
    a, b = (facts(f) for f in (straight, killed))
    assert a["status"] == b["status"] == "finished"
    assert all(a["result"][k] == b["result"][k] for k in ("steps", "tokens", "targets"))
    assert all(a["result"][k]["loss"] == b["result"][k]["loss"] for k in ("before", "after"))
    assert not list(killed.rglob(".*")), "a kill left something behind for good"
