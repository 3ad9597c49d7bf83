"""Promises about whole runs: the same seed gives the same bits, a resume is none but the run, and it really trains."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from truetune import run
from truetune.checks.preflight import crop, restored
from truetune.data.batch import Batch
from truetune.facts import Facts
from truetune.models.adapt import START
from truetune.optim import set_rate, take_step
from truetune.promises.ground import STEPS, Ground, shortened
from truetune.report.folder import Run
from truetune.training.checkpoint import Checkpoints
from truetune.training.gradient import clip, differentiate, norm_of
from truetune.training.integrity import fingerprints
from truetune.training.record import Step, Verdict
from truetune.training.trainer import Trainer

FIT_STEPS = 40
FIT_TOKENS = 64
FIT_RATES = (1.0, 0.1, 10.0, 100.0)
"""Multiples of the recipe's rate that a single batch is learned with until one suffices: a rate may be meant for
thousands of steps, or for batches that are less alike."""
FIT, FIT_AT_LEAST = 0.9, 0.999
"""Share of its first loss that the batch must fall below; where it does not, it must below the latter, and by half of
what plain AdamW gains. What frozen parts allow differs: under a random head an adapter stops at three quarters, and at
99 % where logits are scaled down; all weights together reach a thousandth."""


def resume(ground: Ground) -> Verdict:
    """Killed after a random step and resumed = straight through, bit for bit."""
    place = ground.spare / "resumed"
    shutil.copytree(ground.folder, place, ignore=shutil.ignore_patterns("checkpoints", "adapter", "merged", "model"))
    kept = Checkpoints(ground.folder / "checkpoints").path(ground.stopped)
    shutil.copytree(kept, place / "checkpoints" / kept.name, copy_function=os.link)
    Facts.read(place).write(status="running", finished=None)  # as a killed process leaves it
    run.train(shortened(ground.asked, place, ground.stopped), resume=place, quiet=True)
    faults = _unlike(ground.folder / "checkpoints", place / "checkpoints", STEPS)
    straight, again = (_losses(Run.read(folder)) for folder in (ground.folder, place))
    if straight != again:
        faults.append(f"losses are {again}, straight {straight}")
    figure = f"after step {ground.stopped} of {STEPS}: weights, optimizer, random state and every loss are bit-equal"
    return Verdict("", not faults, "; ".join(faults) or figure, "a resume is not the run; please report the recipe")


def determinism(ground: Ground) -> Verdict:
    """The same seed gives the same bits on this machine."""
    kept = Checkpoints(ground.folder / "checkpoints")
    tensors = ground.trainer.state()[0] | {"random": ground.random}
    saved, _ = kept.load(ground.stopped)
    faults = [f"{n} differs" for n in tensors if not _same(dict(tensors[n]), saved[n])]
    straight = _losses(ground.run)[: ground.stopped]
    again = [r.loss for r in ground.records if isinstance(r, Step)]
    if straight != again:
        faults.append(f"losses are {again}, then {straight}")
    figure = f"two runs of {ground.stopped} steps, each assembled from nothing: bit-equal"
    return Verdict("", not faults, "; ".join(faults) or figure, "look for a random choice that has no seed")


def training(ground: Ground) -> Verdict:
    """Every trained tensor moves, every frozen one stays; one batch can be learned; at rate zero nothing moves."""
    end = [v for v in ground.run.facts["verdicts"] if "moved" in v["name"]]
    faults = [f"{v['name']}: {v['figure']}" for v in end if not v["passed"]]
    faults += [] if len(end) == 2 else ["the run did not tell what it moved"]
    faults += _wrong_rates(ground)
    trainer = ground.trainer
    with restored(trainer):
        moved = _moved_at_rate_zero(trainer)
    faults += [f"{moved} tensors moved at rate zero"] if moved else []
    batch = Batch.of([crop(trainer.documents[trainer.stream.step(0)[0]], FIT_TOKENS)], trainer.model.device)
    first, lowest, factor = _fit(trainer, batch)
    learned = f"one batch: {first:.3f} to {lowest:.3f} in {FIT_STEPS} steps at {factor:g} x the rate"
    if not lowest < FIT * first:
        _, plain = _learned(trainer, batch, factor, plain=True)
        learned += f", plain AdamW to {plain:.3f}"
        if not first - lowest > max((1 - FIT_AT_LEAST) * first, (first - plain) / 2):
            faults.append(f"one batch can't be learned ({learned})")
    names = ", ".join(f"{v['name']}: {v['figure']}" for v in end)
    figure = f"{names}; at rate zero 0; {learned}"
    return Verdict("", not faults, "; ".join(faults) or figure, "this run does not train; see the tensors named")


def _wrong_rates(ground: Ground) -> list[str]:
    """Is all trained that the recipe says, in one group each, and does B learn at its multiple of A's rate?"""
    model, adapter, rate = ground.trainer.model, ground.recipe.adapter, ground.recipe.optimizer.rate
    trained, lora = model.trainable(), adapter.method == "lora"
    wanted = {n for n, _ in model.model.named_parameters() if not lora or _of_adapter(n)}
    if forgotten := sorted(wanted - trained.keys()):
        return [f"{forgotten[0]} is not trained"]
    groups = ground.trainer.optimizer.param_groups
    peaks = {id(p): g["peak"] for g in groups for p in g["params"]}
    if sorted(peaks) != sorted(map(id, trained.values())) or sum(len(g["params"]) for g in groups) != len(trained):
        return ["the optimizer does not hold each trained tensor once"]
    times = {"lora_A": 1.0, "lora_B": adapter.lora_plus_ratio, "modules_to_save": 1.0}
    left = {id(p) for g in groups if "_rest" in g["name"] for p in g["params"]}
    own = {n: (ground.recipe.optimizer.rest_rate or rate) if id(p) in left else rate for n, p in trained.items()}
    wrong = [n for n, p in trained.items() for part, w in times.items() if part in n and peaks[id(p)] != own[n] * w]
    wrong = wrong if lora else []
    return [f"{wrong[0]} has the peak rate {peaks[id(trained[wrong[0]])]:g}"] if wrong else []


def _of_adapter(name: str) -> bool:
    """Whether an adapter trains this parameter: all that it has, but where PiSSA started."""
    return "modules_to_save" in name or ("lora_" in name and f".{START}." not in name)


def _moved_at_rate_zero(trainer: Trainer) -> int:
    model = trainer.model
    before = fingerprints(model.model)
    set_rate(trainer.optimizer, 0.0)
    loss = differentiate(trainer.optimizer, model, trainer.objective, trainer.batches(0)[:1]).total
    take_step(trainer.optimizer, loss)
    after = fingerprints(model.model)
    return sum(after[name] != before[name] for name in before)


def _fit(trainer: Trainer, batch: Batch) -> tuple[float, float, float]:
    """Learn one small batch by heart, if need be at another rate: (first loss, lowest, multiple of the rate)."""
    best = (0.0, float("inf"), 0.0)
    for factor in FIT_RATES:
        first, lowest = _learned(trainer, batch, factor)
        best = min(best, (first, lowest, factor), key=lambda found: found[1])
        if lowest < FIT * first:
            break
    return best


def _learned(trainer: Trainer, batch: Batch, factor: float, plain: bool = False) -> tuple[float, float]:
    """First and lowest loss of the batch while it is learned; plain: with torch's AdamW for the run's own rule."""
    losses: list[float] = []
    with restored(trainer):
        trainer.model.eval()
        groups = [{key: g[key] for key in ("params", "lr", "peak")} for g in trainer.optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0) if plain else trainer.optimizer
        set_rate(optimizer, factor)
        while len(losses) <= FIT_STEPS:
            trainer.model.zero_grad(set_to_none=True)
            loss = differentiate(optimizer, trainer.model, trainer.objective, [batch]).total
            losses.append(float(loss))
            parameters = list(trainer.model.trainable().values())
            clip(parameters, trainer.clip, norm_of(parameters))
            take_step(optimizer, loss)
    return losses[0], min(losses)


def speed(ground: Ground) -> Verdict:
    """Useful tokens per second, counted once more from the documents, and timed by a second clock."""
    trainer, steps = ground.trainer, ground.run.steps
    faults = [f"withheld, since {ground.failed[0]} does not hold"] if ground.failed else []
    for step in steps:
        documents = [trainer.documents[i] for i in trainer.stream.step(step["step"] - 1)]
        counted = (sum(map(len, documents)), sum(d.target_count for d in documents))
        if counted != (step["tokens"], step["targets"]):
            faults.append(f"step {step['step']} claims {step['tokens']} tokens, {step['targets']} targets of {counted}")
        computed = sum(len(b.tokens) for b in trainer.batches(step["step"] - 1))
        if computed != step["tokens_once"]:
            faults.append(f"step {step['step']} claims {step['tokens_once']} tokens once, and computed {computed}")
    claimed = sum(r.seconds for r in ground.records if isinstance(r, Step))
    if not 0.5 * ground.seconds < claimed <= ground.seconds:
        faults.append(f"the steps claim {claimed:.2f} s where another clock measured {ground.seconds:.2f} s")
    rates = [s["tokens_once"] / s["seconds"] for s in steps]
    targets = median(s["targets_once"] / s["seconds"] for s in steps)
    figure = (
        f"{median(rates):,.0f} useful tokens/s (median of {len(rates)} steps, {min(rates):,.0f} to {max(rates):,.0f}), "
        f"{targets:,.0f} targets/s; every token counted once"
    )
    return Verdict("", not faults, "; ".join(faults) or figure, "don't quote a speed of this run")


def _losses(done: Run) -> list[float]:
    return [s["loss"] for s in done.steps]


def _unlike(a: Path, b: Path, step: int) -> list[str]:
    """What differs between two checkpoints of ``step``."""
    one, two = (Checkpoints(folder).load(step)[0] for folder in (a, b))
    return [f"{name} differs" for name in one if not _same(one[name], two[name])]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)
