"""A file of another format is refused by whoever reads it, in one sentence that names the truetune to use."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folders import facts, invoke

from truetune import versions
from truetune.errors import UserError
from truetune.training.checkpoint import MANIFEST

LATER = {"format": 99, "truetune": "7.1.0"}


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=1))


def run_json(folder: Path) -> None:
    change(folder / "run.json", **LATER)


def record(folder: Path) -> None:
    file = folder / "metrics.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(first) | {"format": 99}) + "\n" + rest)


def checkpoints(folder: Path) -> None:
    for step in (folder / "checkpoints").iterdir():
        (step / MANIFEST).write_text(json.dumps(LATER | {"layout": "of later days"}))


def adapter(folder: Path) -> None:
    shutil.rmtree(folder / "merged")
    change(folder / "adapter" / "truetune.json", **LATER)


def recipe(folder: Path) -> None:
    file = folder / "recipe.yaml"
    file.write_text(file.read_text().replace("version: 1", "version: 99"))


FORMAT = r"has format 99, but truetune \S+ reads 1; use (truetune 7\.1\.0, which|the truetune that) wrote it"
CASES = [
    (run_json, ["train", "--resume"], FORMAT),
    (run_json, ["report"], FORMAT),
    (run_json, ["export", "--to", "exported"], FORMAT),
    (run_json, ["generate", "--prompt", "x"], FORMAT),
    (record, ["report"], FORMAT),
    (record, ["train", "--resume"], FORMAT),
    (checkpoints, ["train", "--resume"], FORMAT),
    (checkpoints, ["export", "--to", "exported"], FORMAT),
    (checkpoints, ["show", "checkpoints"], FORMAT),
    (adapter, ["generate", "--prompt", "x"], FORMAT),
    (recipe, ["train", "--resume"], "the recipe has version 99, but this Truetune reads 1; upgrade Truetune"),
    (recipe, ["export", "--to", "exported"], "the recipe has version 99, but this Truetune reads 1; upgrade Truetune"),
]


def files(place: Path) -> dict[Path, int]:
    """All but run.json, in which a run that could not go on says so."""
    return {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file() and p.name != "run.json"}


def interrupt(folder: Path) -> None:
    """A finished run is not resumed, whatever its format."""
    told = facts(folder) | {"status": "interrupted"}
    (folder / "run.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.parametrize(("age", "command", "says"), CASES, ids=[f"{c[0].__name__}-{c[1][0]}" for c in CASES])
def test_another_format_is_refused_by_every_reader(
    age: Callable[[Path], None],
    command: list[str],
    says: str,
    straight: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    interrupt(folder)
    age(folder)
    there = files(tmp_path)
    words = 2 if command[0] == "show" or "--resume" in command else 1
    result = invoke(*command[:words], str(folder), *command[words:])
    if command[0] == "show":  # it lists the state of each
        assert result.exit_code == 0 and len(re.findall(says, result.stdout)) == 3
        return
    assert result.exit_code == 2 and re.fullmatch(rf"error: [^\n]*{says}[^\n]*\n", result.stderr), result.stderr
    assert files(tmp_path) == there


def test_what_is_written_now_is_read_now(straight: tuple[Path, str]) -> None:
    assert facts(straight[0])["format"] == versions.RUN
    lines = (straight[0] / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["format"] for line in lines} == {versions.RECORD}
    assert json.loads((straight[0] / "adapter" / "truetune.json").read_text())["format"] == versions.ADAPTER


@pytest.mark.parametrize("found", [None, "1", 1.0, True, 0, 2, [1], {"a": "b" * 999}])
def test_only_the_very_number_is_the_version(found: object) -> None:
    with pytest.raises(UserError, match=r"has format .* reads 1; use the truetune that wrote it"):
        versions.require("x", found, 1)
    versions.require("x", 1, 1)


@pytest.mark.parametrize("writer", ["0.9.1\nrm -rf /", "", None, 7, "1" * 99, "\x1b[31m"])
def test_a_writer_that_is_no_version_is_not_repeated(writer: object) -> None:
    with pytest.raises(UserError) as told:
        versions.require("x", 2, 1, writer)
    assert str(told.value).endswith("; use the truetune that wrote it")
