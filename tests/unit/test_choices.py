"""What `truetune show` lists is what there is, with where it stands; the schema says all that an editor needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from folders import invoke

from truetune import choices
from truetune.data.formats import FORMATS
from truetune.optim import KINDS, OPTIMIZERS
from truetune.recipe import Format, Recipe
from truetune.schedules import SCHEDULES
from truetune.spelling import SECTIONS, ready


def listed(name: str) -> dict[str, tuple[str, ...]]:
    return {row[0]: row for row in choices.SHOWN[name]()}


@pytest.mark.parametrize(
    ("name", "there"),
    [("formats", FORMATS), ("optimizers", OPTIMIZERS), ("schedules", SCHEDULES), ("recipes", ready())],
)
def test_a_table_lists_all_that_there_is_with_its_purpose_and_file(name: str, there: dict[str, Any]) -> None:
    found = listed(name)
    assert set(found) == set(there)
    for row in found.values():
        assert (choices.ROOT / row[-1]).is_file(), row
        assert len(max(row, key=len)) > 10, "it says what it is"
        assert name == "recipes" or row[1] == "works"


def test_the_page_of_optimizers_is_the_table_of_the_program() -> None:
    text = (choices.ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    table = text[text.index("| name | what it is |") :].split("\n\n")[0]  # the page has others, of kinds and of times
    told = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    expected = []
    for name, _, purpose, held, options, _ in choices.optimizers():
        takes = getattr(OPTIMIZERS[name], "takes", KINDS)
        kinds = "all" if takes == KINDS else ", ".join(takes)
        expected.append([f"`{name}`", purpose, f"`{held}`", kinds, f"`{options}`"])
    assert [row[:5] for row in told] == expected
    assert all(len(row) == 6 and row[5] for row in told)


def test_every_table_is_a_command() -> None:
    for name in choices.SHOWN:
        result = invoke("show", name)
        assert result.exit_code == 0 and len(result.stdout.splitlines()) == len(list(choices.SHOWN[name]()))


def test_sources_are_what_may_be_written() -> None:
    assert {"python-docs", "file", "folder", "hub"} <= set(listed("sources"))


def test_families_are_read_from_results_or_said_to_be_unmeasured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "FAMILIES", tmp_path)
    assert listed("families")["any"][1] == "not measured"
    good = {"family": "llama", "features": "rotary", "route": "flat", "failed": ""}
    (tmp_path / "a.json").write_text(json.dumps(good))
    (tmp_path / "b.json").write_text(json.dumps(good | {"family": "other", "failed": "full bf16"}))
    found = listed("families")
    assert found["llama"][1:4] == ("works", "rotary", "flat") and found["other"][1] == "fails: full bf16"


def test_every_key_is_listed_with_what_it_may_be() -> None:
    found = listed("keys")
    assert found["adapter.method"][1:3] == ("lora | full", '"lora"')
    assert found["train.steps"][1:3] == ("integer or none", "none") and found["model.path"][2] == "required"
    expected = {f"{s}.{key}" for s, part in SECTIONS.items() for key in part.model_fields}
    assert expected <= set(found) and all(row[3] for row in found.values())


def test_the_schema_describes_every_key_and_lists_what_may_be_chosen() -> None:
    schema = json.loads(invoke("show", "schema").stdout)
    assert schema["$schema"].startswith("http://json-schema.org/")
    for name, section in SECTIONS.items():
        part = schema["$defs"][section.__name__]
        assert part["description"], name
        for key, value in part["properties"].items():
            assert value.get("description"), f"{name}.{key}"
    (names, own) = schema["$defs"]["Optimizer"]["properties"]["name"]["anyOf"]
    assert names["enum"] == list(OPTIMIZERS) and own["pattern"]
    assert schema["$defs"]["Adapter"]["properties"]["method"]["enum"] == ["lora", "full"]
    assert all(value.get("description") or "$ref" in json.dumps(value) for value in schema["properties"].values())
    assert set(schema["properties"]) == set(Recipe.model_fields)


def test_every_format_can_be_named_in_a_recipe() -> None:
    assert set(get_args(Format)) == {"auto", *FORMATS}
