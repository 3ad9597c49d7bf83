"""``run.json``: what a run was made of, on which machine, and what came of it. Every reader's one source."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel

import truetune
from truetune import versions
from truetune.assembly import Job, recomputation
from truetune.errors import UserError
from truetune.kernels import product
from truetune.kernels.native.build import kernels
from truetune.kernels.op import FAST_PATHS, is_on
from truetune.kernels.triton.choices import chosen_for
from truetune.models.adapt import START
from truetune.models.adapter import provenance
from truetune.rows import sources_of
from truetune.training.patience import patiently, write_text

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class Facts:
    """The facts of one run, kept in memory and written whole, atomically, at every change."""

    def __init__(self, file: Path, values: dict[str, Any]) -> None:
        self.file = file
        self.values = values

    @classmethod
    def start(cls, folder: Path, job: Job, command: str | None) -> Facts:
        values = {
            "format": versions.RUN,
            "truetune": truetune.__version__,
            "name": folder.name,
            "started": now(),
            "finished": None,
            "status": "running",
            "process": this_process(),
            "command": command,
            "recipe": job.recipe.model_dump(mode="json"),
            "environment": environment(job),
            "model": model_facts(job),
            "data": data_facts(job),
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
        """Raises ValueError for what is no JSON object, UserError for one of another format."""
        file = folder / "run.json"
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("it is no object")
        versions.require(file, values.get("format"), versions.RUN, values.get("truetune"))
        return cls(file, values)

    @property
    def alive(self) -> bool:
        """Whether the process that makes this run is at work on this machine, and not only left its mark."""
        match self.values:
            case {"status": "running", "process": [int(number), float(born)]}:
                try:
                    return abs(psutil.Process(number).create_time() - born) < 2
                except (psutil.Error, ValueError, OverflowError):  # there is none, or there can be none
                    return False
        return False

    def write(self, **changes: Any) -> None:
        """Take up ``changes`` and save; waits while the disk is full."""
        self.values |= changes
        patiently(self.save, self.file)

    def save(self) -> None:
        write_text(self.file, json.dumps(self.values, indent=1, allow_nan=False))


def this_process() -> tuple[int, float]:
    """Number and birth of this process, which together no other has."""
    process = psutil.Process()
    return process.pid, process.create_time()


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
        "kernels": compiled() if device.type == "cpu" else ", ".join(chosen_for(device)) or "torch",
    }


def compiled() -> str:
    """The kernels that were compiled for this processor and are used."""
    native = [name for name in FAST_PATHS if name.startswith("native_") and is_on(name) and kernels()]
    return ", ".join(name for name in native if name != "native_products" or product.available()) or "torch"


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
        "parameters": sum(p.numel() for n, p in model.named_parameters() if not _is_spare(n)),
        "trainable": sum(p.numel() for p in model.trainable().values()),
        "adapter": isinstance(model.model, PeftModel),
        "lora": _lora(cast(LoraConfig, model.model.peft_config["default"]))
        if isinstance(model.model, PeftModel)
        else None,
        "adapter_from": provenance(path) if (path := job.recipe.adapter.path) else None,
        "precision": str(model.dtype).removeprefix("torch."),
        "base": job.recipe.model.base,
        "route": model.route.name,
        "route_reason": model.route.reason,
        "unshared": job.unshared,
        "last_layer_whole": model.route.whole,
        "backward": recomputation(job.recipe, model, job.train.lengths),
        "notes": list(job.notes),
        "template_sha256": job.train.report.template,
        "license": None,
    }


def _is_spare(name: str) -> bool:
    """Whether a parameter stands beside the one that is computed with: of a module trained in full, PiSSA's start."""
    return ".original_module." in name or f".{START}." in name


def _lora(config: LoraConfig) -> dict[str, Any]:
    """What the adapter is, whether by the recipe or by the adapter that is trained further."""
    targets = config.target_modules
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
        "targets": targets if isinstance(targets, str) else sorted(targets or ()),
        "also": list(config.modules_to_save or ()),
    }


def data_facts(job: Job) -> dict[str, Any]:
    """The account of both sides; with several sources also that of each, by its name."""
    facts: dict[str, Any] = {"train": asdict(job.train.report), "evaluation": asdict(job.evaluation.report)}
    if len(job.train.parts) > 1:
        held_out = {part.name: asdict(part.report) for part in job.evaluation.parts}
        facts["sources"] = [
            {"name": p.name, "weight": s.weight, "train": asdict(p.report), "evaluation": held_out.get(p.name)}
            for p, s in zip(job.train.parts, sources_of(job.recipe), strict=True)
        ]
    return facts


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


# What a run that is continued is held to.


def require_same_base(facts: Facts, job: Job) -> None:
    """Raise UserError unless ``job`` stands on the weights that the run began with."""
    then, here = facts.values["model"]["sha256"], job.loaded.digest
    if then != here:
        raise UserError(f"the base model has changed since the run began ({then[:12]} became {here[:12]}); restore it")


def require_same_run(facts: Facts, job: Job) -> None:
    """Raise UserError where the rest of the run would be one of other documents, rates or another precision."""
    for side, part in (("train", job.train), ("evaluation", job.evaluation)):
        then, here = facts.values["data"][side], asdict(part.report)
        if then["digest"] != here["digest"]:
            raise UserError(f"the {side} data has changed since the run began; restore it, or start a new run")
        if any(then.get(key) != here[key] for key in ("template", "tokens", "targets", "document_digest")):
            raise UserError(
                f"the {side} data has other tokens than when the run began; restore the tokenizer and its chat "
                "template, or start a new run if they print what changes, such as the date"
            )
    require_same_adapter(facts, job)
    require_same_rates(facts, job)
    then, here = facts.values["model"]["precision"], model_facts(job)["precision"]
    if then != here:
        name = {"float32": "fp32", "bfloat16": "bf16"}.get(then, then)
        raise UserError(
            f"the run began in {then} and would go on in {here}; write model.precision: {name} into "
            f"{facts.file.with_name('recipe.yaml')}"
        )
    began, base = facts.values["model"].get("base"), job.recipe.model.base
    if began != base:
        raise UserError(
            f"the run began with model.base={began or 'none'} and would go on with {base or 'none'}; restore "
            f"{facts.file.with_name('recipe.yaml')}"
        )


def require_same_rates(facts: Facts, job: Job) -> None:
    """Raise UserError unless every rate is as planned: a schedule may rest on another run's folder."""
    then, here = (np.array(planned["schedule"]) for planned in (facts.values["plan"], plan(job)))
    if then.shape != here.shape or not np.allclose(then, here, rtol=1e-9, atol=0):
        raise UserError(
            f"the rates are others than those that the run began with; restore "
            f"{facts.file.with_name('recipe.yaml')} and what its schedule is made from, or start a new run"
        )


def require_same_adapter(facts: Facts, job: Job) -> None:
    """Raise UserError unless the adapter has the shape, the scaling and the start that the run began with."""
    here = json.loads(json.dumps(model_facts(job)))
    if any(facts.values["model"].get(key) != here[key] for key in ("lora", "adapter_from")):
        raise UserError(
            f"the adapter is another than when the run began; restore {facts.file.with_name('recipe.yaml')} and the "
            "adapter that it starts from, or start a new run"
        )


def moved(facts: Facts, job: Job) -> list[str]:
    """What has changed since the run began of all that decides the last digits of a sum."""
    then, here = facts.values["environment"], environment(job)
    names = ("device", "cpu", "threads", "torch", "kernels")
    return [f"{name} was {then.get(name)} and is {here[name]}" for name in names if then.get(name) != here[name]]
