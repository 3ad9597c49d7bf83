"""What the reproductions share: three small real problems, one loop on the public API, and how a verdict is reached.

Every side of a comparison has its rate tuned by the same search (``tuned``) on ``TUNING`` seeds, and is ranked on other
seeds, 0, 1, ... A seed decides the first weights and the order of the data, so the losses of two sides are compared
seed by seed. With d the mean of their differences and e its standard error, a comparison speaks for the claim where
d < -3 e and against it where d > 3 e (of five seeds, one in 25 does so by chance). A claim holds if all of its
comparisons speak for it, does not hold if any speaks against it, and else can't be told at this scale.

Left out: regularisation, rows for tuning alone, and in e what the tuning itself leaves to chance. What is compared is
how fast the rules optimize.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from truetune.data import python_docs
from truetune.optim import KINDS, OPTIMIZERS, averaged, kinds_of, parameter_groups, set_rate, take_step
from truetune.schedules import Schedule

Make = Callable[[nn.Sequential], torch.optim.Optimizer]

TUNING = (1000, 1001)
CERTAIN = 3.0
"""Standard errors that a difference must have."""
WORST = 100.0
"""Loss, in nats, of a run that ends in none or in a larger one."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "can't be told at this scale"


# Problems.


@dataclass(frozen=True)
class Problem:
    """network: makes one with fresh weights, whose last module is its head. rows: inputs and classes to train on.
    judged: those whose mean loss, in nats, is a run's result. batch: rows of a step.
    """

    name: str
    network: Callable[[], nn.Sequential]
    rows: tuple[Tensor, Tensor]
    judged: tuple[Tensor, Tensor]
    batch: int

    def start(self, seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return self.network()

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.rows[0]), (self.batch,), generator=order)
            yield self.rows[0][chosen], self.rows[1][chosen]

    @torch.no_grad()
    def loss(self, net: nn.Module) -> float:
        found = cross_entropy(net(self.judged[0]), self.judged[1]).item()
        return min(found, WORST) if math.isfinite(found) else WORST


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scans of 1,797 digits, 64 pixels each, of which a quarter is held out."""
    from sklearn.datasets import load_digits

    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x, held_out = x.float() / 16, torch.arange(len(x)) % 4 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def logistic() -> Problem:
    """A convex one: logistic regression on digits, judged by the rows that it is trained on."""
    rows, _ = digits()
    return Problem("logistic regression", lambda: nn.Sequential(nn.Linear(64, 10)), rows, rows, 16)


def perceptron(width: int = 64) -> Problem:
    """Two hidden layers on digits, judged by those held out."""

    def network() -> nn.Sequential:
        hidden = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    return Problem("perceptron", network, *digits(), 32)


@cache
def characters() -> tuple[int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How many there are, and windows of 16 with the character that follows; modules are held out as in recipes."""
    texts = ["\n".join(row["messages"][1]["content"] for row in python_docs.rows(split)) for split in ("train", "test")]
    known = {character: place for place, character in enumerate(sorted(set(texts[0])), 1)}

    def windows(text: str) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([known.get(character, 0) for character in text]).unfold(0, 17, 1)
        return rows[:, :16], rows[:, 16]

    x, y = windows(texts[1])
    return len(known) + 1, windows(texts[0]), (x[::8], y[::8])


def language(width: int = 128) -> Problem:
    """A language model of 16 characters with two hidden layers, on docstrings, judged by those of other modules."""
    count, rows, judged = characters()

    def network() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Embedding(count, 16), nn.Flatten()),
            *(nn.Linear(256, width), nn.GELU(), nn.Linear(width, width), nn.GELU()),
            nn.Linear(width, count),
        )

    return Problem("characters", network, rows, judged, 128)


# One run, on the public API.


def optimizer(
    name: str,
    net: nn.Sequential,
    rate: float,
    takes: Sequence[str] = (),
    rest_rate: float | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """The rule ``name`` for the kinds of weights that it ``takes``, its own by default; AdamW for the rest."""
    kinds = kinds_of(net, net[-1].get_parameter("weight"))
    taken = takes or getattr(OPTIMIZERS[name], "takes", KINDS)
    rest = [parameter for parameter, kind in kinds.items() if kind not in taken]
    groups = parameter_groups(net.named_parameters(), rate, rest=rest, rest_rate=rest_rate)
    return OPTIMIZERS[name](groups, rate, **options)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[int]:
    """The number of updates made, after each; the gradients are still there."""
    for step, (inputs, classes) in enumerate(batches):
        optimizer.zero_grad()
        loss = cross_entropy(net(inputs), classes)
        loss.backward()
        set_rate(optimizer, schedule(step))
        take_step(optimizer, loss)
        yield step + 1


def end(problem: Problem, seed: int, make: Make, schedule: Schedule, steps: int) -> float:
    """The loss of the weights that a run would keep."""
    net = problem.start(seed)
    rule = make(net)
    for _ in train(net, rule, schedule, problem.batches(seed, steps)):
        pass
    with averaged(rule):
        return problem.loss(net)


def tuned(loss: Callable[[float, int], float], first: float) -> float:
    """The rate reached from ``first`` by going to the better neighbour until there is none, by factors of 2 and then of
    its square root: at no edge of a grid.

    loss: (rate, seed) -> what is to be low; its mean over ``TUNING`` is.
    """

    @cache
    def mean(power: float) -> float:
        return fmean(loss(first * 2**power, seed) for seed in TUNING)

    power = 0.0
    for far in (1.0, 0.5):
        while (best := min((power, power - far, power + far), key=mean)) != power:
            power = best
    return first * 2**power


# The verdict.


@dataclass(frozen=True)
class Comparison:
    """Results of the same seeds: of what a claim says is lower, and of what it says is higher."""

    name: str
    lower: Sequence[float]
    higher: Sequence[float]

    def difference(self) -> tuple[float, float]:
        """Its mean, and the standard error of that."""
        differences = [a - b for a, b in zip(self.lower, self.higher, strict=True)]
        return fmean(differences), stdev(differences) / len(differences) ** 0.5

    def speaks(self) -> int:
        """1 for the claim, -1 against it, 0 neither."""
        mean, error = self.difference()
        return (mean < -CERTAIN * error) - (mean > CERTAIN * error)


def verdict(spoken: Sequence[int]) -> str:
    """What follows for a claim from what each of its comparisons says."""
    return HOLDS if min(spoken) > 0 else FAILS if min(spoken) < 0 else OPEN


def report(claim: str, comparisons: Sequence[Comparison], beside: Sequence[Comparison] = ()) -> str:
    """Print claim, figures and verdict, which is returned. ``beside``: comparisons that are shown and not judged."""
    print(f"claim: {claim}\n")
    for c in (*comparisons, *beside):
        (mean, error), says = c.difference(), {1: "yes", 0: "open", -1: "no"}[c.speaks()]
        sides = f"{fmean(c.lower):.4f} < {fmean(c.higher):.4f}"
        figure = f"{mean:+.4f} ± {error:.4f} ({len(c.lower)} seeds)"
        print(f"  {c.name:<42} {sides:>18}?  {figure}  {says}{' (not judged)' if c in beside else ''}")
    found = verdict([c.speaks() for c in comparisons])
    print(f"\nverdict: {found}")
    return found


def main(run: Callable[[Sequence[int], float], str]) -> None:
    """The command line of all: ``run`` is given the seeds, and the factor of all numbers of steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5, help="seeds that the verdict is reached on, at least 2")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all numbers of steps")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("one seed has no spread; give --seeds 2 or more")
    torch.set_num_threads(1)
    run(range(given.seeds), given.scale)
    print(f"{sum(os.times()[:4]):.0f} CPU-seconds")
