"""REX ends below linear decay, whether the budget of steps is small or large.

Chen, Wolfe & Kyrillidis 2021, "REX: Revisiting budgeted training with an improved schedule", arXiv 2107.04197: of seven
schedules REX, (1 - p) / (1 - p / 2) at progress p, is the best one or close to it in low and high budgets alike. Here:
three budgets, each three times the one before, and both schedules at their own peak,
tuned anew for every budget.

Verdict: ``common`` says how; each budget is a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from common import Comparison, end, language, main, optimizer, report, tuned

from truetune.schedules import SCHEDULES

CLAIM = "REX ends below linear decay in every budget (Chen et al. 2021, arXiv 2107.04197)"
BUDGETS = (75, 225, 675)


def run(seeds: Sequence[int], scale: float) -> str:
    return report(CLAIM, [compared(seeds, round(budget * scale)) for budget in BUDGETS])


def compared(seeds: Sequence[int], steps: int) -> Comparison:
    problem = language()

    def loss(name: str, rate: float, seed: int) -> float:
        return end(problem, seed, lambda net: optimizer("adamw", net, rate), SCHEDULES[name](steps), steps)

    def ends(name: str) -> list[float]:
        peak = tuned(partial(loss, name), 0.004)
        return [loss(name, peak, seed) for seed in seeds]

    return Comparison(f"{steps} steps: rex, linear", ends("rex"), ends("linear"))


if __name__ == "__main__":
    main(run)
