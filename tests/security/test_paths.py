"""No name in a manifest, an archive, a model or a row leads out of the folder that it belongs to."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import chats, invoke, keys, write_rows
from safetensors.torch import load_file, save_file

from truetune import run
from truetune.errors import UserError
from truetune.models import load
from truetune.recipe import Recipe
from truetune.training.checkpoint import MANIFEST, Checkpoints, _manifest, verify

SECRET = "the text of a file elsewhere"


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Two checkpoints in run/checkpoints, and beside the run a file that is none of its business."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"weights": {"w": torch.full((3,), float(step))}}, {"step": step})
    (tmp_path / "secret").write_text(SECRET)
    return checkpoints


def assert_passed_over(kept: Checkpoints) -> None:
    with pytest.raises(UserError, match="is damaged"):
        verify(kept.path(2))
    assert kept.newest()[0] == 1


@pytest.mark.parametrize(
    "name", ["../../../secret", "{place}/secret", "a/../../../../secret", "./state.json", "..", ""]
)
def test_a_manifest_lists_only_what_is_in_its_folder(name: str, kept: Checkpoints, tmp_path: Path) -> None:
    """The digests are right, that of the manifest too: only the name is wrong."""
    folder, outside = kept.path(2), tmp_path / "secret"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    files[name.format(place=tmp_path)] = hashlib.sha256(outside.read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(_manifest("0.1.0", files))
    assert_passed_over(kept)


def to_file(folder: Path, outside: Path) -> None:
    shutil.move(folder / "state.json", outside / "state.json")
    (folder / "state.json").symlink_to(outside / "state.json")


def to_folder(folder: Path, outside: Path) -> None:
    (folder / "more").symlink_to(outside)


def to_nothing(folder: Path, outside: Path) -> None:
    (folder / "more").symlink_to(outside / "gone")


def of_manifest(folder: Path, outside: Path) -> None:
    shutil.move(folder / MANIFEST, outside / MANIFEST)
    (folder / MANIFEST).symlink_to(outside / MANIFEST)


def of_all(folder: Path, outside: Path) -> None:
    shutil.move(folder, outside / "step")
    folder.symlink_to(outside / "step")


@pytest.mark.parametrize("link", [to_file, to_folder, to_nothing, of_manifest, of_all])
def test_links_are_no_part_of_a_checkpoint(
    link: Callable[[Path, Path], None], kept: Checkpoints, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text(SECRET)
    link(kept.path(2), outside)
    assert_passed_over(kept)
    for step in (3, 4, 5):  # older ones are dropped, and nothing behind a link with them
        kept.save(step, {"weights": {"w": torch.zeros(3)}}, {"step": step})
    assert kept.newest()[0] == 5 and not kept.path(2).is_symlink()
    assert (outside / "precious.txt").read_text() == SECRET


@pytest.mark.parametrize("name", ["step-x1", "step-00000009 copy 2", "step-9", "step-..-1", "step-00000009.old"])
def test_other_folders_among_checkpoints_are_left_alone(name: str, kept: Checkpoints) -> None:
    (kept.folder / name).mkdir()
    assert kept.steps() == [1, 2] and kept.newest() == (2, [])
    kept.save(3, {"weights": {"w": torch.zeros(3)}}, {"step": 3})
    assert (kept.folder / name).is_dir()


def test_names_of_tensors_are_no_paths(kept: Checkpoints, tmp_path: Path) -> None:
    names = ["../../escaped", "/escaped", "a/b/c", "..", "x\ny"]
    there = {p.name for p in tmp_path.rglob("*")}
    kept.save(3, {"weights": {n: torch.ones(2) for n in names}}, {"step": 3})
    assert sorted(kept.load(3)[0]["weights"]) == sorted(names)
    assert {p.name for p in tmp_path.rglob("*")} - there == {"step-00000003"}


def test_names_of_tensors_in_an_adapter_are_no_paths(straight: tuple[Path, str], tmp_path: Path) -> None:
    adapter = tmp_path / "deep" / "adapter"
    shutil.copytree(straight[0] / "adapter", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {
        name: torch.ones(2) for name in ("../../escaped", f"{tmp_path}/escaped", "base_model.model.../x.lora_A.weight")
    }
    save_file(tensors | more, adapter / "adapter_model.safetensors", {"format": "pt"})
    there = set(tmp_path.rglob("*"))
    result = invoke("generate", str(adapter), "--prompt", "x", "--max-tokens", "2")
    assert result.exit_code in (0, 2) and set(tmp_path.rglob("*")) == there


@pytest.mark.parametrize(
    "name", ["../../up", "/srv/model", "..", ".", "a/b/../../..", "~", "owner/..", "x\n/y", "é 漢"]
)
def test_the_name_of_a_model_makes_a_folder_below_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run.new_folder(Recipe.model_validate({"model": {"path": name}, "data": {"source": "x"}}))
    assert folder.parent == Path("runs") and folder.name not in ("", ".", "..")
    assert re.search(r"-\d{8}-\d{6}$", folder.name)


@pytest.mark.parametrize("name", ["../up.gguf", "...gguf", "a/../../up.gguf", "-.gguf", ". .gguf"])
def test_the_name_of_a_gguf_file_makes_a_folder_in_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cache = tmp_path / "x" / "y", tmp_path / "cache"
    (place / "a").mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRUETUNE_CACHE", str(cache))
    Path(name).write_bytes(b"GGUF")
    renamed: list[Path] = []

    class Saves:
        def save_pretrained(self, folder: Path) -> None:
            renamed.append(folder)

    for reader in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"{load.__name__}.{reader}.from_pretrained", lambda *_, **__: Saves())
    target = load.resolve(name)
    assert target.parent == cache and target.is_dir() and len(renamed) == 2
    assert {p.parent for p in renamed} == {cache} and sorted(cache.iterdir()) == [target]


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "..", "recipes/quickstart", "quickstart/../../up", ""])
def test_the_name_of_a_recipe_is_no_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "x"
    place.mkdir()
    monkeypatch.chdir(place)
    (tmp_path / "up").write_text("model:\n  path: m\n")
    result = invoke("train", name)
    assert result.exit_code == 2 and re.search(r"there is no ready recipe|is a folder", result.stderr), result.stderr


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped", "a/b", "..", ""])
def test_the_name_of_a_chat_template_is_no_path(name: str, my_model: Path, my_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(my_model, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    file = model / "tokenizer_config.json"
    named = [{"name": "default", "template": template}, {"name": name, "template": template}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    result = invoke("train", *keys(model, my_data, tmp_path / "out"))
    assert result.exit_code == 2 and re.search("chat template of the name .*; rename it", result.stderr), result.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("escaped*"))


def test_paths_in_rows_are_text(my_model: Path, tmp_path: Path) -> None:
    """Columns that some loaders open (images, audio, files) are not opened, and nothing is written where they point."""
    (tmp_path / "secret").write_text(SECRET)
    rows = [
        row | {"image": f"{tmp_path}/secret", "file": "../../secret", "path": {"bytes": None, "path": "/etc/hostname"}}
        for row in chats(20)
    ]
    folder = tmp_path / "out"
    data = write_rows(tmp_path / "data.jsonl", rows)
    assert invoke("train", *keys(my_model, data, folder, "train.steps=2")).exit_code == 0
    kept = [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not kept and {p.name for p in tmp_path.iterdir()} == {"secret", "data.jsonl", "out"}
