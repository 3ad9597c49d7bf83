"""The training loop: a generator of records, and nothing that calls back.

Whoever wants to know iterates: ``for record in watch(trainer.steps())``. A step is a pure function of its
number (``data.stream``), the weights, the optimizer's state and torch's random state, so that a checkpoint
of these four continues bit for bit.

On a GPU nothing in a step waits for a value. What a step found is read after the next one has been handed over, so that
the GPU always has work; should it be no number, the GPU itself leaves the weights alone from that step on
(``Trainer._held``), until it has been read and the run ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from truetune.data.batch import Batch, Document
from truetune.data.prefixes import packed_by_prefix
from truetune.data.stream import Stream
from truetune.devices import Figures, peak_memory
from truetune.errors import UserError
from truetune.kernels.native.memory import release_memory
from truetune.kernels.op import is_on
from truetune.models.wrap import CausalLM
from truetune.objectives import Objective
from truetune.optim import AROUND, SHARED, averaged, averages, set_rate, steps_apart, take_averages, take_step
from truetune.schedules import Schedule, ends_of
from truetune.training.checkpoint import Checkpoints
from truetune.training.evaluate import Evaluator, Sampler
from truetune.training.failure import keep_failure, require_finite_state
from truetune.training.gradient import NonFinite, clip, differentiate, norms_of, not_finite, require_finite
from truetune.training.integrity import Fingerprint, fingerprints, integrity
from truetune.training.parts import PART, by_parts
from truetune.training.record import BEST_LOST, Alarm, Checks, Evaluation, Record, Samples, Saved, Step, Verdict

Found = TypeVar("Found")


class CheckFailed(UserError):
    """A check failed; the records up to it have been yielded."""


class Halted(BaseException):
    """``Trainer.halt`` ends what is under way. No Exception, so that nothing on its way out catches it."""


@dataclass(frozen=True)
class Taken:
    """A step that the device was given. figures: loss with the router loss, router loss (0 without), L2 and L1 norm of
    the gradient or its estimate; by_parts: whether weights moved within the backward pass; furthest: rate and planned
    rate of the group that is furthest from its plan."""

    step: int
    started: float
    random_state: Tensor
    batches: list[Batch]
    figures: Figures
    router: bool
    by_parts: bool
    furthest: tuple[float, float] = (0.0, 0.0)


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
    _flat: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _unread: Taken | None = field(default=None, repr=False)
    _held: Tensor | None = field(default=None, repr=False)
    _read: float = field(default=0.0, repr=False)
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
            try:
                taken = self._take()
            finally:  # whatever it raises: the step before has moved the weights
                yield from self._known()
            self._unread = taken
            if not self._runs_ahead:
                yield from self._known()
            self.owed = self._due()
            yield from self._boundary(moved=True)
        yield from self._known()
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
            release_memory()  # the checks compute as the model's author does, and need more than a step
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
            own = {key: t for key, t in state.get(p, {}).items() if not key.startswith((SHARED, AROUND))}
            moments = [t for key, t in own.items() if key != "step"]
            still = bool(self._flat.get(name)) or (bool(moments) and not any(t.any() for t in moments))
            if not own or (self.step == 1 and still):
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

    @property
    def _runs_ahead(self) -> bool:
        """Whether steps are read one late: on a GPU, with an optimizer that leaves out a step as torch's scaling of
        gradients asks for it. Others are waited for once a step, before they move a weight."""
        return self.model.device.type != "cpu" and getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def _take(self) -> Taken:
        """Hand a whole step to the device."""
        started = time.perf_counter()
        random_state = torch.get_rng_state()
        batches = self.batches(self.step)
        parameters = list(self.model.trainable().values())
        self.model.train()
        factor = self.schedule(self.step)
        set_rate(self.optimizer, factor)
        norms: list[tuple[Tensor, Tensor]] = []
        if apart := self._moves_by_parts(batches):
            with by_parts(parameters, lambda part: norms.append(self._move_part(part))):
                means = differentiate(self.optimizer, self.model, self.objective, batches)
        else:
            means = differentiate(self.optimizer, self.model, self.objective, batches)
            norms.append(self._look(parameters))
        router = torch.zeros_like(means.total) if means.router is None else means.router
        l2, l1 = (torch.stack(each) for each in zip(*norms, strict=True))
        norm = l2[0] if len(l2) == 1 else torch.linalg.vector_norm(l2)
        found = (means.total, router, norm, l1.sum())
        figures = Figures(torch.stack([figure.to(router.device) for figure in found]))  # without gradients on the host
        taken = Taken(self.step, started, random_state, batches, figures, means.router is not None, apart)
        if not self._runs_ahead:
            self._require_finite(taken)
        if not apart:
            clip(parameters, self.clip, norm)
            if self._runs_ahead:
                self._held = not_finite(means.total, norm, self._held)
            self._move(partial(take_step, self.optimizer, means.total))
            self.model.zero_grad(set_to_none=True)
        self.step += 1
        furthest = max(self.optimizer.param_groups, key=lambda g: (abs(g["lr"] - factor * g["peak"]), g["peak"]))
        return replace(taken, furthest=(furthest["lr"], factor * furthest["peak"]))

    def _moves_by_parts(self, batches: Sequence[Batch]) -> bool:
        """Whether weights move within the backward pass: where they may, and there is more than one part."""
        may = len(batches) == 1 and self.clip is None and steps_apart(self.optimizer) and is_on("step_by_parts")
        return may and sum(p.nbytes for p in self.model.trainable().values()) > PART

    def _move_part(self, part: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Norms of a part of the gradient, along which weights have moved, unless it or one before is no number."""
        l2, l1 = self._look(part)
        self._held = not_finite(l2, l2, self._held)
        if self._runs_ahead or not self._held:
            self._move(self.optimizer.step)
        self.model.zero_grad(set_to_none=True)
        return l2, l1

    def _look(self, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """L2 and L1 norm of their gradients; at the first step, also which of them are all zero."""
        if self.step == 0:
            seen = {n: p.grad for n, p in self.model.trainable().items() if p.grad is not None}
            self._flat |= {name: ~g.any() for name, g in seen.items()}
        return norms_of(self.optimizer, parameters)

    def _move(self, step: Callable[[], object]) -> None:
        """Take the optimizer's ``step``, which a GPU that runs ahead leaves out where ``_held`` says so."""
        if self._runs_ahead:
            self.optimizer.found_inf = self._held  # type: ignore[attr-defined]
        step()
        if self._runs_ahead:
            del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _require_finite(self, taken: Taken) -> None:
        """Raise NonFinite if the step found what is no number: with the weights as they were before it, but for those
        that moved within the backward pass before that was seen."""
        loss, _, l2, _ = taken.figures.read()
        try:
            require_finite(loss, l2, taken.step + 1, taken.by_parts)
        except NonFinite as error:
            self.step, self._held = taken.step, None
            raise NonFinite(f"{error}; {self._keep_failure(taken, loss, l2)}") from None

    def _keep_failure(self, taken: Taken, loss: float, norm: float) -> str:
        """Leave what is needed to see the failure again; the sentence that says where."""
        if not self.failures:
            return "lower the rate, or look at the documents of the step"
        rows = [self.documents[i].row for i in self.stream.step(self.step)]
        facts = {"step": self.step + 1, "loss": str(loss), "gradient_norm": str(norm), "rows": rows}
        before = self.state() if self.checkpoints and not taken.by_parts else None
        self.model.zero_grad(set_to_none=True)
        return keep_failure(self.failures, self.step, taken.batches, taken.random_state, facts, before)

    def _known(self) -> Iterator[Step]:
        """The record of the step that was not read yet, if there is one. Raises NonFinite."""
        taken, self._unread = self._unread, None
        if taken is None:
            return
        self._require_finite(taken)
        loss, router, l2, l1 = taken.figures.read()
        ended = time.perf_counter()
        # A step that was handed over while another ran began when that was known.
        seconds, self._read = ended - max(taken.started, self._read), ended
        batches = taken.batches
        computed = sum(len(b.tokens) for b in batches)
        rate, planned = taken.furthest
        gpu_memory, gpu_reserved = peak_memory(self.model.device)
        yield Step(
            step=taken.step + 1,
            loss=loss - router,
            router_loss=router if taken.router else None,
            rate=rate,
            planned=planned,
            gradient_norm=l2,
            gradient_norm_l1=l1,
            tokens=sum(b.token_count for b in batches),
            targets=sum(b.target_count for b in batches),
            documents=sum(len(b.lengths) for b in batches),
            micro_batches=len(batches),
            seconds=seconds,
            memory=self._process.memory_info().rss,
            gpu_memory=gpu_memory,
            gpu_reserved=gpu_reserved,
            tokens_per_second=computed / seconds,
            tokens_once=computed,
            targets_once=sum(len(b.learned) for b in batches),
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
        if self.owed:
            yield from self._known()
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
        yield from self._known()
        if self.checkpoints:
            tensors, state = self.state()
            require_finite_state(tensors, self.step)
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
