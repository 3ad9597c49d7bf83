"""A disk that is full or fails, data and models that change, numbers that are none: nothing is lost, nothing is silent.

The same faults, made by the kernel on real processes, are in ``tests/proof/test_faults.py``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import assert_same_end, fail_at, leftovers, while_paused
from folders import (
    STEPS,
    at_record,
    chats,
    facts,
    invoke,
    keep_jobs,
    keys,
    records,
    step_is,
    weights,
    write_model,
    write_rows,
)
from safetensors.torch import load_file, save_file

from truetune import run
from truetune.assembly import STEP_TEXT, TEXTS, Job, disk_need
from truetune.models.export import Export
from truetune.training import failure, patience
from truetune.training.checkpoint import Checkpoints
from truetune.training.record import Record, Saved

POINTS = [
    ("fsync", 1),  # recipe.yaml
    ("fsync", 30),
    ("fsync", 60),
    ("replace", 6),
    ("rename", 2),
    ("rename", -1),  # the last export
    ("line", 16),
    ("tensors", 5),
]
SHOWN = [f"{name} {at}" for name, at in POINTS]


@pytest.fixture(scope="module")
def renames(straight: tuple[Path, str]) -> int:
    """How many folders of a run take their place: checkpoints and exports."""
    return sum(r["kind"] == "saved" for r in records(straight[0])) + 2


@pytest.mark.parametrize(("name", "at"), POINTS, ids=SHOWN)
def test_a_full_disk_pauses_the_run_and_changes_nothing(
    name: str,
    at: int,
    renames: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"

    def look() -> None:
        """What a reader finds while the run waits."""
        metrics = folder / "metrics.jsonl"
        assert not metrics.exists() or metrics.read_bytes()[-1:] in (b"", b"\n")
        assert {p.name for p in leftovers(folder)} <= {".adapter.tmp", ".merged.tmp"}
        assert all(kept_is_intact(folder, step) for step in Checkpoints(folder / "checkpoints").steps())

    with monkeypatch.context() as patch:
        failed = fail_at(patch, name, at if at > 0 else renames, errno.ENOSPC, times=3)
        waits = while_paused(patch, look)
        result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 0, result.output
    assert len(failed) == 3 == len(waits) and set(waits) == {patience.WAIT}
    sentence = (
        r"paused     No space left on device at (\S+).*; free some space and the run goes on by itself, or end it "
    )
    said = re.findall(sentence + r"with Ctrl-C: everything up to the last checkpoint is kept\n", result.stderr)
    assert said and all(place.startswith(str(folder)) for place in said), result.stderr
    # A pause of run.json may fall into one of an export.
    assert result.stderr.count("goes on    there is room") == len(said) <= 2
    assert_same_end(folder, straight[0])


def kept_is_intact(folder: Path, step: int) -> bool:
    return Checkpoints(folder / "checkpoints").load(step)[1]["step"] == step


@pytest.mark.parametrize(("name", "at"), POINTS, ids=SHOWN)
def test_a_failing_disk_ends_the_run_in_one_sentence_and_loses_nothing(
    name: str,
    at: int,
    renames: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        assert not while_paused(patch)
        failed = fail_at(patch, name, at if at > 0 else renames, errno.EIO)
        result = invoke("train", *keys(my_model, my_data, folder))
    assert failed and result.exit_code == 2
    assert re.search(r"error: \S+: Input/output error; what was saved is intact, so mend the cause; ", result.stderr)
    assert len(result.stderr.splitlines()) == 1 and not leftovers(folder)
    steps = Checkpoints(folder / "checkpoints").steps()
    assert all(kept_is_intact(folder, step) for step in steps)
    if steps:
        command = shlex.split(result.stderr.rpartition("go on with: truetune ")[2])
    else:
        assert result.stderr.endswith("no step was saved yet, so start the run again\n")
        command = ["train", *keys(my_model, my_data, folder)]
        if not (folder / "run.json").exists():
            shutil.rmtree(folder)
    again = invoke(*command)
    assert again.exit_code == 0, again.output
    assert_same_end(folder, straight[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize(
    ("name", "at", "newest"), [("tensors", 5, 2), ("line", 4, 0), ("line", 16, 2), ("rename", 0, STEPS)]
)
def test_a_pause_is_ended_by_a_signal(
    name: str,
    at: int,
    newest: int,
    number: signal.Signals,
    renames: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_at(patch, name, at or renames - 1, errno.ENOSPC, times=99)
        waits = while_paused(patch, lambda: signal.raise_signal(number))
        result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 130 and len(waits) == 1
    says = re.search(r"\nstopped while the disk of \S+ was full; (.*?)(?:: truetune (.*))?\n$", result.stderr)
    assert says and facts(folder)["status"] == "interrupted" and not leftovers(folder)
    assert says[1] == ("no step was saved yet, so start the run again" if newest == 0 else "go on with")
    assert not newest or Checkpoints(folder / "checkpoints").newest() == (newest, [])
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    arguments = shlex.split(says[2]) if newest != 0 else ["train", *keys(my_model, my_data, folder)]
    assert invoke(*arguments).exit_code == 0
    assert_same_end(folder, straight[0])


def test_a_signal_within_the_exports_leaves_nothing_half_done(
    straight: tuple[Path, str], my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"

    def unheard(*_: object) -> None:
        raise AssertionError("the signal would have ended the process")

    before = signal.signal(signal.SIGTERM, unheard)
    with monkeypatch.context() as patch:
        real = run.writer_of

        def disturbed(kind: str) -> Callable[..., Export]:
            def write(*arguments: Any) -> Export:
                real(kind)(*arguments)
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("not stopped")

            return real(kind) if kind == "adapter" else write

        patch.setattr(run, "writer_of", disturbed)
        try:
            result = invoke("train", *keys(my_model, my_data, folder))
        finally:
            signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130 and "stopped before everything was exported; go on with: " in result.stderr
    assert facts(folder)["status"] == "interrupted" and not (folder / "merged").exists() and not leftovers(folder)
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    assert_same_end(folder, straight[0])


def test_a_pause_waits_for_the_room_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, tried = [0, 10, 999, 1000, 1001], []
    monkeypatch.setattr(patience.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free.pop(0)}))
    waits = while_paused(monkeypatch)

    def write() -> str:
        tried.append(len(waits))
        if len(tried) < 3:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return "written"

    assert patience.patiently(write, tmp_path / "not" / "there", 1000) == "written"
    assert tried == [0, 4, 5] and waits == [patience.WAIT] * 5


@pytest.mark.parametrize("more", [("adapter.rank=64",), ("adapter.method=full",)], ids=["lora", "full"])
@pytest.mark.parametrize("keep", [("checkpoint.keep=1",), ("checkpoint.keep=3", "output.merged=false")], ids=str)
def test_the_disk_that_is_asked_for_is_the_disk_that_is_used(
    more: tuple[str, ...], keep: tuple[str, ...], my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    folder, peak, jobs = tmp_path / "out", [0, 0], keep_jobs(monkeypatch)
    real = os.fsync

    def measured(descriptor: int) -> None:
        real(descriptor)
        sizes = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        tensors = sum(size for p, size in sizes.items() if p.suffix == ".safetensors" or p.name == "tokenizer.json")
        peak[:] = max(peak[0], tensors), max(peak[1], sum(sizes.values()) - tensors)

    monkeypatch.setattr(os, "fsync", measured)
    # The best evaluation is the first, so that its checkpoint is kept beside the newest.
    rising = ("optimizer.rate=0.5", "optimizer.name=adamw", "evaluation.every=1", "checkpoint.every=1")
    assert invoke("train", *keys(model, my_data, folder, *keep, *rising, *more)).exit_code == 0
    texts = TEXTS + STEP_TEXT * STEPS
    planned = disk_need(jobs[0]) - texts
    assert peak[0] <= planned <= 1.5 * peak[0] and peak[1] < texts


def test_too_small_a_disk_is_refused_before_the_start_but_not_for_what_the_run_holds_already(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, jobs = tmp_path / "out", keep_jobs(monkeypatch)
    at_record(monkeypatch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
    usage = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr("truetune.assembly.shutil.disk_usage", lambda _: usage)
    assert invoke("train", *keys(my_model, my_data, folder)).exit_code == 130
    need = disk_need(jobs[0])
    held = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file())
    usage.free = need - 1
    other = tmp_path / "other"
    refused = invoke("train", *keys(my_model, my_data, other))
    assert refused.exit_code == 2 and re.fullmatch(r"error: the run may need [^\n]+output.folder\n", refused.stderr)
    assert not other.exists()
    usage.free = need - held - 1
    assert invoke("train", "--resume", str(folder)).exit_code == 2
    usage.free = need - held
    assert invoke("train", "--resume", str(folder)).exit_code == 0


def in_file(name: str, value: float) -> Callable[[Path], None]:
    """Plant ``value`` in one weight of a model folder."""

    def plant(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[-1] = value
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return plant


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_broken_base_is_refused_before_anything_is_written(
    name: str, value: float, my_model: Path, my_data: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(my_model, tmp_path / "model"))
    in_file(name, value)(model)
    result = invoke("train", *keys(model, my_data, tmp_path / "out"))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    says = rf"error: \S+ has weights that are NaN or infinite \({name}\); get an intact copy of the model\n"
    assert re.fullmatch(says, result.stderr), result.stderr


def in_frozen(job: Job, value: float) -> None:
    frozen = next(p for n, p in job.trainer.model.model.named_parameters() if not p.requires_grad and "norm" in n)
    with torch.no_grad():
        frozen[0] = value


def in_trained(job: Job, value: float) -> None:
    with torch.no_grad():
        next(iter(job.trainer.model.trainable().values())).view(-1)[0] = value


def in_unused(job: Job, value: float) -> None:
    """In the embedding of a token that no document has."""
    with torch.no_grad():
        job.trainer.model.hf.get_input_embeddings().weight[0, 0] = value


def in_moment(job: Job, value: float) -> None:
    next(iter(job.trainer.optimizer.state.values()))["exp_avg"].view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize(
    ("plant", "more"),
    [
        (in_frozen, ()),
        (in_trained, ()),
        (in_unused, ("adapter.method=full",)),
        (in_moment, ()),
        (in_moment, ("adapter.method=full",)),
    ],
)
def test_what_is_no_number_never_reaches_a_checkpoint(
    plant: Callable[[Job, float], None],
    more: tuple[str, ...],
    value: float,
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, jobs = tmp_path / "out", keep_jobs(monkeypatch)
    before: list[dict[str, torch.Tensor]] = []

    def harm() -> None:
        plant(jobs[0], value)
        before.append(weights(jobs[0]))

    at_record(monkeypatch, lambda r: isinstance(r, Saved) and r.step == 4, harm)
    result = invoke("train", *keys(my_model, my_data, folder, "checkpoint.every=1", *more))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    now = weights(jobs[0])
    if plant in (in_moment, in_unused):  # the loss and the gradient of step 5 are sound
        assert re.search(r"error: \S+ is not finite after step 5, so it was not saved; lower the rate", result.stderr)
    else:
        assert re.search(r"error: the loss of step 5 is \S+; no weight was changed", result.stderr)
        assert all(torch.equal(now[n].nan_to_num(7.0), p.nan_to_num(7.0)) for n, p in before[0].items())
    assert Checkpoints(folder / "checkpoints").newest() == (4, []) and not (folder / "adapter").exists()
    tensors, _ = Checkpoints(folder / "checkpoints").load(4)
    assert all(torch.isfinite(t).all() for kind in ("weights", "optimizer") for t in tensors[kind].values())


@pytest.mark.parametrize("content", ["NaN", "Infinity", "[NaN]", "null"])
def test_a_row_that_holds_no_text_is_named(content: str, my_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", chats())
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "PLANT"}]}).replace('"PLANT"', content) + "\n")
    result = invoke("train", *keys(my_model, data, tmp_path / "out"))
    assert result.exit_code == 2 and re.fullmatch(r"error: [^\n]*\b6[01]\b[^\n]*\n", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_failure_is_told_also_where_its_bundle_cannot_be_written(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, jobs = tmp_path / "out", keep_jobs(monkeypatch)

    def harm() -> None:
        in_trained(jobs[0], float("nan"))
        monkeypatch.setattr(failure, "save_file", refused)

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    at_record(monkeypatch, step_is(5), harm)
    result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 2 and not list(folder.glob("*failure*"))
    assert re.fullmatch(
        r"error: the loss of step 6 is nan; no weight was changed; what shows it again could not be written to "
        r"\S+failure-step-6 \(Input/output error\); lower the rate\n",
        result.stderr,
    )


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "changed"])
def test_a_base_that_is_not_there_for_the_exports_costs_nothing(
    gone: bool,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, folder = Path(shutil.copytree(my_model, tmp_path / "model")), tmp_path / "out"

    def harm() -> None:
        if gone:
            shutil.rmtree(model)
        else:
            in_file("model.norm.weight", 3.0)(model)

    with monkeypatch.context() as patch:
        at_record(patch, step_is(STEPS), harm)
        result = invoke("train", *keys(model, my_data, folder))
    assert result.exit_code == 2 and re.fullmatch(
        r"error: the base model in \S+ is gone or has changed since the run began; restore it, then go on with "
        r"--resume\n",
        result.stderr,
    ), result.stderr
    assert Checkpoints(folder / "checkpoints").newest() == (STEPS, []) and not leftovers(folder)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(my_model, model)
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    assert_same_end(folder, straight[0])


def truncate(data: Path) -> None:
    os.truncate(data, 100)


def grow(data: Path) -> None:
    write_rows(data, chats(90))


@pytest.mark.parametrize("harm", [Path.unlink, truncate, grow])
def test_data_that_changes_under_a_run_does_not_touch_it_and_stops_its_resume(
    harm: Callable[[Path], None],
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, folder = Path(shutil.copy(my_data, tmp_path / "data.jsonl")), tmp_path / "out"
    with monkeypatch.context() as patch:
        at_record(patch, step_is(2), lambda: harm(data))
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        assert invoke("train", *keys(my_model, data, folder)).exit_code == 130
    refused = invoke("train", "--resume", str(folder))
    assert refused.exit_code == 2 and re.fullmatch(r"error: [^\n]+; [^\n]+\n", refused.stderr), refused.stderr
    assert Checkpoints(folder / "checkpoints").newest() == (5, [])
    shutil.copy(my_data, data)
    assert invoke("train", "--resume", str(folder)).exit_code == 0
    assert_same_end(folder, straight[0])


def test_a_run_has_no_process_but_its_own(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, found = psutil.Process(), []

    def always(_: Record) -> bool:
        found.append(own.children(recursive=True))
        return False

    at_record(monkeypatch, always, lambda: None)
    assert invoke("train", *keys(my_model, my_data, tmp_path / "out")).exit_code == 0
    assert len(found) > STEPS and not any(found)
