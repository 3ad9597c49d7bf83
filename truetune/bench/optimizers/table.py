"""A comparison of optimizers as a table of Markdown and as bars; what is not done is said, and not ranked."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from truetune.bench.optimizers.comparison import BUDGETS, SEEDS, TOLERANCE, Comparison, Standing
from truetune.bench.optimizers.methods import BASELINE, options
from truetune.bench.optimizers.trial import Trials
from truetune.bench.picture import Bar, Group

HEAD = (
    "method", "tuned", f"loss, mean of {len(SEEDS)} seeds", "least to most", "speed-up in tokens", "least to most",
    "seconds of a step, AdamW's as 1", "state", "trials", "CPU-hours",
)  # fmt: skip


def table(comparison: Comparison, trials: Trials) -> str:
    """One row for each method that is ranked, the lowest loss first."""
    rows = [HEAD, ("---",) * len(HEAD)]
    ranked = [standing for standing in comparison.standings if standing.finals]
    if not ranked:
        return f"{title(comparison)}: nothing is ranked yet"
    usual = next((_step_seconds(standing) for standing in ranked if standing.method == BASELINE), None)
    for standing in ranked:
        losses = [found.loss for found in standing.finals]
        speedups = [str(one) for one in comparison.speedups(standing)]
        own = trials.of(comparison.setting, standing.method)
        rows.append(
            (
                standing.method,
                _tuned(comparison, standing),
                f"{standing.loss:.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                speedups[0] if speedups else "",
                f"{speedups[1]} to {speedups[-1]}" if speedups else "",
                f"{_step_seconds(standing) / usual:.2f}" if usual else "",
                f"{standing.finals[0].state_bytes / 1e6:.1f} MB",
                f"{len(own)}",
                f"{sum(found.cpu_seconds for found in own) / 3600:.2f}",
            )
        )
    return f"{title(comparison)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def notes(comparison: Comparison, trials: Trials) -> Iterator[str]:
    """A sentence for whatever a figure rests on, for what is left, and for what keeps a figure from being trusted."""
    setting, curve = comparison.setting, comparison.curve
    yield f"a change counted where it lowered the loss by more than {TOLERANCE[setting.full]:g}"
    if curve:
        yield (
            f"AdamW's loss at T times {curve.shortest:,.0f} tokens is {curve.floor:.4f} + {curve.scale:.4f} / "
            f"T^{curve.alpha:.3f}, through runs of {', '.join(f'{b:g}' for b in BUDGETS)} times {setting.tokens:,} "
            f"tokens, within {curve.error:.4f} (root mean square)"
        )
    for standing in comparison.standings:
        own = trials.of(setting, standing.method)
        if standing.left:
            yield f"{standing.method}: {standing.left} ({len(own)} trials so far)"
        if edges := [edge for edge in standing.edges if standing.values[edge]]:  # no decay is no end of a grid
            yield f"{standing.method}: the search ended at an edge of the grid ({', '.join(edges)})"
        if failed := sum(found.failed is not None for found in own):
            yield f"{standing.method}: {failed} of {len(own)} trials failed, and counted as worse than all others"


def title(comparison: Comparison) -> str:
    setting = comparison.setting
    kind = "every weight" if setting.full else "LoRA"
    return f"{setting.workload} ({setting.data}), {kind}, {setting.tokens:,} tokens a run"


def group(comparison: Comparison) -> Group:
    """The speed-ups as bars; a bar that says "more than" is at the end of what the curve was asked for."""
    bars = []
    for standing in comparison.standings:
        if speedups := comparison.speedups(standing):
            middle, low, high = speedups[0], speedups[1], speedups[-1]
            bars.append(
                Bar(standing.method, middle.times, low.times, high.times, str(middle), standing.method == BASELINE)
            )
    return Group(f"{title(comparison)}: speed-up in tokens over tuned AdamW", bars)


def _step_seconds(standing: Standing) -> float:
    return median(found.step_seconds for found in standing.finals)


def _tuned(comparison: Comparison, standing: Standing) -> str:
    chosen = options(standing.method, standing.values, comparison.setting.rank)
    spelled = (f"{key}={_spelled(value)}" for key, value in chosen.items() if key != "name")
    return f"`{' '.join(spelled)}`"


def _spelled(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else f"{value:g}"  # as a recipe has them
