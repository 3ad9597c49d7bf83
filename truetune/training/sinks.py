"""Where records go: a JSONL file, a stream of JSON lines, TensorBoard, Weights & Biases; people see ``console``.

A sink reads records and nothing else. TensorBoard and Weights & Biases get the scalars only. Text that comes from
the data or the model is made safe (``clean``) before it is shown, so that no row can drive the terminal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from truetune import versions
from truetune.errors import UserError
from truetune.training.patience import patiently, write_text
from truetune.training.record import Evaluation, Record, Step, as_json, from_json

# C0 and C1 controls but newline and tab, line separators, and the characters that turn the direction of text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

TARGETS = re.compile("⟦([^⟦⟧]*)⟧")
"""A run of target tokens in ``Checks.shown``."""


class Sink(Protocol):
    """Takes the records of a run in order; ``close`` may be called once, also after an error."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def clean(text: str, limit: int | None = None) -> str:
    """``text`` safe to show: valid Unicode, no control or direction characters, at most ``limit`` characters.

    What ``limit`` cuts is counted at the end.
    """
    text = _UNSAFE.sub("", text).encode("utf-8", "replace").decode()
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: ``8.1 s``, ``12 min 3 s``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, part in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {part}"
    return f"{whole} s"


def size(count: float) -> str:
    """Bytes in binary units: ``812 MiB``, ``1.43 GiB``, ``128 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} GiB" if count >= 100 else f"{count:.3g} GiB"


def _kept(path: Path, last: int, owed: Collection[str]) -> Iterable[str]:
    """The complete lines of an earlier session up to step ``last``, less those of it whose kind is ``owed``.

    A crash may have cut the final line.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, form, kind = record["step"], record.get("format", versions.RECORD), record.get("kind")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{number} is not a record, so the run cannot be continued in it; move the file away"
            ) from error
        versions.require(f"{path}:{number}", form, versions.RECORD)
        if step < last or (step == last and kind not in owed):
            yield line


def first_looks(path: Path) -> list[Record]:
    """The first evaluation and the first samples in a file of records: what later ones are compared with."""
    found: dict[str, Record] = {}
    with path.open(encoding="utf-8") as lines:
        for values in map(json.loads, lines):
            if values["kind"] in ("evaluation", "samples") and values["kind"] not in found:
                found[values["kind"]] = from_json(values)
    return list(found.values())


class JsonLines:
    """``metrics.jsonl``: one ``as_json(record)`` per line, whole or not there, NaN and infinities as null.

    ``resume_at`` is the step of the checkpoint that the run continues from: records of later steps, and a
    last line that a crash cut, are dropped, because those steps will be taken again. Without it the file
    starts anew. ``owed`` are the kinds of records that the run makes again at that very step.
    Waits while the disk is full. Raises UserError where the file to be continued holds something else than records.
    """

    def __init__(self, path: Path, resume_at: int | None = None, owed: Collection[str] = ()) -> None:
        lines = [] if resume_at is None else list(_kept(path, resume_at, owed))
        text = "".join(f"{line}\n" for line in lines)
        patiently(lambda: write_text(path, text), path, len(text.encode()))
        self._path = path
        self._file = path.open("ab", buffering=0)  # a buffer would keep the torn part of a line for later

    def write(self, record: Record) -> None:
        line = json.dumps(as_json(record), allow_nan=False).encode() + b"\n"
        patiently(lambda: self._append(line), self._path, len(line))

    def _append(self, line: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except BaseException:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class JsonStream:
    """Each record as a line of JSON on ``stream``, at once: what a program reads that started the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, record: Record) -> None:
        self._stream.write(json.dumps(as_json(record), allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """The stream is not ours to close."""


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    """``kind/name`` and value of what can be plotted over the steps."""
    names: tuple[str, ...] = ()
    match record:
        case Step():
            names = ("loss", "router_loss", "rate", "gradient_norm", "gradient_norm_l1", "tokens_per_second", "memory")
            names += ("gpu_memory", "gpu_reserved")
        case Evaluation():
            names = ("loss", "perplexity", "accuracy")
    for name in names:
        value = getattr(record, name)
        if value is not None:
            yield f"{record.kind}/{name}", value
    if isinstance(record, Evaluation):
        for source, loss in record.by_source.items():
            yield f"{record.kind}/loss of {source}", loss


class TensorBoard:
    """The scalars of steps and evaluations as TensorBoard events in ``folder``.

    Raises UserError where the extra is not installed.
    """

    def __init__(self, folder: Path, resume_at: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard is missing; pip install 'truetune[tensorboard]' or set output.tensorboard=false"
            ) from error
        purge = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record):
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """The scalars of steps and evaluations as a run of Weights & Biases, its own files under ``folder / "wandb"``.

    name: what the run is called; key: what it is known by, so that a run that goes on stays one. recipe: all that is
    handed over beside the scalars: no rows, no answers, no code, no environment and nothing of the machine.
    Raises UserError where the extra is not installed, or it will not begin.
    """

    def __init__(self, folder: Path, name: str, key: str, recipe: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "Weights & Biases is missing; pip install 'truetune[wandb]' or set output.wandb=false"
            ) from error
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, x_disable_stats=True
        )
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "truetune"),
                name=name,
                id=hashlib.sha256(key.encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=dict(recipe),
                settings=settings,
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"Weights & Biases would not begin ({reason}); run wandb login, or set WANDB_MODE=offline"
            ) from error
        # Its own count of steps only grows, and would refuse those that a resumed run takes again.
        for kind in (Step.kind, Evaluation.kind):
            self._run.define_metric(f"{kind}/*", step_metric="trained_steps")

    def write(self, record: Record) -> None:
        if scalars := dict(_scalars(record)):
            self._run.log({"trained_steps": record.step, **scalars})

    def close(self) -> None:
        self._run.finish()
