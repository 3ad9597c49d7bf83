"""A schedule refined from the gradient norms that an earlier run recorded: Defazio et al. 2023, arXiv 2310.07831.

With G_t the norm of step t, smoothed by a median, and w_t = 1 / G_t for the L1 norm (Adam and its kin) or 1 / G_t^2
for the L2 norm (SGD), step t has w_t times the sum of all later w, over the largest such product. Equal norms make it
the linear decay. Norms are those before clipping; which the paper takes is not known. Norms that are not finite are
left out, zeros stand for the smallest other. Left out: the numerical variant, and the cut of two values at each end
that the authors' script makes for the sake of its source of norms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from truetune import versions
from truetune.errors import UserError
from truetune.schedules.base import Schedule, sampled

FIELDS = {"l1": "gradient_norm_l1", "l2": "gradient_norm"}
"""Norm -> its name in the record of a step."""


def refined(total: int, *, run: Path, norm: Literal["l1", "l2"] = "l1", smoothing: float = 0.1) -> Schedule:
    """From the gradient norms of the earlier run in the folder ``run``, of any length (Defazio et al. 2023, arXiv
    2310.07831).

    norm: l1 for AdamW and its kin, l2 for SGD. smoothing: width of the median, as a share of the earlier run.
    """
    return refined_from(total, recorded(run, norm), norm, smoothing)


def refined_from(
    total: int, norms: Sequence[float] | np.ndarray, norm: Literal["l1", "l2"] = "l1", smoothing: float = 0.1
) -> Schedule:
    """The same from the norms themselves, one of each step of a run of any length, for loops of one's own.

    Raises UserError for fewer than two norms that are finite and above 0.
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"schedule.smoothing is {smoothing:g}; choose a share of the earlier run from 0 to below 1")
    finite = np.asarray(norms, dtype=float)
    finite = finite[np.isfinite(finite)]
    if (finite > 0).sum() < 2:
        raise UserError("fewer than two of the norms are above 0; give those of a longer run")
    factors = refine(finite, 1 if norm == "l1" else 2, smoothing)
    places = np.linspace(0, 1, len(factors))
    return sampled(lambda p: float(np.interp(p, places, factors)), total)


def recorded(run: Path, norm: Literal["l1", "l2"]) -> np.ndarray:
    """Norms of the steps that the run recorded, without those that are not finite.

    Raises UserError where it has no records, or fewer than two norms above 0.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"schedule.run is {run}, where there is no metrics.jsonl; name the folder of a run")
    found = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            form = record.get("format", versions.RECORD)
            value = record.get(FIELDS[norm]) if record["kind"] == "step" else None
            value = math.nan if value is None else float(value)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}:{number} is no record of a run; name another in schedule.run") from error
        versions.require(f"{file}:{number}", form, versions.RECORD)
        if math.isfinite(value):
            found.append(value)
    if sum(value > 0 for value in found) < 2:
        other = "" if norm == "l2" else ", or take what older runs recorded with schedule.norm=l2"
        raise UserError(f"{run} records fewer than two {norm.upper()} norms of gradients; name a longer run{other}")
    return np.array(found)


def refine(norms: np.ndarray, power: int, smoothing: float) -> np.ndarray:
    """Factors of the steps of the run of ``norms``, of which the last is 0 and the largest 1."""
    positive = np.maximum(norms, norms[norms > 0].min())
    smooth = median(positive, 2 * (int(smoothing * len(norms)) // 2) + 1)
    weights = (smooth / np.median(smooth)) ** -power
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    return weights * later / (weights * later).max()


def median(values: np.ndarray, width: int) -> np.ndarray:
    """Median of the ``width`` (odd) values around each; before the first is the first, after the last the mirror,
    in which the last is not repeated.
    """
    extended = np.pad(np.pad(values, (0, 2 * width), mode="reflect"), (width // 2, 0), mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(extended, width), axis=-1)[: len(values)]
