"""Code and pickles that come with a model or an adapter stay where they are, unless the user asks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import chats, keys, write_rows
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from truetune.cli import app

CODE = """
from pathlib import Path
Path({mark!r}).write_text("this code was run")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def unknown_type(folder: Path) -> None:
    change(folder / "config.json", auto_map=CLASSES, model_type="foreign", architectures=["Model"])


def known_type(folder: Path) -> None:
    change(folder / "config.json", auto_map=CLASSES)


def tokenizer(folder: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]})
    change(folder / "tokenizer_config.json", tokenizer_class="Tokenizer")


def elsewhere(folder: Path) -> None:
    """The code of another repository."""
    change(
        folder / "config.json", auto_map={k: f"nobody/nothing--{v}" for k, v in CLASSES.items()}, model_type="foreign"
    )


def plant(folder: Path, mark: Path) -> None:
    (folder / "foreign.py").write_text(CODE.format(mark=str(mark)))


def yes(*arguments: str) -> Result:
    """The command line, with a user who would say yes to any question."""
    result = CliRunner().invoke(app, arguments, input="y\n" * 9)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def assert_one_sentence(result: Result, says: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"error: \S[^\n]+; [^\n]+\n", result.stderr), result.stderr
    assert re.search(says, result.stderr), result.stderr


@pytest.mark.parametrize("spoil", [unknown_type, known_type, tokenizer, elsewhere])
def test_code_of_a_model_is_not_run(
    spoil: Callable[[Path], None], my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(my_model, model)
    plant(model, mark)
    spoil(model)
    data = write_rows(tmp_path / "data.jsonl", chats())
    arguments = ["train", *keys(model, data, tmp_path / "out", "train.steps=2"), "--dry-run"]
    result = yes(*arguments)
    assert not mark.exists() and not (tmp_path / "modules").exists()
    if result.exit_code:
        assert_one_sentence(result, "trust_remote_code")
    generated = yes("generate", str(model), "--prompt", "x", "--max-tokens", "2")
    assert not mark.exists() and generated.exit_code == result.exit_code
    if spoil is unknown_type:  # the trap works: asked for, the code is run
        yes(*arguments, "model.trust_remote_code=true")
        assert mark.exists()


def test_code_of_an_adapters_tokenizer_is_not_run(
    straight: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    adapter, mark = tmp_path / "adapter", tmp_path / "mark"
    shutil.copytree(straight[0] / "adapter", adapter)
    plant(adapter, mark)
    tokenizer(adapter)
    result = yes("generate", str(adapter), "--prompt", "x", "--max-tokens", "2")
    assert not mark.exists() and not (tmp_path / "modules").exists()
    assert result.exit_code == 0 or "trust_remote_code" in result.stderr


def test_a_pickled_model_is_refused(my_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(my_model, model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    data = write_rows(tmp_path / "data.jsonl", chats())
    assert_one_sentence(yes("train", *keys(model, data, tmp_path / "out")), "can't load .*safetensors")
    assert_one_sentence(yes("generate", str(model), "--prompt", "x"), "can't load .*safetensors")


def test_a_pickled_adapter_is_refused(straight: tuple[Path, str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(straight[0] / "adapter", adapter)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert_one_sentence(yes("generate", str(adapter), "--prompt", "x"), "no adapter_model.safetensors")
