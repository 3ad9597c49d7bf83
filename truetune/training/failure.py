"""What a step that found no number leaves behind, so that it can be seen again; and what is not saved after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from truetune.data.batch import Batch
from truetune.training.checkpoint import Checkpoints, atomic_folder
from truetune.training.gradient import NonFinite
from truetune.training.patience import patiently


def keep_failure(
    failures: Path,
    step: int,
    batches: Sequence[Batch],
    random_state: Tensor,
    facts: dict[str, Any],
    before: tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None,
) -> str:
    """Write the folder of a failure after ``step`` steps into ``failures``; the sentence that says where.

    facts: what is told as JSON. before: tensors and values of a checkpoint from before the step, if there is one.
    """
    folder = failures / f"failure-step-{step + 1}"
    tensors = {"random": random_state}
    for i, b in enumerate(batches):
        tensors |= {
            f"{i}/tokens": b.tokens,
            f"{i}/labels": b.labels,
            f"{i}/lengths": torch.tensor(b.lengths),
        }
        if b.weights is not None:
            tensors[f"{i}/weights"] = b.weights
        if b.shared is not None:
            tensors[f"{i}/shared_rows"] = torch.from_numpy(b.shared.rows)
            tensors[f"{i}/shared_lengths"] = torch.tensor(b.shared.lengths)
            tensors[f"{i}/shared_times"] = torch.from_numpy(b.shared.times)

    def write() -> None:
        with atomic_folder(folder) as scratch:
            save_file(tensors, scratch / "batch.safetensors")
            (scratch / "step.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            if before:
                Checkpoints(scratch, keep=1).save(step, *before)

    try:
        patiently(write, folder)
    except OSError as error:
        return f"what shows it again could not be written to {folder} ({error.strerror}); lower the rate"
    kept = "batch, random state and weights" if before else "batch and random state"
    return f"{kept} are in {folder}; lower the rate, or look at these rows"


def require_finite_state(tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    """Raise NonFinite if a checkpoint would hold what is no number: it would take the place of a good one."""
    for kind in ("weights", "optimizer"):
        for name, tensor in tensors[kind].items():
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{name} is not finite after step {step}, so it was not saved; lower the rate")
