"""The training loop: a generator of records, and nothing that calls back.

Whoever wants to know iterates: ``for record in watch(trainer.steps())``. A step is a pure function of its
number (``data.stream``), the weights, the optimizer's state and torch's random state, so that a checkpoint
of these four continues bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from truetune.data.batch import IGNORE, Batch, Document
from truetune.data.prefixes import packed_by_prefix
from truetune.data.stream import Stream
from truetune.errors import UserError
from truetune.models.wrap import CausalLM
from truetune.objectives import Objective
from truetune.optim import AROUND, SHARED, averaged, averages, set_rate, take_averages, take_step
from truetune.schedules import Schedule, ends_of
from truetune.training.checkpoint import Checkpoints, atomic_folder
from truetune.training.evaluate import Evaluator, Sampler
from truetune.training.gradient import NonFinite, accumulate, clip, l1_of, norm_of, require_finite
from truetune.training.integrity import Fingerprint, fingerprints, integrity
from truetune.training.patience import patiently
from truetune.training.record import BEST_LOST, Alarm, Checks, Evaluation, Record, Samples, Saved, Step, Verdict

Found = TypeVar("Found")


class CheckFailed(UserError):
    """A check failed; the records up to it have been yielded."""


class Halted(BaseException):
    """``Trainer.halt`` ends what is under way. No Exception, so that nothing on its way out catches it."""


@dataclass
class Trainer:
    """One run. All parts are plain; ``truetune.assemble`` builds them from a recipe.

    schedule: step (from 0) -> factor on the peak rates of the optimizer's groups. Where it is at an end (``Staged``)
              the run is evaluated and saved, and that checkpoint stays.
    stream:   which documents make up which step.
    shares:   whether documents of a micro-batch that begin alike share the rows of that, where it pays.
    preflight: checks made before the first step, or None.
    evaluate_every, save_every: steps; the last step is always evaluated and saved. save_minutes: the first step that
              ends so long after the last save, or the start, is saved as well.
    keep_best: end with the weights of the best evaluation.
    step:     steps completed. stop: set it to end at the next step boundary; ``halt`` also gives up an evaluation.
    owed:     kinds of the records that are still due at this step: a stop leaves them to the run that goes on.
    complete: whether all was done, the last look included.
    start:    fingerprints of the weights that the run began with.
    """

    model: CausalLM
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    documents: Sequence[Document]
    stream: Stream
    shares: bool = False
    clip: float | None = 1.0
    preflight: Callable[[Trainer], Checks] | None = None
    evaluator: Evaluator | None = None
    sampler: Sampler | None = None
    evaluate_every: int | None = None
    checkpoints: Checkpoints | None = None
    save_every: int | None = None
    save_minutes: float = math.inf
    keep_best: bool = False
    failures: Path | None = None
    step: int = 0
    stop: bool = False
    owed: list[str] = field(default_factory=list)
    complete: bool = False
    best: Evaluation | None = None
    start: dict[str, Fingerprint] = field(default_factory=dict, repr=False)
    _idle: bool = False
    _flat: set[str] = field(default_factory=set, repr=False)
    _saved: float = field(default_factory=time.monotonic, repr=False)
    _process: psutil.Process = field(default_factory=psutil.Process, repr=False)

    def steps(self) -> Iterator[Record]:
        """Run from ``step`` to the end of the stream, yielding what happens.

        Raises CheckFailed when a check fails, NonFinite before a weight could take a NaN.
        """
        if not (yield from self.check()):
            return
        self.start = self.start or fingerprints(self.model.model)
        first, looks_again = self.step, bool(self.owed)
        if self.step == 0:
            self.owed = self._due()
        yield from self._boundary()
        while self.step < len(self.stream) and not self.stop:
            yield self._step()
            self.owed = self._due()
            yield from self._boundary(moved=True)
        if self.step < len(self.stream) or self.owed:
            yield from self._save("interrupted")
            return
        if self.step > first or looks_again:
            yield from self._require(Checks(self.step, tuple(self._integrity())))
        if lost := self.take_best():
            yield Alarm(self.step, BEST_LOST, lost, voids=False)
        if self.sampler and (samples := self._unless_halted(partial(self.sampler, self.model, self.step))):
            yield samples
        self.complete = not self.stop

    def halt(self) -> None:
        """End at the next step boundary, and at once what changes no weight: an evaluation, answers, the preflight.

        For handlers of signals, which run in the midst of it.
        """
        self.stop = True
        if self._idle:
            raise Halted

    def check(self) -> Generator[Record, None, bool]:
        """The preflight alone; whether it came to its end. Raises CheckFailed."""
        if self.preflight:
            checks = self._unless_halted(partial(self.preflight, self))
            if checks is None:
                return False
            yield from self._require(checks)
        return True

    def _unless_halted(self, look: Callable[[], Found]) -> Found | None:
        if self.stop:
            return None
        self._idle = True
        try:
            return look()
        except Halted:
            return None
        finally:
            self._idle = False

    def _require(self, checks: Checks) -> Iterator[Record]:
        yield checks
        for verdict in checks.verdicts:
            if not verdict.passed:
                raise CheckFailed(f"check failed: {verdict.name}: {verdict.figure}; {verdict.advice}")

    def _integrity(self) -> list[Verdict]:
        """What the whole run moved. An expert that was never routed to has no optimizer state, and may stay; so may,
        after a single step, what had no gradient yet: LoRA's A while B is zero."""
        state, idle = self.optimizer.state, set()
        for name, p in self.model.trainable().items():
            own = state.get(p, {}).items()
            moments = [t for key, t in own if key != "step" and not key.startswith((SHARED, AROUND))]
            if not moments or (self.step == 1 and (name in self._flat or not any(t.any() for t in moments))):
                idle.add(name)
        return integrity(self.model.model, self.start, idle)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``, in order."""
        packs, shared = self.stream.micro_batches(step), False
        if self.shares:
            members = self.stream.step(step)
            by_prefix = packed_by_prefix([self.documents[i] for i in members], self.stream.tokens_per_micro_batch)
            if by_prefix is not None:
                packs, shared = [[members[i] for i in pack] for pack in by_prefix], True
        return [Batch.of([self.documents[i] for i in pack], self.model.device, shared) for pack in packs]

    def _step(self) -> Step:
        started = time.perf_counter()
        random_state = torch.get_rng_state()
        batches = self.batches(self.step)
        parameters = list(self.model.trainable().values())
        self.model.train()
        means = accumulate(self.model, self.objective, batches)
        if self.step == 0:
            self._flat = {n for n, p in self.model.trainable().items() if p.grad is not None and not p.grad.any()}
        loss, router = float(means), None if means.router is None else float(means.router)
        norm = norm_of(parameters)
        l2, l1 = torch.stack([norm, l1_of(parameters)]).tolist()  # at once, since a GPU is waited for
        try:
            require_finite(loss, l2, self.step + 1)
        except NonFinite as error:
            raise NonFinite(f"{error}; {self._bundle(batches, loss, l2, random_state)}") from None
        clip(parameters, self.clip, norm)
        factor = self.schedule(self.step)
        set_rate(self.optimizer, factor)
        take_step(self.optimizer, means.total)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        furthest = max(self.optimizer.param_groups, key=lambda g: (abs(g["lr"] - factor * g["peak"]), g["peak"]))
        seconds = time.perf_counter() - started
        computed = sum(len(b.tokens) for b in batches)
        return Step(
            step=self.step,
            loss=loss - (router or 0.0),
            router_loss=router,
            rate=furthest["lr"],
            planned=factor * furthest["peak"],
            gradient_norm=l2,
            gradient_norm_l1=l1,
            tokens=sum(b.token_count for b in batches),
            targets=sum(len(b.targets) for b in batches),
            documents=sum(len(b.lengths) for b in batches),
            micro_batches=len(batches),
            seconds=seconds,
            memory=self._process.memory_info().rss,
            tokens_per_second=computed / seconds,
            tokens_once=computed,
            targets_once=sum(int((b.labels != IGNORE).sum()) for b in batches),
        )

    def _due(self) -> list[str]:
        """What is to be looked at after this step, as kinds of records."""
        last = self.step == len(self.stream)
        ends = (0, *ends_of(self.schedule))
        if not (last or self.step in ends or (self.evaluate_every and self.step % self.evaluate_every == 0)):
            return []
        return ["evaluation"] * bool(self.evaluator) + ["samples"] * bool(self.sampler and not last)

    def _evaluate(self) -> Evaluation:
        assert self.evaluator
        evaluation = self.evaluator(self.model, self.step)
        if self.step and evaluation.loss < (self.best.loss if self.best else math.inf):
            evaluation = self.best = replace(evaluation, best=True)
        return evaluation

    def _boundary(self, moved: bool = False) -> Iterator[Record]:
        """Look at what is owed, then save what is due; moved: whether a step was just taken."""
        looked = bool(self.owed) and self.step > 0
        looks: dict[str, Callable[[], Record]] = {
            "evaluation": self._evaluate,
            "samples": lambda: self.sampler(self.model, self.step) if self.sampler else Samples(self.step, ()),
        }
        while self.owed:
            with averaged(self.optimizer):
                record = self._unless_halted(looks[self.owed[0]])
            if record is None:
                return
            self.owed = self.owed[1:]
            yield record
        if not (moved or looked):
            return
        if self.step == len(self.stream):
            yield from self._save("end")
        elif self.step in ends_of(self.schedule):
            yield from self._save("budget")
        elif self.save_every and self.step % self.save_every == 0:
            yield from self._save("schedule")
        elif time.monotonic() - self._saved >= 60 * self.save_minutes:
            yield from self._save("time")
        elif looked and self.keep_best and self.best and self.best.step == self.step:
            yield from self._save("best")

    def _save(self, reason: str) -> Iterator[Record]:
        if self.checkpoints:
            tensors, state = self.state()
            _require_finite(tensors, self.step)
            spare = {*ends_of(self.schedule), *([self.best.step] if self.best and self.keep_best else ())}
            yield Saved(self.step, str(self.checkpoints.save(self.step, tensors, state, spare)), reason)
        self._saved = time.monotonic()

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything that the rest of the run depends on: tensors by file, and plain values."""
        names: dict[Tensor, str] = {p: n for n, p in self.model.trainable().items()}
        state = self.optimizer.state
        moments = {f"{name}/{key}": t for p, name in names.items() for key, t in state[p].items()}
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        best = None if self.best is None else {"step": self.best.step, "loss": self.best.loss}
        tensors = {"weights": dict(self.model.kept()), "optimizer": moments, "random": random}
        if means := averages(self.optimizer):
            tensors["averages"] = {names[p]: mean for p, mean in means.items()}
        return tensors, {"step": self.step, "best": best, "start": self.start, "owed": self.owed}

    def resume(self, step: int) -> None:
        """Take up the checkpoint of ``step``. Raises UserError when it does not fit this run."""
        if not self.checkpoints:
            raise UserError("this trainer keeps no checkpoints; give it some to resume from")
        tensors, state = self.checkpoints.load(step)
        self._load_weights(tensors["weights"])
        parameters = self.model.trainable()
        self.optimizer.state.clear()
        for key, tensor in tensors["optimizer"].items():
            name, _, part = key.rpartition("/")
            self.optimizer.state[parameters[name]][part] = tensor.to(parameters[name].device)
        torch.set_rng_state(tensors["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in tensors["random"]:
            torch.cuda.set_rng_state(tensors["random"]["cuda"])
        self.step, self.owed = state["step"], list(state.get("owed", ()))
        self.start = {name: (h, s, tuple(rest)) for name, (h, s, rest) in state["start"].items()}
        if state["best"]:
            best = state["best"]
            self.best = Evaluation(best["step"], best["loss"], 0.0, 0.0, 0, 0, 0.0, best=True)

    def take_averages(self) -> None:
        """End with the weights that the optimizer keeps in place of those that it trains, where it does."""
        take_averages(self.optimizer)

    def take_best(self) -> str | None:
        """Load the weights of the best evaluation, if those are to be kept; why not, where they are damaged."""
        self.take_averages()
        if not (self.keep_best and self.best and self.best.step != self.step and self.checkpoints):
            return None
        try:
            tensors = self.checkpoints.load(self.best.step)[0]
        except UserError as error:
            return f"the weights of the best evaluation are lost ({error}); those of step {self.step} stay instead"
        self._load_weights(tensors["weights"] | tensors.get("averages", {}))
        return None

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        parameters = self.model.kept()
        for name in sorted(parameters.keys() ^ weights.keys()):
            raise UserError(f"the checkpoint and the recipe train different tensors ({name}); resume with its recipe")
        for name, p in parameters.items():
            if p.shape != weights[name].shape:
                raise UserError(f"{name} has another shape in the checkpoint; resume with its recipe")
            p.copy_(weights[name])

    def _bundle(self, batches: list[Batch], loss: float, norm: float, random_state: Tensor) -> str:
        """Leave what is needed to see the failure again; the sentence that says where."""
        if not self.failures:
            return "lower the rate, or look at the documents of the step"
        folder = self.failures / f"failure-step-{self.step + 1}"
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
        rows = [self.documents[i].row for i in self.stream.step(self.step)]
        facts = {"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm), "rows": rows}
        weights, state = self.state()
        self.model.zero_grad(set_to_none=True)

        def write() -> None:
            with atomic_folder(folder) as scratch:
                save_file(tensors, scratch / "batch.safetensors")
                (scratch / "step.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
                if self.checkpoints:
                    Checkpoints(scratch, keep=1).save(self.step, weights, state)

        try:
            patiently(write, folder)
        except OSError as error:
            return f"what shows it again could not be written to {folder} ({error.strerror}); lower the rate"
        return f"batch, random state and weights are in {folder}; lower the rate, or look at these rows"


def _require_finite(tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    """Raise NonFinite if a checkpoint would hold what is no number: it would take the place of a good one."""
    for kind in ("weights", "optimizer"):
        for name, tensor in tensors[kind].items():
            if not torch.isfinite(tensor).all():
                raise NonFinite(f"{name} is not finite after step {step}, so it was not saved; lower the rate")
