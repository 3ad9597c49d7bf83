"""WSD-S, one run with a decayed checkpoint at each of several budgets, ends below WSD and cyclic cosine.

Wen et al. 2024, "Understanding warmup-stable-decay learning rates: a river valley loss landscape perspective",
arXiv 2410.05192. All steps count: WSD throws the decay of every earlier budget away, so its run for a budget is
shorter by them, while WSD-S and cyclic cosine go on from the decayed weights at the peak. A WSD branch is the same run
as WSD of its length from the start, which is how it is made here. Decays fall to a tenth of the peak, over a tenth of
what lies between two budgets. Each method has one peak, tuned on its mean loss over the three budgets.

Verdict: ``common`` says how; each budget is a comparison with either, but the first, at which WSD-S and WSD are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from common import Comparison, end, language, main, optimizer, report, train, tuned

from truetune.schedules import SCHEDULES, Plan, Schedule

CLAIM = "at equal compute WSD-S ends below WSD and cyclic cosine at every budget (Wen et al. 2024, arXiv 2410.05192)"
BETWEEN, BUDGETS, MINIMUM = 200, 3, 0.1
"""Steps between two budgets; how many there are; the share of the peak that all fall to."""


def run(seeds: Sequence[int], scale: float) -> str:
    between, problem = round(BETWEEN * scale), language()
    total, decay = BUDGETS * between, max(1, between // 10)
    budgets = range(between, total + 1, between)
    plan = Plan(rate=1.0, tokens=range(problem.batch, problem.batch * (total + 1), problem.batch), batch=problem.batch)

    def one_run(schedule: Schedule, rate: float, seed: int) -> list[float]:
        """The loss at every budget of one run through all of them."""
        net = problem.start(seed)
        updates = train(net, optimizer("adamw", net, rate), schedule, problem.batches(seed, total))
        return [problem.loss(net) for update in updates if update in budgets]

    def branches(rate: float, seed: int) -> list[float]:
        """The same of WSD, a run for each, less the decays of those before."""
        lengths = [budget - earlier * decay for earlier, budget in enumerate(budgets)]
        falls = {n: SCHEDULES["wsd"](n, decay=float(decay), shape="inverse", minimum=MINIMUM) for n in lengths}
        return [end(problem, seed, lambda net: optimizer("adamw", net, rate), falls[n], n) for n in lengths]

    wsd_s = SCHEDULES["wsd-s"](total, plan=plan, budgets=tuple(budgets), decay=float(decay), minimum=MINIMUM)
    cyclic = SCHEDULES["cosine-restarts"](total, cycles=BUDGETS, minimum=MINIMUM)
    losses = {
        "wsd-s": by_budget(partial(one_run, wsd_s), seeds),
        "wsd": by_budget(branches, seeds),
        "cyclic": by_budget(partial(one_run, cyclic), seeds),
    }
    comparisons = [
        Comparison(f"{budget} steps: wsd-s, {other}", losses["wsd-s"][place], losses[other][place])
        for other in ("wsd", "cyclic")
        for place, budget in enumerate(budgets)
        if (place, other) != (0, "wsd")
    ]
    return report(CLAIM, comparisons)


def by_budget(losses: Callable[[float, int], list[float]], seeds: Sequence[int]) -> list[tuple[float, ...]]:
    """For each budget, the losses of all seeds at the peak that is best over all budgets."""
    peak = tuned(lambda rate, seed: fmean(losses(rate, seed)), 0.004)
    return list(zip(*(losses(peak, seed) for seed in seeds), strict=True))


if __name__ == "__main__":
    main(run)
