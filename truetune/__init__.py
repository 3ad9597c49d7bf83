"""Truetune: training of language models that is fast, and verified to be real.

>>> import truetune
>>> truetune.train(truetune.Recipe(model={"path": ...}, data={"source": ...}))

or, with a loop of your own and all checks kept:

>>> job = truetune.assemble(recipe)
>>> for record in truetune.watch(job.trainer.steps()):
...     print(record)
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "UserError", "__version__", "assemble", "prove", "train", "watch"]

_HOMES = {
    "Recipe": "truetune.recipe",
    "UserError": "truetune.errors",
    "assemble": "truetune.assembly",
    "prove": "truetune.promises",
    "train": "truetune.run",
    "watch": "truetune.training.watch",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and ``truetune --help`` must not."""
    if name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'truetune' has no attribute {name!r}")
