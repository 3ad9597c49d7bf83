"""Real processes that are killed, real disks that are full or fail: each run goes on and ends as if nothing had been.

What can be made within one process is in ``tests/invariants/test_faults_short.py``.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from faults import assert_same_end, leftovers
from folders import STEPS, facts, invoke, keep_jobs, keys, records, write_model
from processes import WAIT, ended, newest, small_disk, start, trace, until, users_of

from truetune.assembly import disk_need
from truetune.training.checkpoint import Checkpoints

pytestmark = pytest.mark.proof

KILLS = 25
"""For each of two kinds of run."""
LONG, LAST = 240, 90
"""Steps of a run that is killed so often, and about where the last kill falls: what follows takes longer than the two
seconds that a kill may wait."""
ROOM = 16 << 20
"""Bytes of a small disk."""
MORE = {
    "lora": ("adapter.dropout=0.1", "checkpoint.keep=2"),
    "full": ("adapter.method=full", "optimizer.rate=1e-3", "checkpoint.keep=1"),
}
PAUSED = "paused     No space left on device at "


def saved(folder: Path) -> int:
    """The last step whose checkpoint is on record."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1] if (folder / "metrics.jsonl").exists() else []
    return max((int(m[1]) for line in lines if (m := re.match(r'.*"kind": "saved".*"step": (\d+)', line))), default=0)


def test_fifty_kills_change_nothing(
    my_model: Path, my_data: Path, tmp_path: Path, evidence: Callable[..., None]
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown if the test fails
    chance, counts = random.Random(seed), dict.fromkeys(("sigkill", "sigterm", "stopped_at_a_boundary", "lost"), 0)
    for kind in MORE:
        more = (f"train.steps={LONG}", "checkpoint.every=1", "evaluation.every=7", *MORE[kind])
        straight, killed = tmp_path / f"{kind}-straight", tmp_path / kind
        assert ended(start("train", *keys(my_model, my_data, straight, *more), printed=tmp_path / "straight.txt")) == 0
        arguments = ["train", *keys(my_model, my_data, killed, *more)]
        for kill in range(KILLS):
            printed = tmp_path / f"{kind}-{kill}.txt"
            kill_once(arguments, killed, printed, kill, chance, counts)
            arguments = ["train", "--resume", str(killed)]
        assert ended(start(*arguments, printed=tmp_path / "last.txt")) == 0, (tmp_path / "last.txt").read_text()
        assert_same_end(killed, straight, LONG)
        assert users_of(killed) == []
    assert counts["sigkill"] + counts["sigterm"] == 2 * KILLS and counts["stopped_at_a_boundary"] > KILLS // 4
    assert counts["lost"] == 0
    evidence("kills", kills=2 * KILLS, **counts)


def kill_once(
    arguments: list[str], folder: Path, printed: Path, kill: int, chance: random.Random, counts: dict[str, int]
) -> None:
    number = signal.SIGKILL if kill % 5 < 3 else signal.SIGTERM
    process = start(*arguments, printed=printed)
    try:
        if kill == 0 or kill % 3:
            # After one more step at least, at any moment of the next ones: computing, writing or renaming.
            least = max(newest(folder) + 1, kill * LAST // KILLS)
            until(lambda: newest(folder) >= least, process)
            time.sleep(chance.random() * 0.1)
        else:
            time.sleep(chance.random() * 2)  # anywhere, also in the start
        assert process.pid and psutil.Process(process.pid).children(recursive=True) == []
    finally:
        os.kill(process.pid or 0, number)
    status = ended(process)
    counts[number.name.lower()] += 1
    step, refused = Checkpoints(folder / "checkpoints").newest()
    counts["lost"] += step < saved(folder)
    assert users_of(folder) == []
    said = printed.read_text()
    if number == signal.SIGTERM and "saving at a step boundary" in said:
        counts["stopped_at_a_boundary"] += 1
        assert status == 130 and f"stopped after step {step}; go on with: truetune train --resume" in said, said
        assert not refused and facts(folder)["status"] == "interrupted" and not leftovers(folder)
        assert [r["step"] for r in records(folder) if r["kind"] == "step"] == list(range(1, step + 1))
    elif number == signal.SIGTERM and status == 130:  # beside the steps, where nothing is to be saved
        assert re.search("^stopped before (the run began|everything was exported)", said, re.MULTILINE), said
    else:
        assert status == -number, said


def fill(disk: Path, spare: int) -> Path:
    """Take all room but ``spare`` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    os.truncate(filler, filler.stat().st_size - spare)
    return filler


@pytest.fixture(scope="module")
def proofs() -> dict[str, int]:
    """Faults by kind that the runs of this file have met and recovered from."""
    return {}


@pytest.mark.parametrize("end", ["freed", "stopped"])
@pytest.mark.parametrize(("step", "spare"), [(2, 0), (3, 4096), (3, 3 * 4096), (5, 10 * 4096), (STEPS, 4096)])
def test_a_disk_that_fills_up(
    step: int,
    spare: int,
    end: str,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    proofs: dict[str, int],
    evidence: Callable[..., None],
) -> None:
    printed = tmp_path / "printed.txt"
    with small_disk(tmp_path / "disk", ROOM) as disk:
        folder = disk / "out"
        process = start("train", *keys(my_model, my_data, folder), printed=printed)
        until(lambda: (folder / "metrics.jsonl").exists() and f'"step": {step},' in metrics(folder), process)
        filler = fill(disk, spare)
        until(lambda: PAUSED in printed.read_text(), process)
        watched = psutil.Process(process.pid)
        before = watched.cpu_times().user
        time.sleep(10 * WAIT)
        assert process.is_alive() and watched.cpu_times().user - before < 5 * WAIT
        assert metrics(folder).endswith("\n")
        kept = Checkpoints(folder / "checkpoints")
        good = [s for s in kept.steps() if kept.load(s)[1]["step"] == s]
        assert good == kept.steps() and max(good, default=0) >= saved(folder)
        if end == "freed":
            filler.unlink()
            assert ended(process) == 0, printed.read_text()
            assert printed.read_text().count("goes on    there is room at ") == printed.read_text().count(PAUSED)
        else:
            process.terminate()
            assert ended(process) == 130, printed.read_text()
            assert "stopped while the disk of " in printed.read_text() and not leftovers(folder)
            filler.unlink()
            if good:
                folder = Path(shutil.move(folder, tmp_path / "out"))
                assert_resumes(folder)
            else:
                assert printed.read_text().endswith("no step was saved yet, so start the run again\n")
                assert invoke("train", *keys(my_model, my_data, folder)).exit_code == 0
        assert_same_end(folder, straight[0])
    proofs[f"full disk, {end}"] = proofs.get(f"full disk, {end}", 0) + 1
    evidence("faults", **proofs)


def metrics(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def assert_resumes(folder: Path) -> None:
    again = invoke("train", "--resume", str(folder))
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("kind", MORE)
def test_the_room_that_is_asked_for_is_enough(
    kind: str, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = keep_jobs(monkeypatch)
    model = write_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    arguments = keys(model, my_data, tmp_path / "dry", "checkpoint.every=1", *MORE[kind])
    assert invoke("train", *arguments, "--dry-run").exit_code == 0
    need = disk_need(jobs[0])
    with small_disk(tmp_path / "smaller", need - 8192) as disk:
        assert invoke("train", *arguments, f"output.folder={disk / 'out'}").exit_code == 2
    with small_disk(tmp_path / "disk", need + 8192) as disk:
        result = invoke("train", *arguments, f"output.folder={disk / 'out'}")
        assert result.exit_code == 0 and PAUSED not in result.stderr, result.output


CALLS = [
    # call, the n-th of them, the file or folder that it is about (of a rename: the old name)
    ("write", 4, "metrics.jsonl"),
    ("write", 2, ".run.json.tmp"),
    ("write", 1, "checkpoints/.step-00000004.tmp/state.json"),
    ("write", 1, ".merged.tmp/manifest.json"),
    ("write", 1, ".report.html.tmp"),
    ("ftruncate", 5, None),  # how safetensors begins a file
    ("fsync", 3, ".run.json.tmp"),
    ("fsync", 1, "checkpoints/.step-00000004.tmp/weights.safetensors"),
    ("fsync", 3, "checkpoints"),
    ("rename,renameat,renameat2", 2, ".run.json.tmp"),
    ("rename,renameat,renameat2", 1, "checkpoints/.step-00000004.tmp/weights.safetensors"),
    ("rename,renameat,renameat2", 1, "checkpoints/.step-00000004.tmp"),
    ("rename,renameat,renameat2", 1, ".merged.tmp"),
]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize(("call", "at", "file"), CALLS, ids=[f"{c.partition(',')[0]} {a} {f}" for c, a, f in CALLS])
def test_a_system_call_that_fails(
    call: str,
    at: int,
    file: str | None,
    error: str,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    proofs: dict[str, int],
    evidence: Callable[..., None],
) -> None:
    folder, printed, log = tmp_path / "out", tmp_path / "printed.txt", tmp_path / "log"
    process = start("train", *keys(my_model, my_data, folder), printed=printed, held=True)
    about = ["-P", str(folder / file)] if file else []
    tracer = trace(process, log, *about, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={at}")
    printed.with_suffix(".go").touch()
    status = ended(process)
    tracer.wait(30)
    assert log.read_text().count("(INJECTED)") == 1, log.read_text()
    said = printed.read_text()
    if error == "ENOSPC":
        assert status == 0 and said.count(PAUSED) == 1 == said.count("goes on    there is room at "), said
    else:
        assert status == 2 and PAUSED not in said
        last = said.splitlines()[-1]
        assert re.match(r"error: \S+: Input/output error; what was saved is intact, so mend the cause; ", last), said
        assert facts(folder)["status"] == "failed" and not leftovers(folder)
        assert metrics(folder).endswith("\n")
        kept = Checkpoints(folder / "checkpoints")
        if kept.steps():
            assert all(kept.load(step)[1]["step"] == step for step in kept.steps())
            assert "go on with: truetune train --resume" in last
            assert_resumes(folder)
        else:
            assert last.endswith("start the run again")
            assert invoke("train", *keys(my_model, my_data, folder)).exit_code == 0
    assert_same_end(folder, straight[0])
    proofs[error] = proofs.get(error, 0) + 1
    evidence("faults", **proofs)


@pytest.mark.parametrize("limit", [1500, 2345, 4096])
def test_a_write_that_the_kernel_cuts_short(
    limit: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    proofs: dict[str, int],
    evidence: Callable[..., None],
) -> None:
    """A limit on the size of files lets a part of a line be written, and then no more."""
    folder, printed = tmp_path / "out", tmp_path / "printed.txt"
    process = start("train", *keys(my_model, my_data, folder), printed=printed)
    until(lambda: newest(folder) >= 2, process)
    size = (folder / "metrics.jsonl").stat().st_size
    resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (size + limit, resource.RLIM_INFINITY))
    assert ended(process) == 2
    last = printed.read_text().splitlines()[-1]
    assert re.match(r"error: \S+: File too large; what was saved is intact, so mend the cause; go on with", last)
    assert metrics(folder).endswith("\n") and not leftovers(folder)
    assert_resumes(folder)
    assert_same_end(folder, straight[0])
    proofs["short write"] = proofs.get("short write", 0) + 1
    evidence("faults", **proofs)
