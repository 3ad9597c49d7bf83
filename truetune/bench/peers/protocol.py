"""What every side speaks with the process that compares them, and what is measured of it alike.

Its first argument is a folder with ``job.json`` and ``documents.npz``. A side loads, says so in one line of JSON, takes
one optimizer step at every line "step" of its standard input and answers with seconds, loss and what it counted; at
"end" it says what it needed and moved, and ends. Whatever else it prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORE = -100


class Row(NamedTuple):
    """One document: its tokens, and the same where they are targets, else ``IGNORE``; int64 [L]."""

    ids: np.ndarray
    labels: np.ndarray


class Side:
    """job: model, adapter (None: every weight is trained), compute, rate, clip, threads, longest (tokens of a
    document), recipe (keys of ours). steps: the documents of every optimizer step. options: of this side.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.folder, self.options = Path(sys.argv[1]), set(sys.argv[2:])
        self.job: dict[str, Any] = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        with np.load(self.folder / "documents.npz") as arrays:
            tokens, targets, lengths = (arrays[name] for name in ("tokens", "targets", "lengths"))
        ends = np.cumsum(lengths)[:-1]
        labels = np.where(targets, tokens, IGNORE)
        rows = [Row(*pair) for pair in zip(np.split(tokens, ends), np.split(labels, ends), strict=True)]
        size = self.job["documents"]
        self.steps = [rows[i : i + size] for i in range(0, len(rows), size)]
        torch.set_num_threads(self.job["threads"])
        self._started_bytes = _memory("VmRSS")  # what was imported
        torch.manual_seed(0)

    @property
    def autocast(self) -> bool:
        """Whether products are computed in bfloat16 where weights are in fp32."""
        return bool(self.job["compute"] == "bf16")

    @property
    def stored(self) -> torch.dtype:
        """What frozen weights are kept in; trained ones are fp32."""
        return torch.bfloat16 if self.autocast and self.job["adapter"] else torch.float32

    def ready(self, trained: Iterable[torch.Tensor], packages: Iterable[str], **more: Any) -> None:
        """Say what is trained; from here on memory counts."""
        self._trained = list(trained)
        self._before = [_sums(p) for p in self._trained]
        self._say(
            trained=sum(p.numel() for p in self._trained),
            dtypes=sorted({str(p.dtype).removeprefix("torch.") for p in self._trained}),
            started_bytes=self._started_bytes,
            loaded_bytes=_memory("VmRSS"),
            versions={name: version(name) for name in packages},
            **more,
        )
        _forget_peak()

    def begin(self) -> None:
        """Wait until this side may take a step, and start its clock."""
        if sys.stdin.readline().strip() != "step":
            raise SystemExit("the comparison ended early")
        self._started, self._seconds = time.perf_counter(), 0.0

    def lap(self) -> None:
        """The step is over; what follows is its account."""
        self._seconds = time.perf_counter() - self._started

    def done(self, loss: float, tokens: int, targets: int) -> None:
        """Answer for the step: its mean loss before the update, tokens that were no padding, and targets."""
        if not self._seconds:
            self.lap()
        self._say(seconds=self._seconds, loss=float(loss), tokens=int(tokens), targets=int(targets))

    def finish(self, **more: Any) -> None:
        """Wait for the end, and say what it took."""
        peak = _memory("VmHWM")
        moved = sum(_sums(p) != before for p, before in zip(self._trained, self._before, strict=True))
        if sys.stdin.readline().strip() == "end":
            self._say(peak_bytes=peak, moved=moved, tensors=len(self._trained), **more)

    def _say(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    values = tensor.detach().double()
    return float(values.sum()), float(values.square().sum())


def _memory(key: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most since ``_forget_peak``. Without /proc both are the most ever."""
    try:
        found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="ascii")
