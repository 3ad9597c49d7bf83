"""What ``truetune merge`` does: adapters of runs or folders, with weights, into one adapter or a whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from truetune.errors import UserError
from truetune.models.adapter import base_of, folder_of
from truetune.models.export import Export
from truetune.models.load import explained, load, quiet
from truetune.models.merge import merge as merge_folders
from truetune.training.checkpoint import atomic_folder


def merge(parts: Sequence[str], to: Path, whole: bool = False) -> Export:
    """Add the adapters of ``parts`` ("ADAPTER_OR_RUN=WEIGHT") and write the sum to ``to``, once it reads back right.

    The tokenizer is that of the first adapter, or of the base where that has none. Raises UserError for what can't
    be read or added, leaving nothing.
    """
    weights = dict(map(_part, parts))
    if len(weights) < len(parts):
        raise UserError("an adapter is named twice; add up its weights")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} already holds something; name another folder with --to")
    first = next(iter(weights))
    base, revision = base_of(first)
    loaded = load(base, revision=revision)
    if (first / "tokenizer_config.json").is_file():  # with the chat template that was trained
        with quiet(), explained(str(first)):
            loaded = replace(loaded, tokenizer=AutoTokenizer.from_pretrained(first, trust_remote_code=False))
    with atomic_folder(to) as scratch:
        export = replace(merge_folders(loaded, weights, scratch, whole), path=str(to))
        if not export.passed:
            raise UserError(
                f"the sum reads back with logits that differ by {export.difference:.2e}, above the bound "
                f"{export.bound:.2e}, and was not kept; please report it with the adapters' configs"
            )
    return export


def _part(text: str) -> tuple[Path, float]:
    path, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value) or value == 0:
        raise UserError(f'"{text}" is not ADAPTER_OR_RUN=WEIGHT; write for example runs/a=0.5')
    return folder_of(path), value
