"""The promise about crashes: whenever a save ends, the last good checkpoint loads, and a damaged one is refused.

The moments are enumerated, not drawn: a save is made once with every call watched that changes the folder, and the
folder is copied before each. A copy is what a killed process leaves; the same copy with every file emptied, or cut
in half, that had not been synced by then is what a power failure may leave.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from torch import Tensor

from truetune.errors import UserError
from truetune.promises.ground import Ground
from truetune.training.checkpoint import MANIFEST, Checkpoints
from truetune.training.record import Verdict

CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "link", "symlink", "truncate")
FLIPS = (0x01, 0x20, 0xFF)
STUMBLES = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""What a parser raises on damaged input that it was not kept from."""
Tensors = dict[str, dict[str, Tensor]]


def crash_safety(ground: Ground) -> Verdict:
    """Whenever a save ends, the last good checkpoint loads, and a damaged one is refused."""
    place = ground.spare / "crashes"
    kept = Checkpoints(place / "checkpoints", keep=1)  # the older one goes with this very save
    kept.save(2, _tensors(2), {"step": 2})
    moments = Moments(place, ground.spare / "moments")
    with moments:
        kept.save(3, _tensors(3), {"step": 3})
    faults = [fault for left in moments.left() for fault in _after_crash(left)]
    flips, accepted = _flipped(kept.path(3))
    faults += [f"{accepted} damaged checkpoints were not refused"] if accepted else []
    figure = (
        f"a save ended at each of {moments.count} moments in {len(WAYS)} ways: the last good checkpoint "
        f"loaded and the next save went well; {flips:,} damaged checkpoints were refused"
    )
    return Verdict("", not faults, "; ".join(faults[:2]) or figure, "checkpoints are not safe here; please report it")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WAYS: dict[str, Callable[[Path], None]] = {"killed": lambda _: None, "emptied": _empty, "halved": _halve}
"""What becomes of files that were not synced when the end came."""


class Moments:
    """Copies ``folder`` to ``copies/<n>`` before the n-th call within the block that changes or syncs a file."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self._synced: set[tuple[int, int]] = set()
        self._unsynced: list[list[Path]] = []
        self._copying = False
        self._patches = ExitStack()

    @property
    def count(self) -> int:
        return len(self._unsynced)

    def __enter__(self) -> Moments:
        self._synced = {_identity(f.stat()) for f in self._files()}  # what stood before is long on the disk
        for name in CHANGES:
            self._patches.enter_context(patch.object(os, name, self._watched(name, getattr(os, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        self._keep()

    def left(self) -> Iterator[tuple[str, Path]]:
        """Every moment in every way: what it was, and the folder as the end left it."""
        for moment, unsynced in enumerate(self._unsynced):
            for way, spoil in WAYS.items():
                folder = self.copies / f"{moment}-{way}"
                shutil.copytree(self.copies / str(moment), folder)
                for file in unsynced:
                    spoil(folder / file)
                yield f"moment {moment}, {way}", folder

    def _files(self) -> list[Path]:
        return [f for f in self.folder.rglob("*") if f.is_file()]

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._copying:
                return real(*arguments, **options)
            self._keep()
            result = real(*arguments, **options)
            if name == "fsync":
                self._synced.add(_identity(os.fstat(arguments[0])))
            return result

        return call

    def _keep(self) -> None:
        self._copying = True
        shutil.copytree(self.folder, self.copies / str(self.count))
        self._copying = False
        unsynced = [f for f in self._files() if _identity(f.stat()) not in self._synced]
        self._unsynced.append([f.relative_to(self.folder) for f in unsynced])


def _identity(stat: os.stat_result) -> tuple[int, int]:
    """Of a file with what was written to it: a later write is another."""
    return stat.st_ino, stat.st_mtime_ns


def _tensors(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {name: {"a": torch.randn(3, 5, generator=generator)} for name in ("weights", "optimizer")}


def _after_crash(left: tuple[str, Path]) -> Iterator[str]:
    """Faults of what can be loaded, and of the save that follows."""
    moment, folder = left
    kept = Checkpoints(folder / "checkpoints", keep=1)
    try:
        newest, _ = kept.newest()
        if newest not in (2, 3) or not _holds(kept, newest):
            yield f"{moment}: step {newest} is loaded, and is not what was saved"
        kept.save(4, _tensors(4), {"step": 4})
        if kept.newest()[0] != 4 or not _holds(kept, 4) or list(kept.folder.glob(".*")):
            yield f"{moment}: the next save does not go well"
    except (UserError, *STUMBLES) as error:
        yield f"{moment}: {type(error).__name__}: {error}"


def _holds(kept: Checkpoints, step: int) -> bool:
    tensors, state = kept.load(step)
    wanted = _tensors(step)
    same = all(torch.equal(tensors[name]["a"], wanted[name]["a"]) for name in wanted)
    return same and tensors.keys() == wanted.keys() and state == {"step": step}


def _refused(kept: Checkpoints, step: int) -> bool:
    """In a sentence: a parser that stumbles over what is damaged is no refusal."""
    try:
        kept.load(step)
    except UserError:
        return True
    except STUMBLES:
        return False
    return False


def _flipped(folder: Path) -> tuple[int, int]:
    """Change every byte of the manifest and of the files, one at a time: (changes, how many were not refused)."""
    kept = Checkpoints(folder.parent)
    step = int(folder.name.removeprefix("step-"))
    changes = accepted = 0
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for position in range(len(whole)):
            for flip in FLIPS if file.name == MANIFEST else FLIPS[:1]:
                damaged = bytearray(whole)
                damaged[position] ^= flip
                file.write_bytes(damaged)
                changes += 1
                accepted += not _refused(kept, step)
        file.write_bytes(whole)
    return changes, accepted
