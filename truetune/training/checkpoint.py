"""Checkpoints that are complete or do not exist.

A folder is written under a temporary name, every file is fsynced, a manifest with the sha256 of all files and
of itself is added, and the folder is renamed into place. A folder without a manifest that its files match is
not a checkpoint. Only safetensors and JSON are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import truetune
from truetune import versions
from truetune.errors import UserError
from truetune.training.patience import as_os_error, patiently

MANIFEST = "manifest.json"
STATE = "state.json"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target``, with a manifest, if the block ends well, and else vanishes.

    An older ``target`` is replaced. Raises OSError, also where a library tells of one in its own way.
    """
    scratch = target.parent / f".{target.name}.tmp"
    retired = target.parent / f".{target.name}.old"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if retired.exists() and not target.exists():  # a process was killed between the two renames
            retired.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir()
        yield scratch
        _seal(scratch)
        if target.exists():
            _discard(retired, ignore_errors=True)
            target.rename(retired)
        scratch.rename(target)
        _sync(target.parent)
    except Exception as error:
        if refused := as_os_error(error, target):
            raise refused from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if target.exists():
            _discard(retired, ignore_errors=True)
        elif retired.exists():  # the new folder could not take its place
            retired.rename(target)


def verify(folder: Path) -> None:
    """Raise UserError unless ``folder`` is complete and every byte of it is as its manifest says."""
    if folder.is_symlink() or (folder / MANIFEST).is_symlink():
        raise UserError(f"{folder} is damaged (it is a link, which may change unseen); use another")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, writer = manifest["format"], manifest.get("truetune")
        versions.require(folder, version, versions.CHECKPOINT, writer)
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} has no readable manifest, so it is no checkpoint; use another") from error
    if text != _manifest(writer, files):
        raise UserError(f"{folder} is damaged ({MANIFEST} is not what was written); use another")
    found = [f for f in folder.rglob("*") if f.is_symlink() or not f.is_dir()]
    present = {f.relative_to(folder).as_posix() for f in found} - {MANIFEST}
    for name in sorted(present.symmetric_difference(files)):
        raise UserError(f"{folder} is damaged ({name} is missing or was added); use another")
    for name, digest in files.items():
        if (folder / name).is_symlink() or not (folder / name).is_file() or _digest(folder / name) != digest:
            raise UserError(f"{folder} is damaged ({name} is not what was written); use another")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run: ``folder/step-00000120`` and so on; the newest ``keep`` stay."""

    folder: Path
    keep: int = 2

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        spare: Collection[int] = (),
    ) -> Path:
        """Write one safetensors file per entry of ``tensors`` and ``state`` as JSON, then drop old ones.

        spare: steps whose checkpoints stay whatever their age. An intact checkpoint of the same step is kept.
        Waits while the disk is full.
        """
        target = self.path(step)
        self._tidy()
        if not (target.exists() and self._intact(target)):
            need = sum(t.nbytes for group in tensors.values() for t in group.values())
            patiently(lambda: _write(target, tensors, state), target, need)
        for old in self.steps()[: -self.keep]:
            if old not in (*spare, step):
                _discard(self.path(old))
        return target

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file and the state of ``step``. Raises UserError when the checkpoint is damaged."""
        folder = self.path(step)
        verify(folder)
        try:
            tensors = {f.stem: load_file(f) for f in sorted(folder.glob("*.safetensors"))}
            return tensors, dict(json.loads((folder / STATE).read_bytes()))
        except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{folder} has files that no run wrote ({error}); use another") from error

    def steps(self) -> list[int]:
        """Steps that have a folder, damaged ones included, in order."""
        found = (re.fullmatch(r"step-([0-9]{8,15})", f.name) for f in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in found if name)

    def newest(self) -> tuple[int, list[str]]:
        """The newest intact step, and why newer ones were refused. Raises UserError when there is none."""
        refused: list[str] = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
                return step, refused
            except UserError as error:
                refused.append(str(error))
        why = f" ({refused[0]})" if refused else ""
        raise UserError(f"{self.folder} holds no intact checkpoint{why}; start the run again")

    def _tidy(self) -> None:
        """Remove what a process that was killed while it saved has left."""
        for scratch in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(scratch)

    @staticmethod
    def _intact(folder: Path) -> bool:
        try:
            verify(folder)
        except UserError:
            return False
        return True


def _write(target: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    with atomic_folder(target) as scratch:
        for name, group in tensors.items():
            save_file({k: t.detach().contiguous() for k, t in group.items()}, scratch / f"{name}.safetensors")
        (scratch / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")


def _discard(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder, or a link to one and not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=ignore_errors)


def _seal(folder: Path) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    digests = {f.relative_to(folder).as_posix(): _digest(f) for f in files}
    (folder / MANIFEST).write_text(_manifest(truetune.__version__, digests), encoding="utf-8")
    for path in (*files, folder / MANIFEST, *(d for d in folder.rglob("*") if d.is_dir()), folder):
        _sync(path)


def _manifest(writer: str, files: Mapping[str, str]) -> str:
    """The one spelling of a manifest, with a digest of itself, so that no byte of it can change unseen."""
    manifest = {"format": versions.CHECKPOINT, "truetune": writer, "files": files}
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest}, indent=1)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bring a file to the disk, or the names in a folder; Windows syncs no folder, and only what is open to write."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
