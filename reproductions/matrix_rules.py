"""SOAP and Muon reach AdamW's loss in 1.4 times fewer steps, each at its tuned rate.

Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam", arXiv 2409.11321, report over 40 % fewer steps
than AdamW; Wen et al. 2025, "Fantastic pretraining optimizers and where to find them", arXiv 2509.02046, 1.4 times for
matrix rules over a tuned AdamW at 0.1 B parameters, and less above. Here the smaller of these figures is tried, at
60,000 parameters: AdamW makes all steps, its rivals only 5 of 7. What they leave to AdamW (embedding, head, vectors)
learns at the rate that was tuned for AdamW. All have a warm-up of a tenth and a linear decay. Steps are counted, not
seconds.

Verdict: ``common`` says how; each rule is a comparison. What as many steps would give is printed, and not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from common import Comparison, end, language, main, optimizer, report, tuned

from truetune.schedules import SCHEDULES, with_warmup

CLAIM = "SOAP and Muon end below AdamW in 5/7 of its steps (arXiv 2409.11321, 2509.02046)"
STEPS, FEWER, FIRST = 350, 5 / 7, 0.008


def run(seeds: Sequence[int], scale: float) -> str:
    problem, steps = language(), round(STEPS * scale)
    fewer = round(steps * FEWER)

    def loss(name: str, steps: int, rest_rate: float | None, rate: float, seed: int) -> float:
        schedule = with_warmup(SCHEDULES["linear"], steps, 0.1)
        return end(problem, seed, lambda net: optimizer(name, net, rate, rest_rate=rest_rate), schedule, steps)

    rest_rate = tuned(partial(loss, "adamw", steps, None), FIRST)
    adamw = [loss("adamw", steps, None, rest_rate, seed) for seed in seeds]
    judged: list[Comparison] = []
    beside: list[Comparison] = []
    for name in ("soap", "muon"):
        peak = tuned(partial(loss, name, fewer, rest_rate), FIRST)
        for count, comparisons in ((fewer, judged), (steps, beside)):
            losses = [loss(name, count, rest_rate, peak, seed) for seed in seeds]
            comparisons.append(Comparison(f"{name} in {count}, adamw in {steps}", losses, adamw))
    return report(CLAIM, judged, beside)


if __name__ == "__main__":
    main(run)
