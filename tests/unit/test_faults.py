"""A wrong recipe that is built in Python is the sentence that a written one would be."""

from __future__ import annotations

from typing import Any

import pytest

from truetune import spelling
from truetune.errors import UserError
from truetune.recipe import Model, Recipe, Train

GOOD: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "s"}}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"train": {"stepps": 3}}, 'unknown key "train.stepps" (did you mean "steps"?); use one of epochs, steps,'),
        ({"trian": {"steps": 3}}, 'unknown key "trian" (did you mean "train"?); use one of version, model, data,'),
        ({"train": {"rank": 3}}, 'unknown key "train.rank" (did you mean "adapter.rank"?)'),
        ({"train": {"steps": "3"}}, 'train.steps is "3", but must be an integer'),
        ({"train": 3}, "train is a section; write its keys under it (epochs, steps, "),
        ({"train": Train(steps=3, epochs=1.0)}, "train.epochs and train.steps both set the length of the run; keep"),
        ({"device": "gpu"}, "device is \"gpu\", but must be 'auto', 'cpu' or 'cuda'"),
        ({"model": Model(path="m"), "adapter": {"rank": 0}, "train": {"seed": -1}}, "adapter.rank is 0, but must be "),
    ],
)
def test_a_wrong_recipe_in_python_is_one_sentence(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe(**(GOOD | parts))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        Recipe.model_validate(GOOD | parts)


def test_two_faults_are_both_told_and_more_are_counted() -> None:
    with pytest.raises(UserError, match=r"^model\.path is missing .*; and data\.source is missing .*add data\.source="):
        Recipe()
    with pytest.raises(UserError, match=r"^train\.steps is .* \(and 2 more faults\)$"):
        Recipe(**GOOD, train={"steps": 0, "seed": -1, "clip": 0.0})


def test_a_right_recipe_is_what_it_was() -> None:
    recipe = Recipe(**GOOD, train={"steps": 3})
    assert recipe == spelling.read(None, ["model.path=m", "data.source=s", "train.steps=3"])
    assert recipe.model_fields_set == {"model", "data", "train"}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
