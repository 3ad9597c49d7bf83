"""The versions of what a run writes, and the sentence for a file of another one.

A number is raised when this program could no longer read what it wrote before; ``docs/architecture.md`` says when
that is. A recipe has its own (``recipe.VERSION``), because people write it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import truetune
from truetune.errors import UserError

RUN = 1
"""Of ``run.json``."""
RECORD = 1
"""Of every line of ``metrics.jsonl``."""
CHECKPOINT = 1
"""Of a checkpoint, and of every other folder with a manifest."""
ADAPTER = 1
"""Of ``truetune.json`` beside an adapter."""


def require(where: object, found: Any, known: int, writer: Any = None) -> None:
    """Raise UserError unless ``found`` is the version ``known``; ``writer`` is the truetune that wrote ``where``."""
    if found == known and type(found) is int:
        return
    named = isinstance(writer, str) and re.fullmatch(r"[\w.+-]{1,40}", writer) and writer != truetune.__version__
    advice = f"use truetune {writer}, which wrote it" if named else "use the truetune that wrote it"
    spelled = json.dumps(found)[:40]
    raise UserError(f"{where} has format {spelled}, but truetune {truetune.__version__} reads {known}; {advice}")
