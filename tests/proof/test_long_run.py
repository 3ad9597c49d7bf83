"""5,000 steps with everything on: memory does not creep up, speed does not fall, no file stays open.

Speed is a ratio: beside every step a fixed piece of work is timed, because a machine's own speed changes over minutes
by more than what is looked for. All rows have the same number of tokens: oneDNN keeps what it compiled for every new
shape of a bf16 product, which is no leak of ours and would hide one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import pytest
import torch
from folders import chats, invoke, keys, records, write_rows
from tiny import tiny

from truetune import run
from truetune.training.record import Record, Step

pytestmark = pytest.mark.proof

STEPS = 5000


class Control:
    """A sink that, at every step, times forward and backward of a model of its own, and counts open files."""

    def __init__(self) -> None:
        self.model = tiny("llama")
        self.tokens = torch.arange(3, 93)[None]
        self.seconds: list[float] = []
        self.files: list[int] = []

    def write(self, record: Record) -> None:
        if isinstance(record, Step):
            started = time.perf_counter()
            self.model(input_ids=self.tokens).logits.logsumexp(-1).sum().backward()
            self.seconds.append(time.perf_counter() - started)
            self.files.append(psutil.Process().num_fds())

    def close(self) -> None:
        pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_5000_steps(
    precision: str, my_model: Path, tmp_path: Path, evidence: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data.jsonl", chats(900)[500:])
    more = (
        f"train.steps={STEPS}",
        f"model.precision={precision}",
        "evaluation.every=100",
        "checkpoint.every=100",
        "output.tensorboard=true",
        "optimizer.rate=1e-3",
    )
    control, real = Control(), run._sinks
    monkeypatch.setattr(run, "_sinks", lambda *arguments: [*real(*arguments), control])
    result = invoke("train", *keys(my_model, data, tmp_path / "run", *more))
    assert result.exit_code == 0, result.output
    steps = [r for r in records(tmp_path / "run") if r["kind"] == "step"]
    assert len(steps) == len(control.seconds) == STEPS
    early, late = slice(STEPS // 10, STEPS // 5), slice(-STEPS // 10, None)

    def slowness(part: slice) -> float:
        pairs = zip(steps[part], control.seconds[part], strict=True)
        return median(s["seconds"] / s["tokens"] / c for s, c in pairs)

    grown = median(s["memory"] for s in steps[late]) / median(s["memory"] for s in steps[early]) - 1
    slower = slowness(late) / slowness(early) - 1
    leaked = min(control.files[late]) - min(control.files[early])  # some are open for a moment
    figures = {"memory": f"{grown:+.2%}", "time": f"{slower:+.2%}", "files": f"{leaked:+d}"}
    evidence(f"long-run-{precision}", steps=STEPS, **figures)
    assert grown < 0.02 and slower < 0.05 and leaked <= 0, figures
