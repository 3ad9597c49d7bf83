"""Linear decay ends at or below cosine, cosine below a constant rate, and a refined schedule below linear.

Defazio et al. 2023, "When, why and how much? Adaptive learning rate scheduling by refinement", arXiv 2310.07831: of ten
problems linear decay is the best unrefined schedule of most, and refinement, from the gradient norms of an earlier run,
goes beyond it. Here: a convex problem by SGD (L2 norms) and a small network by AdamW (L1 norms), each schedule at its
own tuned peak. The norms are those of a linear run on a tuning seed.

Verdict: ``common`` says how. Each of the three steps, on both problems, is a comparison. The paper also counts a tie of
linear and cosine in its favour; here a tie is "can't be told".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from common import TUNING, Comparison, Problem, end, language, logistic, main, optimizer, report, train, tuned
from torch import nn

from truetune.schedules import SCHEDULES, Schedule, refined_from

CLAIM = "linear decay <= cosine <= constant, and refined < linear (Defazio et al. 2023, arXiv 2310.07831)"
STEPS = 400


def run(seeds: Sequence[int], scale: float) -> str:
    convex = compared(logistic(), "sgd", 1.0, "l2", seeds, round(STEPS * scale), momentum=0.0)
    network = compared(language(), "adamw", 0.004, "l1", seeds, round(STEPS * scale))
    return report(CLAIM, [*convex, *network])


def compared(
    problem: Problem,
    rule: str,
    first: float,
    norm: Literal["l1", "l2"],
    seeds: Sequence[int],
    steps: int,
    **options: Any,
) -> list[Comparison]:
    """The claim's three comparisons; ``first`` is the peak that each search begins at."""

    def loss(schedule: Schedule, rate: float, seed: int) -> float:
        return end(problem, seed, lambda net: optimizer(rule, net, rate, **options), schedule, steps)

    def norms(rate: float) -> list[float]:
        """Of the gradient at each step of a linear run."""
        net, batches, found = problem.start(TUNING[0]), problem.batches(TUNING[0], steps), []
        for _ in train(net, optimizer(rule, net, rate, **options), SCHEDULES["linear"](steps), batches):
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            found.append(nn.utils.get_total_norm(gradients, 1 if norm == "l1" else 2).item())
        return found

    schedules = {name: SCHEDULES[name](steps) for name in ("constant", "cosine", "linear")}
    peaks = {name: tuned(partial(loss, schedule), first) for name, schedule in schedules.items()}
    schedules["refined"] = refined_from(steps, norms(peaks["linear"]), norm)
    peaks["refined"] = tuned(partial(loss, schedules["refined"]), first)
    losses = {name: [loss(schedules[name], peaks[name], seed) for seed in seeds] for name in schedules}
    return [
        Comparison(f"{problem.name}: {lower}, {higher}", losses[lower], losses[higher])
        for lower, higher in (("linear", "cosine"), ("cosine", "constant"), ("refined", "linear"))
    ]


if __name__ == "__main__":
    main(run)
