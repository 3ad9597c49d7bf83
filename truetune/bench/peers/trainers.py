"""transformers' Trainer, and with the option ``trl`` trl's SFTTrainer: with their own collators, losses and loops.

The Trainer takes one document at a time. trl packs the documents of each step with its own packing into rows of at
most ``longest`` tokens, in as many rows as the fullest step needs, since it has one number of micro-batches for all
steps. Their clocks run from the collation of a step's documents to the end of its update; logging is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from protocol import IGNORE, Row, Side
from published import PACKAGES, load, trained

FINER = 16
"""Tokens by which rows are made narrower until a step fills as many as the fullest."""


def table(rows: Sequence[Row]) -> Any:
    from datasets import Dataset

    ids, labels = [row.ids.tolist() for row in rows], [row.labels.tolist() for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def packed(steps: Sequence[Sequence[Row]], longest: int) -> tuple[Any, int]:
    """The rows of all steps in their order, and how many a step has. Raises ValueError if that can't be the same."""
    from datasets import concatenate_datasets, disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()
    tables = [table(rows) for rows in steps]
    most = max(len(pack_dataset(one, longest)) for one in tables)
    chosen = []
    for rows, one in zip(steps, tables, strict=True):
        widest = max(len(row.ids) for row in rows)
        widths = range(longest, widest - 1, -FINER)
        fitting = (found for width in widths if len(found := pack_dataset(one, width)) == most)
        if (found := next(fitting, None)) is None:
            raise ValueError(f"trl can't pack every step into {most} rows; take more documents a step")
        chosen.append(found)
    return concatenate_datasets(chosen), most


def stepwise(base: Any, side: Side) -> Any:
    """``base``, a Trainer, which takes a step when it is asked to."""

    class Stepwise(base):
        def get_batch_samples(self, *arguments: Any) -> Any:
            side.begin()
            samples, count = super().get_batch_samples(*arguments)
            self.counted = (
                sum(
                    int((s["attention_mask"] if "attention_mask" in s else s["input_ids"] >= 0).sum()) for s in samples
                ),
                sum(int((s["labels"][..., 1:] != IGNORE).sum()) for s in samples),
            )
            return samples, count

        def log(self, logs: dict[str, float], *arguments: Any) -> None:
            super().log(logs, *arguments)
            if "loss" in logs:
                side.done(logs["loss"], *self.counted)

    return Stepwise


def main() -> None:
    side = Side()
    with_trl = "trl" in side.options
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    common: dict[str, Any] = {
        "output_dir": str(side.folder / f"trainer-{'trl' if with_trl else 'hf'}"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": side.job["documents"],
        "max_steps": len(side.steps),
        "learning_rate": side.job["rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": side.job["clip"] or 0.0,  # which turns it off
        "weight_decay": 0.0,
        "bf16": side.autocast,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }

    class EndOfStep(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            side.lap()

    model, callbacks = load(side), [EndOfStep()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(side.job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if with_trl:
        from trl import SFTConfig, SFTTrainer

        rows, common["gradient_accumulation_steps"] = packed(side.steps, side.job["longest"])
        arguments = SFTConfig(
            max_length=side.job["longest"],
            packing=True,
            packing_strategy="bfd",
            dataset_kwargs={"skip_prepare_dataset": True},
            **common,
        )
        run = stepwise(SFTTrainer, side)(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
        )
    else:
        rows = table([row for step in side.steps for row in step])
        run = stepwise(transformers.Trainer, side)(
            model=model,
            args=transformers.TrainingArguments(**common),
            train_dataset=rows,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
            callbacks=callbacks,
        )
    side.ready(trained(run.model), [*PACKAGES, "accelerate", *(["trl"] if with_trl else [])])
    run.train()
    side.finish()


if __name__ == "__main__":
    main()
