"""Bad input of every kind, made by the thousand: taken, or refused in one sentence (``fuzzing``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import hostile_data, hostile_models, hostile_recipes, hostile_runs
from fuzzing import Target, fresh_seed, refused, try_all

from truetune.data import template
from truetune.errors import UserError

FEW, MANY = 1_000, 20_000
NAMES = ("recipes", "rows", "messages", "templates", "tokenizers", "configs", "weights", "checkpoints", "reports")


@pytest.fixture(scope="module")
def targets(my_model: Path, straight: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    made = [
        hostile_recipes.target(folder, 0.3),
        *hostile_data.targets(folder, (0.2, 0.1, 0.1)),
        *hostile_models.targets(my_model, folder, (0.08, 0.06, 0.08)),
        hostile_runs.checkpoints(folder, 0.04),
        hostile_runs.reports(straight[0], folder, 0.04),
    ]
    assert sum(target.share for target in made) == pytest.approx(1)
    return {target.name: target for target in made}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)  # a template is as hostile after it as after the real limit
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_taken_or_refused_in_one_sentence(targets: dict[str, Target], name: str) -> None:
    tally = try_all(targets[name], round(FEW * targets[name].share))
    assert tally["errors"] and tally["accepted"]


@pytest.mark.proof
def test_twenty_thousand_bad_inputs(targets: dict[str, Target], evidence: Callable[..., None]) -> None:
    whole: Counter[str] = Counter()
    for target in targets.values():
        seed = fresh_seed()
        print(f"{target.name}: seed {seed}")
        whole += try_all(target, round(MANY * target.share), seed)
    assert whole.total() >= MANY
    evidence("fuzz", inputs=whole.total(), **whole)


def hang(_: object) -> None:
    while True:
        pass


def test_what_is_no_good_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.SECONDS", 1)
    monkeypatch.setattr("fuzzing.GROWTH", 1 << 26)

    def raising(error: Exception) -> Callable[[object], None]:
        def act(_: object) -> None:
            raise error

        return act

    for act in (raising(UserError("it is bad")), raising(ValueError("x")), hang, lambda _: bytearray(3 << 25) and None):
        with pytest.raises((AssertionError, ValueError)):
            refused(act, None)
    assert refused(raising(UserError("it is bad; mend it")), None) and not refused(lambda _: None, None)
