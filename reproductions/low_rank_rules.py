"""In equal memory, low-rank rules end below AdamW of full rank.

GaLore (Zhao et al. 2024, arXiv 2403.03507) and Fira (Chen et al. 2024, arXiv 2410.01623) are told to be as good as
AdamW, or better, on the same model in less memory. What a user has is a given memory, so here is what else fits in it.
Memory is what training keeps: weights, gradients (4 bytes each) and the optimizer's state; activations, which grow with
the batch, are left out. Two ways of full rank take no more than the low-rank rules do:

- a narrower network under AdamW, the widest that fits;
- the same network under AdamW in 8 bits (Dettmers et al. 2021, arXiv 2110.02861).

The rank is the smallest at which the low-rank state of a hidden matrix is no smaller than that of 8 bits. Embedding,
head and vectors are AdamW's in fp32 on all sides; beside a low-rank rule, at the rate that was tuned for AdamW.

Verdict: ``common`` says how; each rule against each of the two is a comparison. The same network under AdamW, which
takes more memory and which the papers compare with, is shown, and not judged.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from common import Comparison, end, language, main, optimizer, report, tuned

from truetune.optim import state_bytes
from truetune.schedules import SCHEDULES

CLAIM = "in equal memory GaLore and Fira end below AdamW of full rank (after arXiv 2403.03507 and 2410.01623)"
STEPS, WIDTH, FIRST = 120, 256, 0.004
LOW = {"rank": 44, "gap": 30}
HIDDEN = ("matrices",)


def run(seeds: Sequence[int], scale: float) -> str:
    steps = round(STEPS * scale)

    def ends(name: str, width: int, rest_rate: float | None = None, **options: int) -> tuple[float, list[float]]:
        """The tuned rate, and the losses that it leads to."""
        problem, schedule = language(width), SCHEDULES["linear"](steps)

        def loss(rate: float, seed: int) -> float:
            return end(
                problem, seed, lambda net: optimizer(name, net, rate, HIDDEN, rest_rate, **options), schedule, steps
            )

        peak = tuned(loss, FIRST)
        return peak, [loss(peak, seed) for seed in seeds]

    narrow = widest_within(memory("galore", WIDTH, **LOW))
    rate, full = ends("adamw", WIDTH)
    fitting = {f"adamw of width {narrow}": ends("adamw", narrow)[1], "adamw-8bit": ends("adamw-8bit", WIDTH)[1]}
    low = {name: ends(name, WIDTH, rate, **LOW)[1] for name in ("galore", "fira")}
    return report(
        CLAIM,
        [Comparison(f"{rule}, {other}", low[rule], fitting[other]) for rule in low for other in fitting],
        [Comparison(f"{rule}, adamw of width {WIDTH}", low[rule], full) for rule in low],
    )


def memory(name: str, width: int, **options: int) -> int:
    """Bytes of weights, gradients and state."""
    net = language(width).start(0)
    return 8 * sum(p.numel() for p in net.parameters()) + state_bytes(optimizer(name, net, 1.0, HIDDEN, **options))


def widest_within(limit: int) -> int:
    """The width of the largest network whose training under AdamW takes no more bytes than ``limit``."""
    return bisect_right(range(1, WIDTH + 1), limit, key=lambda width: memory("adamw", width))


if __name__ == "__main__":
    main(run)
