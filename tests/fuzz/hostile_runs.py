"""Run folders that were damaged, or made up: manifests, states, tensors, facts and records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from folders import invoke
from fuzzing import JUNK, SENTENCE, Target, damaged, json_files, mutants, spelled
from hypothesis import strategies as st

from truetune import report
from truetune.errors import UserError
from truetune.training import checkpoint
from truetune.training.checkpoint import Checkpoints

Damage = tuple[str, bytes, bool]
"""A file, what it holds now, and whether a manifest is made anew, as one who forges a checkpoint would."""
STRAYS = [
    "step-x1",
    "step-",
    "step-1",
    "step-00000002-1",
    "step-\u0663",
    "step-1_0",
    "step-99999999999999999999",
    "step--1",
]


def checkpoints(folder: Path, share: float) -> Target:
    run = folder / "checked"
    kept = Checkpoints(run / "checkpoints", keep=5)
    state = {"step": 2, "order": [1, 2, 3], "best": None, "random": {"torch": "abc", "list": [0.5]}}
    tensors = {"model": {"a": torch.ones(3, 4), "b": torch.zeros(2)}, "optimizer": {"a": torch.ones(5)}}
    kept.save(1, tensors, state)
    place = kept.save(2, tensors, state)
    whole = {file.name: file.read_bytes() for file in place.iterdir()}
    manifest = json.loads(whole["manifest.json"])
    dates = st.sampled_from(STRAYS).map(lambda name: (f"../{name}", b"", False))
    inputs = st.one_of(
        st.tuples(st.just("manifest.json"), json_files(manifest), st.just(False)),
        st.tuples(
            st.just("manifest.json"), mutants(manifest["files"]).map(lambda f: forged(manifest, f)), st.just(False)
        ),
        st.tuples(st.just("state.json"), json_files(state), st.booleans()),
        st.tuples(st.just("model.safetensors"), damaged(whole["model.safetensors"]), st.booleans()),
        st.tuples(st.sampled_from(["more.safetensors", "x", "\udcff", "a\nb"]), JUNK.map(spelled), st.booleans()),
        dates,
    )

    def act(damage: Damage) -> None:
        name, data, sealed = damage
        shutil.rmtree(place, ignore_errors=True)
        for stray in STRAYS:
            shutil.rmtree(run / "checkpoints" / stray, ignore_errors=True)
        place.mkdir()
        for file, content in whole.items():
            (place / file).write_bytes(content)
        if name.startswith("../"):
            (place / name).mkdir()
        else:
            (place / name).write_bytes(data)
        if sealed:
            (place / "manifest.json").unlink()
            checkpoint._seal(place)
        shown = invoke("show", "checkpoints", str(run))
        assert shown.exit_code == 0 and "Traceback" not in shown.output
        assert kept.newest()[0] in (1, 2) and all(map(SENTENCE.fullmatch, kept.newest()[1]))
        assert isinstance(kept.load(2)[1], dict)

    return Target("checkpoints", inputs, act, share)


def forged(manifest: dict[str, Any], files: Any) -> bytes:
    try:
        return checkpoint._manifest(manifest["truetune"], files).encode()
    except (TypeError, ValueError):
        return spelled(manifest | {"files": files})


def reports(straight: Path, folder: Path, share: float) -> Target:
    run = folder / "reported"
    run.mkdir()
    names = ("run.json", "metrics.jsonl", "recipe.yaml")
    whole = {name: (straight / name).read_bytes() for name in names}
    lines = whole["metrics.jsonl"].splitlines()

    @st.composite
    def metrics(draw: Any) -> bytes:
        number = draw(st.integers(0, len(lines) - 1))
        line = draw(json_files(json.loads(lines[number])))
        return b"\n".join([*lines[:number], line, *lines[number + 1 :], b""])

    inputs = st.one_of(
        st.tuples(st.just("run.json"), json_files(json.loads(whole["run.json"]))),
        st.tuples(st.just("metrics.jsonl"), metrics()),
        st.tuples(st.just("metrics.jsonl"), damaged(whole["metrics.jsonl"])),
        st.tuples(st.just("recipe.yaml"), damaged(whole["recipe.yaml"])),
    )

    def act(damage: tuple[str, bytes]) -> None:
        for name, data in (whole | {damage[0]: damage[1]}).items():
            (run / name).write_bytes(data)
        try:
            report.card(run, run)
        except UserError as error:
            assert SENTENCE.fullmatch(str(error))
        assert report.write(run).stat().st_size

    return Target("reports", inputs, act, share)
