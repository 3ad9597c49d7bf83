"""Model and rows from a hub: the real clients ask a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import chats, write_model, write_rows
from hub import serving

Ask = Callable[..., subprocess.CompletedProcess[str]]
ENTRY = "from truetune.cli import main; main()"


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def ask(tmp_path: Path, asked: list[str]) -> Iterator[Ask]:
    """A command in a process of its own, since the clients read the hub's address when they are imported."""
    write_model(tmp_path / "model", "llama")
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", chats())
    write_rows(tmp_path / "rows" / "test.jsonl", chats()[:4])
    with serving({"models/us/tiny": tmp_path / "model", "datasets/us/rows": tmp_path / "rows"}, asked) as address:
        places = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "TRUETUNE_CACHE": str(tmp_path / "cache")}
        places["TRUETUNE_OFF"] = "native_attention"  # which a cache of its own would have compiled anew
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | places

        def command(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", ENTRY, *arguments],
                cwd=tmp_path,
                env=environment | more,
                capture_output=True,
                text=True,
                check=False,
            )

        yield command


def test_a_run_on_what_the_hub_has_goes_on_without_it(ask: Ask, asked: list[str], tmp_path: Path) -> None:
    keys = ["model.path=us/tiny", "data.source=us/rows", "train.steps=2", "output.folder=out", "output.merged=false"]
    done = ask("train", *keys)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["model"]["source"] == "us/tiny" and facts["status"] == "finished"
    assert facts["data"]["train"]["source"] == "us/rows (train) less 4 that are held out"
    assert facts["data"]["evaluation"]["source"] == "us/rows (test)"
    assert any("model.safetensors" in request for request in asked)
    asked.clear()
    offline = ask("generate", "out", "--prompt", "What is 2 and 2?", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and not asked, offline.stderr


def test_inspect_fetches_no_weights(ask: Ask, asked: list[str]) -> None:
    done = ask("inspect", "model.path=us/tiny", "data.source=us/rows", "--json")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]), done.stderr
    assert any("tokenizer.json" in request for request in asked)
    assert not any("safetensors" in request for request in asked if request.startswith("GET /us"))


def test_what_the_hub_has_not_is_one_sentence(ask: Ask) -> None:
    for key, says in [("model.path=us/none", "no folder us/none here"), ("data.source=us/none", "could not be had")]:
        done = ask("train", "model.path=us/tiny", "data.source=us/rows", key)
        assert done.returncode == 2 and says in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
