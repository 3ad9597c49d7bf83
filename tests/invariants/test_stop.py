"""Stopped by a signal and gone on with = never stopped, bit for bit; a run that cannot go on says why."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import assert_same_end
from folders import at_record, chats, facts, invoke, keys, step_is, write_rows
from safetensors.torch import load_file, save_file

from truetune.training.checkpoint import Checkpoints
from truetune.training.patience import Interrupted, ended_by_signals
from truetune.training.record import Checks, Evaluation, Record


class Stopped(NamedTuple):
    """The working folder of a run that a signal stopped after step 5, with ``model``, ``data.jsonl`` and ``out``."""

    place: Path
    code: int
    said: str


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory, my_model: Path, my_data: Path) -> Iterator[Stopped]:
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(my_model, place / "model")
    shutil.copy(my_data, place / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        at_record(patch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
        result = invoke("train", *keys(Path("model"), "data.jsonl", Path("out")))
    yield Stopped(place, result.exit_code, result.stderr)


@pytest.fixture
def stopped(stopped_once: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """A copy of it of one's own, which is the working folder."""
    place = tmp_path / "place"
    shutil.copytree(stopped_once.place, place)
    recipe = place / "out" / "recipe.yaml"  # a run names its model and data by absolute paths
    recipe.write_text(recipe.read_text().replace(str(stopped_once.place), str(place)))
    monkeypatch.chdir(place)
    return stopped_once._replace(place=place)


@pytest.mark.parametrize(
    ("number", "condition", "step"),
    [
        (signal.SIGINT, lambda r: isinstance(r, Checks), 0),
        (signal.SIGTERM, lambda r: isinstance(r, Evaluation) and r.step == 4, 4),
        (signal.SIGINT, step_is(7), 7),
    ],
    ids=["before the first step", "in an evaluation", "in a step"],
)
def test_a_signal_saves_and_the_printed_command_ends_as_if_nothing_had_been(
    number: signal.Signals,
    condition: Callable[[Record], bool],
    step: int,
    straight: tuple[Path, str],
    my_model: Path,
    my_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "a folder"
    at_record(monkeypatch, condition, lambda: signal.raise_signal(number))
    result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 130 and "Traceback" not in result.stderr
    assert number.name in result.stderr and f"stopped after step {step}; go on with: " in result.stderr
    assert facts(folder)["status"] == "interrupted"
    assert Checkpoints(folder / "checkpoints").newest() == (step, [])
    assert f"Interrupted at step {step}" in (folder / "report.html").read_text()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    program, *command = shlex.split(result.stderr.rpartition("go on with: ")[2])
    assert program == "truetune"
    assert invoke(*command).exit_code == 0
    assert_same_end(folder, straight[0])


def test_a_second_signal_stops_at_once(
    straight: tuple[Path, str], my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_record(monkeypatch, step_is(5), twice)
    assert invoke("train", *keys(my_model, my_data, tmp_path / "out")).exit_code == 130
    assert facts(tmp_path / "out")["status"] == "failed"
    assert Checkpoints(tmp_path / "out" / "checkpoints").steps() == [2, 4]
    assert invoke("train", "--resume", str(tmp_path / "out")).exit_code == 0
    assert_same_end(tmp_path / "out", straight[0])


def test_a_damaged_checkpoint_is_passed_over_and_said(stopped: Stopped, straight: tuple[Path, str]) -> None:
    assert stopped.code == 130 and Checkpoints(Path("out/checkpoints")).steps() == [2, 4, 5]
    weights_file = Path("out/checkpoints/step-00000005/weights.safetensors")
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 1
    weights_file.write_bytes(data)
    result = invoke("train", "--resume", "out")
    assert result.exit_code == 0
    assert re.search(r"passed over: .*step-00000005 is damaged \(weights.safetensors is not what", result.stderr)
    assert_same_end(Path("out"), straight[0])


def test_a_checkpoint_that_a_kill_left_half_written_is_no_checkpoint(
    stopped: Stopped, straight: tuple[Path, str]
) -> None:
    half = Path("out/checkpoints/.step-00000006.tmp")
    half.mkdir()
    (half / "half.safetensors").write_bytes(b"half")
    with Path("out/metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 6, "lo')
    assert invoke("train", "--resume", "out").exit_code == 0
    assert_same_end(Path("out"), straight[0])
    assert not half.exists() and not list(Path("out").rglob("half.*"))


def change_base(_: Path) -> None:

    tensors = load_file("model/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def change_data(_: Path) -> None:
    write_rows(Path("data.jsonl"), chats(61))


def change_template(_: Path) -> None:
    file = Path("model/chat_template.jinja")
    file.write_text(file.read_text().replace("\\n", " "))


def lose_checkpoints(_: Path) -> None:
    shutil.rmtree("out/checkpoints")


def damage_all(_: Path) -> None:
    for file in Path("out/checkpoints").glob("*/manifest.json"):
        file.write_text("{}")


def change_rank(_: Path) -> None:
    file = Path("out/recipe.yaml")
    file.write_text(file.read_text().replace("rank: 4", "rank: 8"))


def change_scaling(_: Path) -> None:
    file = Path("out/recipe.yaml")
    file.write_text(file.read_text().replace("rank: 4", "rank: 4\n  rslora: true"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_base, "the base model has changed since the run began .*; restore it"),
        (change_data, "the train data has changed since the run began; restore it"),
        (change_template, "the train data has other tokens .*; restore the tokenizer"),
        (lose_checkpoints, "holds no intact checkpoint; start the run again"),
        (damage_all, r"holds no intact checkpoint \(.*step-00000005 .*; start the run again"),
        (change_rank, "the adapter is another than when the run began; restore .*recipe.yaml"),
        (change_scaling, "the adapter is another than when the run began; restore .*recipe.yaml"),
    ],
)
def test_what_cannot_be_resumed_is_one_sentence(stopped: Stopped, change: Callable[[Path], None], says: str) -> None:
    change(stopped.place)
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    result = invoke("train", "--resume", "out")
    assert result.exit_code == 2 and re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert re.search(says, result.stderr), result.stderr
    assert before == {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    if change in (change_base, change_scaling):
        refused = invoke("export", "out", "--merged")
        assert refused.exit_code == 2 and re.search(says, refused.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_never_taken_for_a_fault_of_what_it_meets(number: signal.Signals) -> None:
    """Templates and parsers raise anything, so what calls them catches every Exception."""
    caught = []
    with pytest.raises(Interrupted, match=r"^stopped here$"), ended_by_signals("stopped here"):
        try:
            signal.raise_signal(number)
        except Exception as fault:
            caught.append(fault)
    assert not caught
