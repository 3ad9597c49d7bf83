"""Tiny model folders, data files, and whole runs on them that take a second, watched and disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from truetune import run
from truetune.assembly import Job, assemble
from truetune.cli import app
from truetune.training.record import Record, Step

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STEPS = 8


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    inner.train_from_iterator(["What is it? It is what it is: system, user, assistant."] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def write_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    template: str | None = CHATML,
    **changes: Any,
) -> Path:
    """A random model with its tokenizer as a Hugging Face folder; ``changes`` are of its config."""
    words = tokenizer(template)
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    named = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, positions: 2048}
    tiny(family, vocab_size=len(words), **(named | changes)).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def chats(count: int = 60) -> list[dict[str, Any]]:
    """Rows of messages, all different."""
    rows = []
    for i in range(count):
        turns = (("user", f"What is {i} and {i}?"), ("assistant", f"It is {2 * i}, of course."))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def keys(model: Path, data: Path | str, folder: Path, *more: str) -> list[str]:
    """A run of ``STEPS`` steps in fp32 that evaluates and saves on the way; ``more`` overrides."""
    return [
        f"model.path={model}",
        f"data.source={data}",
        f"output.folder={folder}",
        "model.precision=fp32",
        "data.max_length=128",
        *([] if "adapter.method=full" in more else ["adapter.rank=4"]),
        "optimizer.rate=1e-2",
        f"train.steps={STEPS}",
        "train.tokens_per_step=240",
        "train.tokens_per_micro_batch=128",
        "evaluation.every=4",
        "evaluation.rows=6",
        "evaluation.samples=1",
        "evaluation.sample_tokens=4",
        "checkpoint.every=2",
        "checkpoint.keep=3",
        *more,
    ]


def invoke(*arguments: str) -> Result:
    """The command line in process; raises what is no fault of the user."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def at_record(patch: pytest.MonkeyPatch, condition: Callable[[Record], bool], act: Callable[[], None]) -> None:
    """Act, once, when a record that fits reaches the sinks of a run."""
    left, real = [act], run._sinks

    class Acting:
        def write(self, record: Record) -> None:
            if left and condition(record):
                left.pop()()

        def close(self) -> None:
            pass

    patch.setattr(run, "_sinks", lambda *arguments: [*real(*arguments), Acting()])


def step_is(number: int) -> Callable[[Record], bool]:
    return lambda record: isinstance(record, Step) and record.step == number


def keep_jobs(patch: pytest.MonkeyPatch, change: Callable[[Job], None] | None = None) -> list[Job]:
    """The jobs of the runs to come, in a list that grows as they are assembled; ``change`` is made to each."""
    made: list[Job] = []

    def keeping(*arguments: Any) -> Job:
        made.append(assemble(*arguments))
        if change:
            change(made[-1])
        return made[-1]

    patch.setattr(run, "assemble", keeping)
    return made


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in job.trainer.model.trainable().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_file(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit."""
    return equal(load_file(a), load_file(b))
