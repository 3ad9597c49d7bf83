"""The small real model of the quick start, and all cores for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """The other tests use one thread; this model is large enough for all."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_model() -> str:
    """The path of the quick start's model, as the Makefile keeps it."""
    place = Path(__file__).parents[2] / ".cache" / "model"
    path = place.read_text().strip() if place.is_file() else ""
    if not path or not Path(path).exists():
        pytest.fail("the quick start's model is not there; fetch it with: make .cache/model")
    return path
