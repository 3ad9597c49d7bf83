"""5,000 steps with everything on: memory does not creep up, speed does not fall, no file stays open."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import pytest
from folders import chats, keys, records, write_rows

pytestmark = pytest.mark.proof

STEPS = 5000
ENTRY = "from truetune.cli import main; main()"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_5000_steps(precision: str, my_model: Path, tmp_path: Path, evidence: Callable[..., None]) -> None:
    data = write_rows(tmp_path / "data.jsonl", chats(400))
    more = (
        f"train.steps={STEPS}",
        f"model.precision={precision}",
        "evaluation.every=100",
        "checkpoint.every=100",
        "output.tensorboard=true",
        "optimizer.rate=1e-3",
    )
    run = tmp_path / "run"
    arguments = keys(my_model, data, run, *more)
    with (tmp_path / "printed.txt").open("wb") as printed:
        process = subprocess.Popen([sys.executable, "-c", ENTRY, "train", *arguments], stdout=printed, stderr=printed)
    watched, files = psutil.Process(process.pid), []
    while process.poll() is None:
        time.sleep(1)
        if (run / "checkpoints").is_dir() and watched.is_running():
            files.append(_open_files(watched))
    assert process.returncode == 0, (tmp_path / "printed.txt").read_text()
    steps = [r for r in records(run) if r["kind"] == "step"]
    assert len(steps) == STEPS
    early, late = steps[STEPS // 10 : STEPS // 5], steps[-STEPS // 10 :]
    grown = median(s["memory"] for s in late) / median(s["memory"] for s in early) - 1
    slower = median(s["seconds"] / s["tokens"] for s in late) / median(s["seconds"] / s["tokens"] for s in early) - 1
    leaked = max(files[-len(files) // 4 :]) - max(files[: len(files) // 4])
    print(f"{precision}: memory {grown:+.2%}, time per token {slower:+.2%}, open files {leaked:+d}")
    evidence(f"long-run-{precision}", steps=STEPS, memory=f"{grown:+.2%}", time=f"{slower:+.2%}", files=f"{leaked:+d}")
    assert grown < 0.02 and slower < 0.05 and leaked <= 0


def _open_files(process: psutil.Process) -> int:
    try:
        return process.num_fds()
    except psutil.Error:  # it ended in between
        return 0
