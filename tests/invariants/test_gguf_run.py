"""A GGUF file by the command line: at the end of a run, from one that is over, and refused in time."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import gguf
import pytest
from folders import facts, invoke, keys, write_model

SHORT = ("train.steps=2", "evaluation.samples=0", "checkpoint.keep=1")


@pytest.fixture(scope="module")
def run(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("gguf") / "My run"
    result = invoke("train", *keys(my_model, my_data, folder, *SHORT, "output.gguf=q8_0"))
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_a_run_ends_with_the_file_and_with_what_to_do(run: tuple[Path, str]) -> None:
    folder, printed = run
    file, modelfile = folder / "gguf-q8_0" / "model-q8_0.gguf", folder / "gguf-q8_0" / "Modelfile"
    assert file.is_file() and "gguf-q8_0" in printed
    export = {e["kind"]: e for e in facts(folder)["exports"]}["gguf-q8_0"]
    assert export["passed"] and 0 < export["difference"] <= export["bound"]
    commands = facts(folder)["next"]
    assert f"llama-server -m {shlex.quote(str(file))} --jinja" in commands and f"  {commands[-1]}\n" in printed
    assert f"ollama create my-run -f {shlex.quote(str(modelfile))}" in commands and modelfile.is_file()
    assert not any("--merged" in command for command in commands)  # it is there already


def test_the_command_that_loads_the_merged_model_is_true(
    run: tuple[Path, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (command,) = (c for c in facts(run[0])["next"] if c.startswith("python -c"))
    _, option, program = shlex.split(command)
    assert option == "-c" and str(run[0] / "merged") in program
    exec(program)
    assert "generated_text" in capsys.readouterr().out


def test_a_run_that_is_over_is_exported(run: tuple[Path, str], tmp_path: Path) -> None:
    result = invoke("export", str(run[0]), "--gguf", "f16", "--to", str(tmp_path / "to"))
    assert result.exit_code == 0, result.output
    assert re.match(rf"{tmp_path}/to  \(logits read back within \S+, bound \S+\)\nnext:\n", result.stdout)
    held = gguf.GGUFReader(tmp_path / "to" / "model-f16.gguf")
    assert held.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_F16  # type: ignore[union-attr]
    assert f"llama-server -m {tmp_path}/to/model-f16.gguf --jinja" in result.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gguf", "q4_k"], "--gguf is one of f32, f16, bf16, q8_0, not q4_k; choose one"),
        (["--gguf", "f16", "--adapter"], "--gguf writes the whole model in one file; leave out --merged and --adapter"),
    ],
)
def test_wrong_options_are_refused(straight: tuple[Path, str], options: list[str], says: str) -> None:
    result = invoke("export", str(straight[0]), *options)
    assert result.exit_code == 2 and result.stderr == f"error: {says}\n"


def test_a_model_that_no_gguf_file_holds_is_refused_before_the_run(my_data: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gpt2")
    result = invoke("train", *keys(base, my_data, tmp_path / "run", *SHORT, "output.gguf=f32"))
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert re.fullmatch(
        r"error: a GGUF file is written for models of type llama, [^\n]*is gpt2; leave[^\n]*\n", result.stderr
    )


def test_without_the_extra_it_is_said_before_the_run(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("truetune.models.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = invoke("train", *keys(my_model, my_data, tmp_path / "run", *SHORT, "output.gguf=f32"))
    assert result.exit_code == 2 and result.stderr.endswith("needs the extra: pip install 'truetune[gguf]'\n")
