"""Results of ``truetune bench training`` as a table of Markdown, which a terminal shows as well as a page does.

Figures are medians over the rounds; beside the useful tokens/s and the ratio stand their quartiles. A ratio is of two
sides in one round, on the same documents. MFU: the FLOPs that a step needs, by its seconds and by the peak of the
machine's matrix products in the same round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from truetune import versions
from truetune.errors import UserError

FORMAT = 2
OURS = "truetune"
NOISE = 0.03
"""Share of the machine that something else used, above which a round is said to be noisy."""
ROUNDS = 5
"""That a median is of, at least."""
HEAD = (
    "workload", "side", "useful tok/s", "quartiles", "times as fast as it", "quartiles", "target tok/s", "MFU",
    "peak memory", "above imports, weights and state", "first loss", "last loss (after targets)",
    "trained tensors that moved, checks passed",
)  # fmt: skip


class Spread(NamedTuple):
    """A median and its quartiles."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median(values), low, high)


class Figures(NamedTuple):
    """What one side did. useful, target: tokens/s. ratio: how many times as fast ours was, None for ours. above_bytes:
    of the peak, what is left without imports (of the side that has most), frozen weights, and trained ones with AdamW's
    two moments. targets: that were trained on between the first and the last of ``losses``."""

    side: str
    useful: Spread
    target: float
    ratio: Spread | None
    mfu: float
    peak_bytes: int
    above_bytes: int
    losses: tuple[float, float]
    targets: int
    sound: str


def figures(result: dict[str, Any]) -> list[Figures]:
    """One for each side, ours first, the others from the fastest on."""
    steps, peak = result["steps"][1:], [r["gemm"][result["job"]["compute"]] for r in result["rounds"]]
    ours = [sample["seconds"] for sample in result["sides"][OURS]["samples"]]
    imports = max(side["started_bytes"] for side in result["sides"].values())  # some import more while they load
    found = []
    for name, side in result["sides"].items():
        seconds = [sample["seconds"] for sample in side["samples"]]
        found.append(
            Figures(
                name,
                Spread.of([step["tokens"] / s for step, s in zip(steps, seconds, strict=True)]),
                median(step["targets"] / s for step, s in zip(steps, seconds, strict=True)),
                None if name == OURS else Spread.of([s / mine for s, mine in zip(seconds, ours, strict=True)]),
                median(step["flops"] / s / p for step, s, p in zip(steps, seconds, peak, strict=True)),
                side["peak_bytes"],
                side["peak_bytes"] - imports - result["frozen_bytes"] - 3 * 4 * side["trained"],
                (side["warm_up"]["loss"], side["samples"][-1]["loss"]),
                sum(step["targets"] for step in result["steps"][: 1 if result["apart"] else -1]),
                _sound(side),
            )
        )
    return sorted(found, key=lambda f: (f.ratio is not None, -f.useful.middle))


def _sound(side: dict[str, Any]) -> str:
    found = [f"{side['moved']} of {side['tensors']}"]
    if verdicts := side.get("verdicts"):
        found.append(f"{sum(v['passed'] for v in verdicts)} of {len(verdicts)}")
    return ", ".join(found)


def noisy(result: dict[str, Any]) -> Iterator[str]:
    """A sentence for whatever keeps the figures from being trusted."""
    sides = result["sides"]
    others = [max(s["samples"][i]["other_cpu"] for s in sides.values()) for i in range(len(result["rounds"]))]
    if len(others) < ROUNDS:
        yield f"{title(result)} has {len(others)} rounds, whose median means little; take {ROUNDS} or more"
    if loud := [share for share in others if share > NOISE]:
        yield (
            f"{len(loud)} of {len(others)} rounds of {title(result)} were noisy: something else used up to "
            f"{max(loud):.0%} of the machine"
        )
    for verdict in sides[OURS].get("verdicts", ()):
        if not verdict["passed"]:
            yield f"{title(result)}: a check of {OURS} failed: {verdict['name']}: {verdict['figure']}"
    yield from (f"{title(result)}: {OURS} raised an alarm: {alarm}" for alarm in sides[OURS].get("alarms", ()))


def title(result: dict[str, Any]) -> str:
    return f"{result['workload']}, {result['mode']}, {result['job']['compute']}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row for each side of each result."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for result in results:
        for f in figures(result):
            rows.append(
                (
                    title(result),
                    f.side,
                    f"{f.useful.middle:,.0f}",
                    f"{f.useful.low:,.0f} to {f.useful.high:,.0f}",
                    f"{f.ratio.middle:.2f} times" if f.ratio else "",
                    f"{f.ratio.low:.2f} to {f.ratio.high:.2f}" if f.ratio else "",
                    f"{f.target:,.0f}",
                    f"{f.mfu:.0%}",
                    f"{f.peak_bytes / 2**30:.2f} GiB",
                    f"{f.above_bytes / 2**30:.2f} GiB",
                    f"{f.losses[0]:.4f}",
                    f"{f.losses[1]:.4f} ({f.targets:,})",
                    f.sound,
                )
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results in ``files``. Raises UserError for a file that is none."""
    found = []
    for file in files:
        try:
            result = json.loads(file.read_bytes())
            versions.require(file, result["format"], FORMAT, result["machine"]["truetune"])
        except OSError as error:
            raise UserError(f"can't read {file} ({error.strerror}); check the path") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no result of truetune bench training; name one that it wrote") from error
        found.append(result)
    return found
