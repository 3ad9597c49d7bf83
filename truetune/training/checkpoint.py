"""Checkpoints that are complete or do not exist.

A folder is written under a temporary name, every file is fsynced, a manifest with sizes and sha256 of all
files is added, and the folder is renamed into place. A folder without a manifest that its files match is
not a checkpoint. Only safetensors and JSON are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from truetune.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target``, with a manifest, if the block ends well, and else vanishes.

    An older ``target`` is replaced. Raises UserError when the disk refuses.
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
            shutil.rmtree(retired, ignore_errors=True)
            target.rename(retired)
        scratch.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise UserError(
            f"can't write {target} ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)
        elif retired.exists():  # the new folder could not take its place
            retired.rename(target)


def verify(folder: Path) -> None:
    """Raise UserError unless ``folder`` is complete and every file is what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable manifest, so it is no checkpoint; use another") from error
    if version != FORMAT:
        raise UserError(f"{folder} has format {version}, this version reads {FORMAT}; use the version that wrote it")
    present = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    for name in sorted(present.symmetric_difference(files)):
        raise UserError(f"{folder} is damaged ({name} is missing or was added); use another")
    for name, digest in files.items():
        if _digest(folder / name) != digest:
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
        spare: int | None = None,
    ) -> Path:
        """Write one safetensors file per entry of ``tensors`` and ``state`` as JSON, then drop old ones.

        spare: a step whose checkpoint stays whatever its age. An intact checkpoint of the same step is kept.
        """
        target = self.path(step)
        if not (target.exists() and self._intact(target)):
            with atomic_folder(target) as scratch:
                for name, group in tensors.items():
                    save_file(
                        {k: t.detach().contiguous() for k, t in group.items()},
                        scratch / f"{name}.safetensors",
                    )
                (scratch / STATE).write_text(json.dumps(state, indent=1))
        for old in self.steps()[: -self.keep]:
            if old not in (spare, step):
                shutil.rmtree(self.path(old))
        return target

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by file and the state of ``step``. Raises UserError when the checkpoint is damaged."""
        folder = self.path(step)
        verify(folder)
        tensors = {f.stem: load_file(f) for f in sorted(folder.glob("*.safetensors"))}
        return tensors, json.loads((folder / STATE).read_bytes())

    def steps(self) -> list[int]:
        """Steps that have a folder, damaged ones included, in order."""
        return sorted(int(f.name.removeprefix("step-")) for f in self.folder.glob("step-*[0-9]"))

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

    @staticmethod
    def _intact(folder: Path) -> bool:
        try:
            verify(folder)
        except UserError:
            return False
        return True


def _seal(folder: Path) -> None:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    manifest = {"format": FORMAT, "files": {str(f.relative_to(folder)): _digest(f) for f in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*files, folder / MANIFEST, *(d for d in folder.rglob("*") if d.is_dir()), folder):
        _sync(path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
