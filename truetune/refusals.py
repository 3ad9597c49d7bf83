"""What the machine refuses in the midst of a run, disk or memory, as the one sentence that a user reads.

Nothing is tried again: files are written whole or not at all, so that a run goes on from its last checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from truetune.errors import UserError, shortage
from truetune.recipe import Recipe


@contextmanager
def explained(folder: Path, recipe: Recipe | None = None) -> Iterator[None]:
    """Raise UserError for what the disk refuses to the run of ``folder``, and memory to that of ``recipe``."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if recipe and (what := shortage(error)):
            raise UserError(f"{what}; {_with_less(recipe, folder)}; {way_on(folder)}") from error
        if not isinstance(error, OSError):
            raise
        fault = f"{error.filename or folder}: {error.strerror or error}"
        raise UserError(f"{fault}; what was saved is intact, so mend the cause; {way_on(folder)}") from error


@contextmanager
def loading_explained(recipe: Recipe) -> Iterator[None]:
    """Raise UserError where memory does not hold what a run begins with."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if not (what := shortage(error)):
            raise
        ways = [
            *(["set model.precision=bf16"] if recipe.model.precision == "fp32" else []),
            *(["train an adapter (adapter.method=lora)"] if recipe.adapter.method == "full" else []),
            "choose a smaller model",
        ]
        raise UserError(f"{what} before the first step; {' or '.join(ways)}") from error


def way_on(folder: Path) -> str:
    """How the run of ``folder`` goes on."""
    if not _saved(folder):
        return "no step was saved yet, so start the run again"
    return f"go on with: truetune train --resume {shlex.quote(str(folder))}"


def _with_less(recipe: Recipe, folder: Path) -> str:
    rows, least, kept = recipe.train.tokens_per_micro_batch, recipe.data.max_length, recipe.train.activation_memory
    ways = [f"lower train.tokens_per_micro_batch (now {rows}, at least {least})"] if rows > least else []
    ways.append("set train.activation_memory" if kept is None else f"lower train.activation_memory (now {kept:g})")
    if _saved(folder):  # neither changes what is learned, so that the run may go on with another
        return f"what was saved is intact, so {' or '.join(ways)} in {folder / 'recipe.yaml'}"
    return " or ".join(
        [*ways, *(["train an adapter (adapter.method=lora)"] if recipe.adapter.method == "full" else [])]
    )


def _saved(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*"))
