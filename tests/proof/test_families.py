"""Every family of ``tests/families.py`` trains as a plain Hugging Face loop does: full and LoRA, fp32 and bf16.

What is found goes to ``results/trust/families``, from which ``tools/trust.py`` writes ``docs/families.md``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from families import FAMILIES
from parity import bf16_errors, fp32_deviation, within

pytestmark = pytest.mark.proof

BOUND = 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_as_a_plain_loop_does(name: str, evidence: Callable[..., None]) -> None:
    found: dict[str, str] = {}
    failed, worst, routes = [], 0.0, set()
    for method, lora in (("full", False), ("lora", True)):
        deviation, route = fp32_deviation(name, lora)
        ours, theirs, truth = bf16_errors(name, lora)
        found[f"{method}_fp32"] = f"{deviation:.1e}"
        found[f"{method}_bf16"] = f"{float(ours.mean() / theirs.mean()):.2f}"
        failed += [f"{method} fp32"] * (not deviation <= BOUND) + [f"{method} bf16"] * (not within(ours, theirs, truth))
        worst = max(worst, deviation)
        routes.add(route)
    route = " and ".join(sorted(routes))
    evidence(
        f"families/{name.replace(' ', '-')}",
        family=name,
        features=FAMILIES[name].features,
        route=route,
        **found,
        largest=f"{worst:.1e}",
        failed=", ".join(failed),
    )
    assert not failed
    assert route == FAMILIES[name].route
