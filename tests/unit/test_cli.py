"""The command line in process: what reaches the run, what is printed, and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from truetune import doctor, spelling
from truetune.cli import app, main, show
from truetune.errors import UserError
from truetune.models.export import Export
from truetune.training.record import Verdict

ROOT = Path(__file__).parents[2]
ENTRY = "from truetune.cli import main; main()"


def invoke(*arguments: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, arguments, **kwargs)


class Interrupted(UserError):
    pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the commands asked of truetune.run, which is replaced."""
    asked: list[tuple[Any, ...]] = []
    run = ModuleType("truetune.run")

    def train(recipe, *, resume=None, dry_run=False, quiet=False, records=None, command=None):
        assert command.startswith("truetune train")
        print("words for people")
        if records:
            records.write('{"kind": "step"}\n')
        asked.append(("train", recipe, resume, dry_run))
        return Path("runs/a")

    def generate(path, prompts, max_tokens):
        asked.append(("generate", path, list(prompts), max_tokens))
        yield from (f"answer to {prompt}" for prompt in prompts)

    def export(folder, kind, to=None, step=None):
        asked.append(("export", folder, kind, to, step))
        return Export(kind, "out", 1e-3, 2e-3)

    def report(folder):
        return folder / "report.html"

    run.__dict__.update(Interrupted=Interrupted, train=train, generate=generate, export=export, report=report)
    monkeypatch.setitem(sys.modules, "truetune.run", run)
    return asked


def raising(error: BaseException):
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


# What the commands pass on.


def test_train_passes_the_recipe_on(calls: list[tuple[Any, ...]]) -> None:
    assert invoke("train", "quickstart", "model.path=m", "--dry-run", "train.tokens=7").exit_code == 0
    assert calls == [("train", spelling.read("quickstart", ["model.path=m", "train.tokens=7"]), None, True)]


def test_train_needs_no_recipe_if_keys_suffice(calls: list[tuple[Any, ...]]) -> None:
    keys = ["model.path=m", "data.source=s"]
    assert invoke("train", *keys).exit_code == 0
    assert calls == [("train", spelling.read(None, keys), None, False)]


@pytest.mark.parametrize(("typed", "one"), [(("trian",), "train"), (("show", "recepies"), "recipes")], ids=str)
def test_what_is_no_command_is_one_sentence(typed: tuple[str, ...], one: str) -> None:
    result = invoke(*typed)
    assert result.exit_code == 2 and re.fullmatch(
        rf"error: there is nothing called {typed[-1]}; .*\b{one}\b.*\n", result.stderr
    )


def test_resume_takes_the_recipe_of_the_run(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    recipe = spelling.read(None, ["model.path=m", "data.source=s", "train.steps=9"])
    spelling.write(recipe, tmp_path / "recipe.yaml")
    assert invoke("train", "--resume", str(tmp_path)).exit_code == 0
    assert calls == [("train", recipe, tmp_path, False)]


def test_prompts_come_from_options_or_lines(calls: list[tuple[Any, ...]]) -> None:
    result = invoke("generate", "runs/a", "--prompt", "x", "--prompt", "y", "--max-tokens", "5")
    assert result.stdout == "answer to x\nanswer to y\n"
    assert invoke("generate", "runs/a", input="one\n\ntwo\n").stdout == "answer to one\nanswer to two\n"
    assert calls[0] == ("generate", Path("runs/a"), ["x", "y"], 5)
    assert calls[1][2] == ["one", "two"]


def test_export_and_report(calls: list[tuple[Any, ...]]) -> None:
    assert invoke("export", "runs/a").exit_code == 0
    assert invoke("export", "runs/a", "--adapter", "--to", "out").exit_code == 0
    assert invoke("export", "runs/a", "--step", "3").exit_code == 0
    assert calls == [
        ("export", Path("runs/a"), "merged", None, None),
        ("export", Path("runs/a"), "adapter", Path("out"), None),
        ("export", Path("runs/a"), "merged", None, 3),
    ]
    assert invoke("report", "runs/a").stdout == "runs/a/report.html\n"


def test_json_alone_is_on_stdout_and_quiet_prints_where_the_result_is(calls: list[tuple[Any, ...]]) -> None:
    keys = ["model.path=m", "data.source=s"]
    assert "words for people" in invoke("train", *keys).stdout
    told = invoke("train", *keys, "--json")
    assert told.stdout == '{"kind": "step"}\n' and "words for people" in told.stderr
    assert invoke("train", *keys, "-q").stdout.splitlines()[-1] == "runs/a"
    figures = {"kind": "merged", "path": "out", "difference": 1e-3, "bound": 2e-3, "note": None, "passed": True}
    assert json.loads(invoke("export", "runs/a", "--json").stdout) == figures
    assert invoke("export", "runs/a", "--quiet").stdout == "out\n"
    told = invoke("export", "runs/a").stdout.splitlines()
    assert told[:2] == ["out  (logits read back within 1.0e-03, bound 2.0e-03)", "next:"] and len(told) == 3


def test_verdicts_are_lines_of_json_or_only_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Verdict("a", True, "1"), Verdict("b", False, "2, bound 1", "mend it")]
    promises = ModuleType("truetune.promises")
    promises.__dict__.update(
        PROMISES={"a": None, "b": None}, proof_folder=lambda _: Path("runs/p"), prove=lambda *_: iter(found)
    )
    monkeypatch.setitem(sys.modules, "truetune.promises", promises)
    keys = ["prove", "model.path=m", "data.source=s"]
    result = invoke(*keys)
    assert result.exit_code == 1 and result.stdout.startswith("holds  a  1\nFAILS  b  2, bound 1; mend it\n1 of 2")
    result = invoke(*keys, "--json")
    assert [json.loads(line)["passed"] for line in result.stdout.splitlines()] == [True, False]
    assert "1 of 2 promises hold" in result.stderr
    assert invoke(*keys, "--quiet").stdout == "FAILS  b  2, bound 1; mend it\nruns/p\n"


def test_the_version_is_told() -> None:
    result = invoke("--version")
    assert result.exit_code == 0 and re.fullmatch(r"truetune \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.parametrize("group", [(), ("show",)])
def test_no_line_of_a_list_of_commands_is_cut(group: tuple[str, ...]) -> None:
    text = " ".join(invoke(*group, "--help").stdout.split())
    commands = app.registered_commands if not group else show.registered_commands
    for command in commands:
        purpose = command.help or (command.callback.__doc__ if command.callback else "")
        assert purpose and purpose.partition("\n")[0] in text
    assert "..." not in text.replace("ARGS]...", "").replace("[OPTIONS]...", "")


def test_a_terminal_that_cannot_spell_a_name_gets_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(sys, "argv", ["truetune", "train", "漢字"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        main()
    said.flush()
    assert said.buffer.getvalue().startswith(b'error: there is no ready recipe "??"')  # type: ignore[attr-defined]


# How it ends.

BAD = [
    ([], "Usage"),
    (["trian"], "did you mean 'train'?"),
    (["train", "--dryrun"], "--dry-run"),
    (["train"], "command line: model.path is missing"),
    (["train", "quikstart"], '(did you mean "quickstart"?)'),
    (["train", "quickstart"], "model.path is missing"),
    (["train", "quickstart", "lora"], '"lora" is not key=value'),
    (["train", "quickstart", "model.path=m", "train.stepps=5"], '(did you mean "steps"?)'),
    (["train", "quickstart", "model.path=m", "train.steps=5"], "both set the length of the run"),
    (["train", "quickstart", "model.path=m", "train.tokens=0"], "must be greater than 0"),
    (["train", "quickstart", "model.path=m", "optimizer.name=adamv"], '(did you mean "adamw"?)'),
    (["train", "quickstart", "model.path=m", "optimizer.bettas=[1, 2]"], '(did you mean "betas"?)'),
    (["train", "quickstart", "model.path=m", "schedule.minimum=low"], "must be a number"),
    (["train", "quickstart", "model.path="], "has no value"),
    (["train", "missing.yaml"], "there is no file missing.yaml"),
    (["train", "--resume", "missing"], "missing is not the folder of a run"),
    (["train", "--resume", "missing", "train.steps=5"], "leave out train.steps=5"),
    (["generate"], "Missing argument"),
    (["generate", "runs/a"], "there is no prompt"),
    (["generate", "runs/a", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
    (["export", "runs/a", "--megred"], "--merged"),
    (["report"], "Missing argument"),
    (["show", "optimisers"], "did you mean 'optimizers'?"),
    (["show", "recipe", "quikstart"], '(did you mean "quickstart"?)'),
    (["show", "recipe", "quickstart", "train.steps=x"], "must be an integer"),
    (["show", "checkpoints", "missing"], "missing has no folder of checkpoints"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_is_one_sentence_and_status_2(calls: list[tuple[Any, ...]], arguments: list[str], says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2 and not calls
    assert says in result.stderr
    assert "Traceback" not in result.stderr and "│" not in result.stderr
    last = result.stderr.rstrip().splitlines()[-1]
    assert says in last or not arguments
    if last.startswith("error: "):
        assert result.stderr == f"{last}\n"


def test_a_run_that_was_interrupted_ends_with_130(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, says in [(KeyboardInterrupt(), ""), (Interrupted("stopped; go on with: x"), "stopped; go on")]:
        monkeypatch.setattr(sys.modules["truetune.run"], "train", raising(error))
        result = invoke("train", "model.path=m", "data.source=s")
        assert result.exit_code == 130 and says in result.stderr and "error" not in result.stderr


def test_a_fault_of_the_user_in_a_run_ends_with_2(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["truetune.run"], "report", raising(UserError("no run; name one")))
    result = invoke("report", "x")
    assert (result.exit_code, result.stderr) == (2, "error: no run; name one\n")


def test_a_bug_is_never_hidden(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["truetune.run"], "report", raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError, match="bug"):
        invoke("report", "x", catch_exceptions=False)


# What show prints.


def test_show_lists_names_options_and_defaults() -> None:
    for what, expected in [("optimizers", r"adamw .*weight_decay=0\.0"), ("schedules", r"wsd .*decay=0\.1")]:
        result = invoke("show", what)
        assert result.exit_code == 0 and re.search(expected, result.stdout)


def test_show_recipes_and_one_of_them() -> None:
    assert re.search(r"^quickstart +\w", invoke("show", "recipes").stdout, re.MULTILINE)
    shown = invoke("show", "recipe", "quickstart", "train.clip=2").stdout
    assert re.search(r"^model\.path +required +a Hugging Face folder", shown, re.MULTILINE)
    assert re.search(r"^train\.clip +\* +2\.0 +largest", shown, re.MULTILINE)
    assert re.search(r"^train\.seed +0 +orders", shown, re.MULTILINE)


def test_show_schema_is_json_that_knows_the_keys() -> None:
    schema = json.loads(invoke("show", "schema").stdout)
    assert set(schema["properties"]) >= {"model", "data", "train"}
    assert schema["$defs"]["Train"]["additionalProperties"] is False


def test_show_checkpoints_tells_intact_from_damaged(tmp_path: Path) -> None:
    from truetune.training.checkpoint import Checkpoints

    kept = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 6):
        kept.save(step, {}, {"step": step})
    (kept.path(6) / "state.json").write_text("{}")
    first, second = invoke("show", "checkpoints", str(tmp_path)).stdout.splitlines()
    assert "step-00000003" in first and first.endswith("intact")
    assert "step-00000006" in second and "is damaged" in second


# doctor


def test_doctor_is_content_here() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0 and re.search(r"^ok +torch +2\.", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("package", "version", "state", "says", "status"),
    [
        ("torch", None, "missing", 'not installed; run pip install "torch>=2.13"', 1),
        ("torch", "2.9.1+cpu", "missing", "is too old", 1),
        ("torch", "2.14.0", "warning", "newer than the tested 2.13", 0),
        ("torch", "2.13.5+cu130", "ok", "2.13.5", 0),
        ("transformers", "5.99", "ok", "5.99", 0),
        ("gguf", None, "note", 'for models in GGUF files: pip install "truetune[gguf]"', 0),
    ],
)
def test_doctor_compares_versions(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str | None, state: str, says: str, status: int
) -> None:
    real = metadata.version

    def pretended(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", pretended)
    finding = next(f for f in doctor.examine() if f.name == package)
    assert finding.state == state and says in finding.text
    assert invoke("doctor").exit_code == status


@pytest.mark.parametrize(
    ("state", "patch", "name", "says"),
    [
        (
            "warning",
            ("disk_usage", lambda _: namedtuple("usage", "free")(1e9)),
            "disk",
            "1.0 GB free .*: run elsewhere",
        ),
        ("ok", ("disk_usage", lambda _: namedtuple("usage", "free")(9e9)), "disk", "9.0 GB free"),
        ("note", ("which", lambda name: None), "compiler", "torch's own, which is slower: apt install g"),
        (
            "warning",
            ("which", lambda name: name),
            "gpu",
            "built for the CPU alone; pip install --force-reinstall",
        ),
        ("note", ("which", lambda name: None), "gpu", "none that torch can use"),
    ],
)
def test_doctor_says_what_is_missing_and_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, state: str, patch: tuple[str, Any], name: str, says: str
) -> None:
    monkeypatch.setattr(doctor.shutil, *patch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    finding = next(f for f in doctor.examine() if f.name == name)
    assert finding.state == state and re.search(says, finding.text)


def test_doctor_times_bf16_beside_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([2.0] * 4 + [1.0] * 4 + [1.0] * 4 + [2.0] * 4 + [1.0] * 4 + [2.0] * 4)
    monkeypatch.setattr(doctor, "_timed", lambda work: next(seconds))
    fast, slow, without = doctor._bf16(["amx_bf16"]), doctor._bf16(["amx_bf16"]), doctor._bf16([])
    assert (fast.state, slow.state, without.state) == ("ok", "warning", "note")
    assert "products take 0.5 of the time of fp32 (amx_bf16)" in fast.text
    assert "products take 2 of the time" in slow.text and "set model.precision=fp32" in slow.text


def test_doctor_prints_json_or_only_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [doctor.Finding("ok", "a", "1"), doctor.Finding("warning", "b", "2")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    assert invoke("doctor", "--quiet").stdout == "warning  b  2\n"
    assert [json.loads(line) for line in invoke("doctor", "--json").stdout.splitlines()] == [f._asdict() for f in found]
    found.pop()
    assert invoke("doctor", "--quiet").stdout == ""


def test_doctor_knows_the_ranges_and_the_tested_set() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={least}" for name, (least, _) in doctor.PACKAGES.items()} == set(project["dependencies"])
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    assert project["requires-python"] == f">={'.'.join(map(str, doctor.PYTHON))}"
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    for name, (_, newest) in doctor.PACKAGES.items():
        assert f"{tested[name]}.".startswith(f"{newest}."), name


# Real processes, since only they show what is imported and what the shell sees.


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pydantic', 'datasets', 'yaml', 'matplotlib', 'numpy'}"
    code = f"import atexit, sys; atexit.register(lambda: print(sorted({heavy} & set(sys.modules)))); {ENTRY}"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1
    assert done.stdout.startswith("Usage: truetune") and done.stdout.rstrip().endswith("[]")


def test_the_shell_sees_one_line_and_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, "train", "quickstart"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*model\.path is missing .*\n", done.stderr)


def test_libraries_do_not_speak_for_themselves() -> None:
    asked = ["bench", "optimizers", "--table", str(ROOT / "results" / "optimizers.jsonl"), "--method", "adamw"]
    done = subprocess.run([sys.executable, "-c", ENTRY, *asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "" and "| adamw |" in done.stdout
