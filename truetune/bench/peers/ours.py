"""Our own side: a Trainer assembled as a recipe says, driven through its records as every run is.

The preflight runs before the first step and its time is not counted; integrity is asked for after the last. Clipping,
both norms of the gradient and the records are within the clock.
"""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from protocol import IGNORE, Side

from truetune.assembly import build_model, why_unshared
from truetune.checks.preflight import Preflight
from truetune.data.batch import Document
from truetune.data.stream import Stream
from truetune.facts import compiled
from truetune.models.router import choose_router
from truetune.objectives.next_token import NextToken
from truetune.rules import build_optimizer
from truetune.schedules import SCHEDULES
from truetune.spelling import read
from truetune.training.record import Alarm, Checks, Step
from truetune.training.trainer import Trainer
from truetune.training.watch import watch


class InOrder(Stream):
    """The documents as they stand, so many a step, packed as in any run."""

    def __init__(self, lengths: list[int], per_step: int, tokens_per_micro_batch: int) -> None:
        super().__init__(lengths, 1, tokens_per_micro_batch, 0)  # a step for each document, which the next two replace
        self.per_step = per_step

    def __len__(self) -> int:
        return len(self.lengths) // self.per_step

    def step(self, t: int) -> list[int]:
        return list(range(t * self.per_step, (t + 1) * self.per_step))


def main() -> None:
    side = Side()
    recipe = read(None, side.job["recipe"])
    loaded, model = build_model(recipe)
    rows = [row for step in side.steps for row in step]
    documents = [Document(row.ids.astype(np.int32), row.labels != IGNORE, i) for i, row in enumerate(rows)]
    stream = InOrder([len(d) for d in documents], side.job["documents"], recipe.train.tokens_per_micro_batch)
    router = choose_router(model, recipe.train.router_loss)
    trainer = Trainer(
        model=model,
        objective=NextToken(router, recipe.train.filtered_loss),
        optimizer=build_optimizer(recipe, model),
        schedule=SCHEDULES["constant"](len(stream)),
        documents=documents,
        stream=stream,
        shares=why_unshared(model, router) is None,
        clip=recipe.train.clip,
        preflight=Preflight(loaded),
    )
    records = watch(trainer.steps())
    verdicts = [asdict(v) for v in next(r for r in records if isinstance(r, Checks)).verdicts]
    alarms: list[str] = []
    side.ready(model.trainable().values(), ("torch", "transformers", "peft", "truetune"), kernels=compiled())
    for _ in side.steps:
        side.begin()
        while not isinstance(record := next(records), Step):
            alarms += [record.message] if isinstance(record, Alarm) else []
        side.done(record.loss, record.tokens, record.targets)
    last = (r for r in records if isinstance(r, Checks))
    side.finish(verdicts=verdicts + [asdict(v) for checks in last for v in checks.verdicts], alarms=alarms)


if __name__ == "__main__":
    main()
