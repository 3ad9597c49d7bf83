"""Which kernels run on a GPU: those that ``truetune bench kernels --choose`` timed to win on one of its name.

One file per name of GPU, in the user's cache, with the measurements that it rests on. It holds for the versions that
were timed; with others torch's own run again until it is made anew. Nothing is chosen for anybody beforehand.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from truetune.cache import cache_folder
from truetune.errors import UserError
from truetune.kernels.triton import KERNELS

PACKAGES = ("truetune", "torch", "triton")


def file_of(gpu: str) -> Path:
    return cache_folder() / "kernels" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def versions() -> dict[str, str | None]:
    """Of what decides how fast a kernel is; None for a package that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def keep(gpu: str, chosen: list[str], measured: dict[str, Any]) -> Path:
    """Write the choice for GPUs of this name, with what it rests on."""
    file = file_of(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {"gpu": gpu, "versions": versions(), "chosen": chosen, **measured}
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)
    return file


def chosen_for(device: torch.device) -> tuple[str, ...]:
    """Operations whose kernel is to run on ``device``. Raises UserError for a file that is damaged."""
    if device.type != "cuda":
        return ()
    file = file_of(torch.cuda.get_device_name(device))
    if not file.is_file():
        return ()
    try:
        values = json.loads(file.read_bytes())
        timed_with, chosen = values["versions"], tuple(values["chosen"])
        if timed_with != versions():
            return ()
        if not KERNELS.keys() >= set(chosen):
            raise ValueError("it names what is no kernel")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({error}); delete it, or make it again: truetune bench kernels --choose"
        ) from error
    return chosen


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
