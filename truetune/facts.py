"""``run.json``: what a run was made of, on which machine, and what came of it. Every reader's one source."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel

import truetune
from truetune.assembly import Job

FORMAT = 1
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class Facts:
    """The facts of one run, kept in memory and written whole, atomically, at every change."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file = file
        self.values = values

    @classmethod
    def start(cls, folder: Path, job: Job, command: str) -> Facts:
        values = {
            "format": FORMAT,
            "truetune": truetune.__version__,
            "name": folder.name,
            "started": now(),
            "finished": None,
            "status": "running",
            "command": command,
            "recipe": job.recipe.model_dump(mode="json"),
            "environment": environment(job),
            "model": model_facts(job),
            "data": {"train": asdict(job.train.report), "evaluation": asdict(job.evaluation.report)},
            "plan": plan(job),
            "result": {"before": None, "after": None},
            "exports": [],
            "verdicts": [],
            "void": None,
            "next": [],
        }
        facts = cls(folder / "run.json", values)
        facts.write()
        return facts

    @classmethod
    def read(cls, folder: Path) -> Facts:
        return cls(folder / "run.json", json.loads((folder / "run.json").read_bytes()))

    def write(self, **changes: Any) -> None:
        self.values |= changes
        scratch = self.file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.values, indent=1, allow_nan=False))
        scratch.replace(self.file)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(job: Job) -> dict[str, Any]:
    device = job.trainer.model.device
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def cpu_name() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name")
    return str(name or platform.processor() or platform.machine())


def model_facts(job: Job) -> dict[str, Any]:
    model, loaded = job.trainer.model, job.loaded
    return {
        "path": str(loaded.folder.resolve()),
        "source": loaded.source,
        "sha256": loaded.digest,
        "family": model.hf.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.trainable().values()),
        "adapter": isinstance(model.model, PeftModel),
        "precision": str(model.dtype).removeprefix("torch."),
        "route": model.route.name,
        "route_reason": model.route.reason,
        "template_sha256": job.train.report.template,
        "license": None,
    }


def plan(job: Job) -> dict[str, Any]:
    """Steps, tokens and the planned rate of the run, at 200 of its steps at most."""
    trainer, stream = job.trainer, job.trainer.stream
    peak = max(g["peak"] for g in trainer.optimizer.param_groups)
    steps = sorted({round(i * (len(stream) - 1) / 199) for i in range(200)})
    return {
        "steps": len(stream),
        "tokens": stream.tokens,
        "epochs": stream.epochs,
        "schedule": [[t + 1, peak * trainer.schedule(t)] for t in steps],
    }
