"""Every ready recipe says what it is for, loads, and trains a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import chats, write_rows

from truetune import spelling
from truetune.assembly import assemble
from truetune.training.record import Checks, Step
from truetune.training.watch import watch

ROWS = {
    "completion": [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}."} for i in range(40)],
    "pretrain": [{"text": f"What {i} and {i} is: it is {2 * i}."} for i in range(40)],
    "alpaca": [{"instruction": f"Add {i} and {i}.", "output": f"It is {2 * i}."} for i in range(40)],
    "classify": [{"prompt": f"{i}", "completion": "even" if i % 2 else "odd"} for i in range(60)],
}
ROWS["domain"] = ROWS["pretrain"]
SMALL = ("train.epochs=none", "train.tokens=none", "train.steps=2", "evaluation.rows=4", "evaluation.samples=1",
         "evaluation.sample_tokens=2", "train.tokens_per_step=64", "model.precision=fp32")  # fmt: skip


@pytest.mark.parametrize("name", spelling.ready())
def test_a_ready_recipe_trains(name: str, my_model: Path, tmp_path: Path) -> None:
    path = spelling.ready()[name]
    first, second, command = path.read_text(encoding="utf-8").splitlines()[:3]
    assert first.startswith("# ") and first.endswith("."), "what it is for"
    assert second == "#" and command.startswith(f"#   truetune train {name} model.path=MODEL")
    data = write_rows(tmp_path / "data.jsonl", ROWS.get(name, chats(40)))
    given = [f"model.path={my_model}", f"data.source={data}"]
    asked = spelling.read(name, given)
    assert asked != spelling.read(None, given), "it says something"
    trainer = assemble(spelling.read(name, [*given, *SMALL])).trainer
    found = list(watch(trainer.steps()))
    assert all(v.passed for r in found if isinstance(r, Checks) for v in r.verdicts)
    assert [r.step for r in found if isinstance(r, Step)] == [1, 2]


def test_ready_recipes_are_yaml_for_editors_too() -> None:
    for path in spelling.ready().values():  # YAML 1.2, which editors check by, has no 32_768
        values = [line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        assert not [line for line in values if "_" in line.partition(":")[2]], path.name
