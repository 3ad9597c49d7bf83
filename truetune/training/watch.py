"""Watches the records of a run go by, and adds an alarm where something is silently wrong.

``for record in watch(trainer.steps())`` sees all that the trainer yields. Once a check has failed, step
records lose their throughput: a speed is only quoted for a run that really trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from statistics import median

from truetune.training.record import Alarm, Checks, Record, Step

HISTORY = 10
"""Steps that a collapse is measured against."""


def watch(records: Iterable[Record], void: bool = False) -> Iterator[Record]:
    """Yield ``records``; before a step that gives cause for it, an Alarm.

    void: whether a check has failed already, before the run was resumed.
    """
    active: set[str] = set()
    history: deque[Step] = deque(maxlen=HISTORY)
    for record in records:
        if isinstance(record, Checks):
            void = void or not all(v.passed for v in record.verdicts)
        if not isinstance(record, Step):
            yield record
            continue
        alarms = list(_alarms(record, history))
        void = void or any(a.voids for a in alarms)
        yield from (a for a in alarms if a.name not in active)
        active = {a.name for a in alarms}
        history.append(record)
        yield replace(record, tokens_per_second=None) if void else record


def _alarms(step: Step, history: deque[Step]) -> Iterator[Alarm]:
    if step.gradient_norm == 0:
        yield Alarm(step.step, "zero gradient", "no gradient reaches any trained weight; nothing is learned", True)
    if abs(step.rate - step.planned) > 1e-9 * max(step.planned, 1e-30):
        message = f"the optimizer used {step.rate:.3e} where the schedule says {step.planned:.3e}"
        yield Alarm(step.step, "wrong rate", message, True)
    if len(history) < HISTORY or step.tokens < median(h.tokens for h in history) / 2:
        return  # too early to know what is usual, or a short last step, which is mostly fixed cost
    usual = median(h.computed / h.seconds for h in history)
    if step.computed / step.seconds < usual / 3:
        message = (
            f"{step.computed / step.seconds:.0f} tokens/s after a median of {usual:.0f}; if something else runs here, "
            "threads lose less with OMP_WAIT_POLICY=PASSIVE in the environment"
        )
        yield Alarm(step.step, "throughput collapsed", message, False)
    usual = median(h.targets / h.tokens for h in history)
    if step.targets / step.tokens < usual / 4:
        message = f"{step.targets / step.tokens:.1%} of the tokens are targets after a median of {usual:.1%}"
        yield Alarm(step.step, "targets collapsed", message, False)
