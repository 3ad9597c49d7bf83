"""One torch thread per test process: tiny matrices gain nothing from two, and idle threads spin."""

import json
import os
import signal
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for GPUs run on CPU tensors

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and tests send it
settings.register_profile("truetune", deadline=None)  # how long an example takes is no property of the code
settings.load_profile("truetune")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that is skipped shows nothing: where all of them have to run, it fails."""
    report = yield
    if report.skipped and os.environ.get("TRUETUNE_NO_SKIPS") == "1":
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, but every test has to run here"
    return report


@pytest.fixture(scope="session")
def my_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte-level tokenizer, as a Hugging Face folder."""
    from folders import write_model

    return write_model(tmp_path_factory.mktemp("shared") / "my-model")


@pytest.fixture(scope="session")
def my_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of conversations."""
    from folders import chats, write_rows

    return write_rows(tmp_path_factory.mktemp("shared") / "my-data.jsonl", chats())


@pytest.fixture(scope="session")
def straight(my_model: Path, my_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run by the command line that nothing disturbed, and what it printed. To be read only."""
    from folders import invoke, keys

    folder = tmp_path_factory.mktemp("shared") / "straight"
    result = invoke("train", *keys(my_model, my_data, folder))
    assert result.exit_code == 0, result.output
    return folder, result.stdout


@pytest.fixture
def evidence() -> Callable[..., None]:
    """Keep figures of a proof in ``results/trust``, from which ``tools/trust.py`` writes its pages."""

    def keep(name: str, **figures: int | float | str) -> None:
        file = Path(__file__).parents[1] / "results" / "trust" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    return keep
