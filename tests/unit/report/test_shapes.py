"""The schedules drawn are those that the trainer has."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from folders import invoke

from truetune.report import shapes
from truetune.schedules import SCHEDULES, with_warmup
from truetune.schedules.falling import cosine


def test_what_is_drawn_is_what_the_trainer_would_have() -> None:
    drawn = {name: shapes.factors(name) for name in SCHEDULES}
    assert [name for name, values in drawn.items() if values is None] == ["refined"]
    schedule = with_warmup(cosine, shapes.STEPS, shapes.WARMUP)
    assert drawn["cosine"] == [schedule(t) for t in range(shapes.STEPS)]
    for name, values in drawn.items():
        assert len(shapes.blocks(values)) == 32
        assert values is None or (min(values) > 0 and max(values) > 0.99), name


def test_blocks_are_as_high_as_the_values() -> None:
    assert shapes.blocks([1, 1, 0.5, 0.5, 0, 0.25], 3) == "█▅▂"
    assert shapes.blocks([0, 0.999, 1], 3) == "▁██"


def test_the_table_shows_each_beside_its_name_and_the_picture_has_them_all(tmp_path: Path) -> None:
    file = tmp_path / "all.svg"
    result = invoke("show", "schedules", "--to", str(file))
    assert result.exit_code == 0 and result.stdout.endswith(f"picture  {file}\n")
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("one-cycle"))
    assert row.split()[2] == shapes.blocks(shapes.factors("one-cycle"))
    svg = ET.parse(file).getroot()
    names = [e.text for e in svg.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "name"]
    assert names == [name for name in SCHEDULES if name != "refined"]
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) == len(names)


@pytest.mark.parametrize(("name", "says"), [("a.png", "is not SVG"), ("no/folder/a.svg", "can't write .*No such file")])
def test_a_picture_that_cant_be_is_one_sentence(name: str, says: str, tmp_path: Path) -> None:
    result = invoke("show", "schedules", "--to", str(tmp_path / name))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert re.search(says, result.stderr)
