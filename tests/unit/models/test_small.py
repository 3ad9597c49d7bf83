"""Rows beyond a config's positions: computed positions go on, tables end."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import facts, invoke, keys, write_model
from tiny import tiny

from truetune.models.small import positions_of, scaling_begins, takes_more_positions


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", True),
        ("gemma2", True),
        ("falcon alibi", True),
        ("gpt2", False),
        ("opt", False),
        ("gpt-j", False),
        ("mpt", False),
    ],
)
def test_tables_end_and_computed_positions_go_on(family: str, more: bool) -> None:
    model = tiny(family)
    assert positions_of(model.config) == 128
    assert takes_more_positions(model) == more


def test_where_a_scaling_begins_is_found_wherever_the_config_says_it() -> None:
    assert scaling_begins(tiny("phi3 longrope").config) == 24
    assert scaling_begins(tiny("llama scaled").config) == 24
    assert scaling_begins(tiny("llama").config) == 128
    assert scaling_begins(tiny("bloom").config) is None


def test_a_run_on_longer_rows_is_told_and_made(tmp_path: Path, my_data: Path) -> None:
    model = write_model(tmp_path / "model", max_position_embeddings=24)
    result = invoke("train", *keys(model, my_data, tmp_path / "out", "train.steps=2"))
    assert result.exit_code == 0, result.output
    assert "more than the 24 positions of the model's config" in result.stdout
    assert "data.max_length=24" in facts(tmp_path / "out")["model"]["notes"][0]
