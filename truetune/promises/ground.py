"""What the promises are tried on: the user's own recipe, shortened to a few steps and really run.

A whole run of ``STEPS`` steps, as ``truetune train`` makes it, gives one folder. A second trainer, assembled from
nothing, then takes the same steps as far as a random one; its moved weights are what gradients are measured on.
Where memory and the model allow it, these are measured in float64, in which only a real fault shows.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor

from truetune import rows, run
from truetune.assembly import Job, assemble
from truetune.checks.preflight import GRADIENT_BOUND, LOSS_BOUND, crop
from truetune.data.batch import Batch, Document
from truetune.models.wrap import CausalLM
from truetune.promises.recount import Recount, recount
from truetune.recipe import Part, Recipe
from truetune.report.folder import Run
from truetune.training.record import Record
from truetune.training.trainer import Trainer
from truetune.training.watch import watch

STEPS = 4
TOKENS_PER_STEP = 1024
PROBE_TOKENS = 384
EXACT = 1e-6
"""Relative bound in float64: models compute norms and angles in fp32 whatever their weights are."""


class Reading:
    """Stands for a part of a recipe, and notes in ``read`` every key that someone reads."""

    def __init__(self, part: Part, read: set[str], prefix: str = "") -> None:
        self._part, self._read, self._prefix = part, read, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if isinstance(value, Part):
            return Reading(value, self._read, f"{self._prefix}{name}.")
        if parts := _listed(value):
            self._read.add(f"{self._prefix}{name}")
            return tuple(Reading(part, self._read, f"{self._prefix}{name}.{i}.") for i, part in enumerate(parts))
        names = self._part.model_extra or {} if name == "options" else [name]
        self._read.update(f"{self._prefix}{key}" for key in names)
        return value


def _listed(value: Any) -> tuple[Part, ...]:
    """The parts that ``value`` is a list of, if it is one."""
    return value if isinstance(value, tuple) and value and all(isinstance(v, Part) for v in value) else ()


def written(part: Part, prefix: str = "") -> set[str]:
    """The keys that the user wrote, with dots; the version is read before anything else is."""
    keys = set()
    for name in part.model_fields_set - {"version"}:
        value = getattr(part, name)
        inner = {name: value} if isinstance(value, Part) else {f"{name}.{i}": v for i, v in enumerate(_listed(value))}
        keys |= set().union(*(written(v, f"{prefix}{k}.") for k, v in inner.items())) if inner else {prefix + name}
    return keys


def shortened(recipe: Recipe, folder: Path, every: int) -> Recipe:
    """The recipe for a run of ``STEPS`` small steps that saves and evaluates every ``every`` steps."""

    def part(name: str, **changes: Any) -> Part:
        return cast(Part, getattr(recipe, name).model_copy(update=changes))

    train, evaluation = recipe.train, recipe.evaluation
    asked = recipe.schedule.options.get("decay")  # as warm-up: above 1, so many steps of a longer run
    decay = {"decay": min(asked, 1.0)} if isinstance(asked, int | float) else {}
    return recipe.model_copy(
        update={
            "train": part(
                "train",
                epochs=None,
                tokens=None,
                steps=STEPS,
                tokens_per_step=min(train.tokens_per_step, TOKENS_PER_STEP),
                tokens_per_micro_batch=min(
                    train.tokens_per_micro_batch, max(TOKENS_PER_STEP // 2, recipe.data.max_length)
                ),
            ),
            "evaluation": part(
                "evaluation",
                every=every,
                rows=min(evaluation.rows, 8),
                samples=min(evaluation.samples, 1),
                sample_tokens=min(evaluation.sample_tokens, 8),
            ),
            "schedule": part("schedule", warmup=min(recipe.schedule.warmup, 1.0), **decay),
            "checkpoint": part("checkpoint", every=every, keep=STEPS),
            "output": part("output", folder=str(folder), tensorboard=False, wandb=False),
        }
    )


@dataclass
class Ground:
    """What every promise may look at.

    asked:   the recipe as the user wrote it; recipe: shortened.
    folder:  of the whole run, which read the keys in ``read``.
    job:     the second trainer, after ``stopped`` of the ``STEPS`` steps, which took ``seconds`` and yielded
             ``records``; random: the random state that it was left in.
    spare:   a folder for what a promise wants to write.
    failed:  the promises that were found not to hold.
    """

    asked: Recipe
    recipe: Recipe
    read: set[str]
    folder: Path
    spare: Path
    stopped: int
    job: Job
    records: list[Record]
    seconds: float
    random: dict[str, Tensor]
    failed: list[str] = field(default_factory=list)

    @classmethod
    def prepare(cls, recipe: Recipe, folder: Path, spare: Path) -> Ground:
        """Make the run and the second trainer. Raises UserError as ``truetune train`` does."""
        stopped = random.SystemRandom().randrange(1, STEPS)
        short = shortened(recipe, folder, stopped)
        read: set[str] = set()
        run.train(cast(Recipe, Reading(short, read)), quiet=True)
        job = assemble(short)
        # Without what the first run did beside its steps: checks, evaluation and answers must leave no trace.
        job.trainer.preflight = job.trainer.evaluator = job.trainer.sampler = None
        records, seconds = _steps(job.trainer, stopped)
        random_state = job.trainer.state()[0]["random"]
        return cls(recipe, short, read, folder, spare, stopped, job, records, seconds, random_state)

    @property
    def trainer(self) -> Trainer:
        return self.job.trainer

    @cached_property
    def run(self) -> Run:
        """The whole run, as its folder tells."""
        return Run.read(self.folder)

    @cached_property
    def counted(self) -> list[tuple[str, rows.Part, Recount]]:
        """Each source's part of each side, with the name of the side, counted once more from its rows."""
        data, loaded = self.recipe.data, self.job.loaded
        sides = (("training", self.job.train), ("held out", self.job.evaluation))
        return [(name, part, recount(part, data, loaded)) for name, side in sides for part in side.parts]

    @cached_property
    def documents(self) -> list[Document]:
        """At least three documents of the first steps, ragged, of at most ``PROBE_TOKENS`` tokens together."""
        stream, all_documents = self.trainer.stream, self.trainer.documents
        first = [all_documents[i] for t in range(len(stream)) for i in stream.step(t)]
        chosen: list[Document] = []
        for document in first:
            if sum(map(len, chosen)) + len(document) <= PROBE_TOKENS:
                chosen.append(document)
        if len(chosen) < 3:
            lengths = (PROBE_TOKENS // 2, PROBE_TOKENS // 3, PROBE_TOKENS // 6)
            chosen = [crop(d, n) for d, n in zip((first * 3)[:3], lengths, strict=True)]
        return chosen

    @cached_property
    def twin(self) -> CausalLM:
        """The model in float64 where it has room and can be called, else itself; in evaluation mode."""
        model = self.trainer.model
        need = 8 * sum(p.numel() for p in model.parameters()) + 16 * sum(p.numel() for p in model.trainable().values())
        if model.device.type == "cpu" and need < psutil.virtual_memory().available / 2:
            twin = copy.deepcopy(model).double().eval()
            twin.dtype = torch.float32  # of products: as the weights are, without autocast
            try:
                with torch.no_grad():
                    self.trainer.objective(twin, Batch.of(self.documents[:1]))
            except RuntimeError:  # an operation of this model has no float64; its own dtype is told with the bound
                return model.eval()
            return twin
        return model.eval()

    @property
    def exact(self) -> bool:
        """Whether the twin is in float64."""
        return next(self.twin.parameters()).dtype == torch.float64

    @property
    def bounds(self) -> tuple[float, float, str]:
        """Of a loss and of a gradient that should be equal, relative, and the dtype that they hold in."""
        if self.exact:
            return EXACT, EXACT, "float64"
        dtype = self.twin.dtype
        return LOSS_BOUND[dtype], GRADIENT_BOUND[dtype], str(dtype).removeprefix("torch.")


def _steps(trainer: Trainer, count: int) -> tuple[list[Record], float]:
    """Take ``count`` steps and stop at the boundary after the last: what they yielded, in how many seconds."""
    records = []
    started = time.perf_counter()
    for record in watch(trainer.steps()):
        records.append(record)
        trainer.stop = trainer.stop or trainer.step >= count
    return records, time.perf_counter() - started
