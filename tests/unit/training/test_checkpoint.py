"""Checkpoints exist whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from truetune.errors import UserError
from truetune.training import checkpoint
from truetune.training.checkpoint import MANIFEST, Checkpoints, atomic_folder, verify


def save(checkpoints, step, **options):
    return checkpoints.save(step, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step}, **options)


def test_round_trip_and_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        save(checkpoints, step, spare=(1,))
    assert checkpoints.steps() == [1, 4, 5]
    tensors, state = checkpoints.load(4)
    assert torch.equal(tensors["weights"]["w"], torch.full((3,), 4.0))
    assert state == {"step": 4}


def test_every_flipped_byte_of_every_file_is_refused(tmp_path):
    folder = save(Checkpoints(tmp_path), 1)
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for i in range(len(good)):
            file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            try:
                verify(folder)
            except UserError:
                continue
            # Only a manifest that still says the same (whitespace became other whitespace) may pass.
            assert file.name == MANIFEST
            assert json.loads(file.read_bytes()) == json.loads(good)
        file.write_bytes(good)
    verify(folder)


@pytest.mark.parametrize("harm", ["remove", "add", "no manifest", "version"])
def test_a_damaged_folder_is_refused_and_the_older_one_taken(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    if harm == "remove":
        (folder / "state.json").unlink()
    elif harm == "add":
        (folder / "extra").write_text("")
    elif harm == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    step, refused = checkpoints.newest()
    assert step == 1
    assert len(refused) == 1
    with pytest.raises(UserError):
        checkpoints.load(2)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "target") as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_error_that_safetensors_tells_of_in_its_own_way_is_one_of_the_disk(tmp_path, monkeypatch):
    def fails(*_):
        raise SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)")

    monkeypatch.setattr("truetune.training.checkpoint.save_file", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        save(Checkpoints(tmp_path), 1)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(tmp_path / "step-00000001")
    assert not list(tmp_path.iterdir())


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(UserError, match="no intact checkpoint"):
        Checkpoints(tmp_path).newest()


def test_windows_syncs_files_that_are_open_to_write_and_no_folders(tmp_path, monkeypatch):
    opened, real, synced = {}, os.open, os.fsync

    def opening(path, flags, *rest, **named):
        descriptor = real(path, flags, *rest, **named)
        if Path(path).is_dir() and not flags & getattr(os, "O_DIRECTORY", 0):
            raise PermissionError(path)
        opened[descriptor] = flags
        return descriptor

    def syncing(descriptor):
        if not opened.get(descriptor, os.O_RDWR) & os.O_RDWR:
            raise OSError("read only")
        synced(descriptor)

    monkeypatch.setattr(checkpoint.sys, "platform", "win32")
    monkeypatch.setattr(checkpoint.os, "open", opening)
    monkeypatch.setattr(checkpoint.os, "fsync", syncing)
    kept = Checkpoints(tmp_path)
    kept.save(1, {"weights": {"a": torch.ones(2)}}, {"step": 1})
    monkeypatch.undo()
    assert kept.newest() == (1, [])


def test_names_in_a_manifest_are_the_same_on_every_system(tmp_path):
    with atomic_folder(tmp_path / "out") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("x")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["files"]) == ["inner/file"]
