"""Recipe -> Trainer: the one file that knows every folder below it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.optim import Optimizer

from truetune import registry
from truetune.checks.preflight import Preflight
from truetune.data import dataset, formats, sources
from truetune.data.batch import Document
from truetune.data.chat import Renderer
from truetune.data.dataset import DataReport
from truetune.data.sources import Rows
from truetune.data.stream import Stream
from truetune.errors import UserError
from truetune.models.adapt import add_lora
from truetune.models.adapter import continued
from truetune.models.coverage import coverage
from truetune.models.load import Loaded, load, require_causal
from truetune.models.precision import keep_sums_in_fp32
from truetune.models.route import choose_route
from truetune.models.router import choose_router, has_router_loss
from truetune.models.small import positions_of, takes_more_positions
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.optim import OPTIMIZERS, parameter_groups
from truetune.recipe import Recipe
from truetune.schedules import SCHEDULES, with_warmup
from truetune.training.checkpoint import Checkpoints
from truetune.training.evaluate import Evaluator, Sampler
from truetune.training.patience import existing
from truetune.training.trainer import Trainer

TEXTS, STEP_TEXT = 4_000_000, 1_000
"""Bytes allowed for facts, rows, samples and the report, and for the records of one step."""


@dataclass(frozen=True)
class Part:
    """Rows of one side of the data, what became of them, and the account of it."""

    rows: Rows
    documents: list[Document]
    report: DataReport

    def used(self, documents: list[Document]) -> list[dict[str, Any]]:
        """The rows that ``documents`` were made of, each once, in their order."""
        rows = dict(zip(self.rows.numbers, self.rows.rows, strict=True))
        return [rows[number] for number in dict.fromkeys(d.row for d in documents)]


@dataclass(frozen=True)
class Job:
    """A trainer with what it was made of; notes: sentences that the user should read before it runs."""

    recipe: Recipe
    trainer: Trainer
    loaded: Loaded
    train: Part
    evaluation: Part
    notes: tuple[str, ...] = ()


def _silently(_: str, __: str) -> None:
    """Tell nobody."""


def assemble(recipe: Recipe, folder: Path | None = None, tell: Callable[[str, str], object] = _silently) -> Job:
    """Everything that the recipe asks for, ready for ``job.trainer.steps()``.

    folder: where checkpoints and failures go; without it the run keeps neither, and ends with its last weights.
    tell: called with what is begun and on what, since each of these takes seconds or minutes.
    Raises UserError for whatever the recipe names that is not there or does not fit.
    """
    tell("reading", recipe.data.source)
    train_rows, held_out_rows = choose_rows(recipe)
    tell("loading", recipe.model.path)
    loaded, model = build_model(recipe)
    tell("tokenising", f"{len(train_rows):,} rows to train on and {len(held_out_rows):,} held out")
    renderer = Renderer(
        loaded.tokenizer, loaded.stop_ids, recipe.data.max_length, recipe.data.targets, recipe.data.too_long
    )
    train = tokenized(recipe, train_rows, renderer)
    evaluation = tokenized(recipe, held_out_rows, renderer)
    if train.report.template:  # the default, where the tokenizer has none: it must leave with the model
        loaded.tokenizer.chat_template = renderer.template
    notes = [note for part in (train, evaluation) if (note := require_known(model, part))]
    if isinstance(model.model, PeftModel) and (reach := coverage(model.model)).experts:
        notes.append(str(reach))
    stream = build_stream(recipe, train.documents)
    steps = len(stream)
    shape = registry.bind("schedule", SCHEDULES, recipe.schedule.name, recipe.schedule.options)
    optimizer = registry.bind("optimizer", OPTIMIZERS, recipe.optimizer.name, recipe.optimizer.options)
    ratio = recipe.adapter.lora_plus_ratio if isinstance(model.model, PeftModel) else 1.0
    groups = parameter_groups(model.trainable().items(), recipe.optimizer.rate, ratio)
    router = choose_router(model, recipe.train.router_loss)
    if router is None and recipe.train.router_loss is None and has_router_loss(model.hf):
        notes.append(
            "experts are trained without a loss for their balance, as the model's config has it; train.router_loss "
            "sets one"
        )
    objective = NextToken(router)
    held_out = recipe.evaluation
    trainer = Trainer(
        model=model,
        objective=objective,
        optimizer=_built(optimizer, groups, recipe),
        schedule=with_warmup(shape, steps, recipe.schedule.warmup),
        documents=train.documents,
        stream=stream,
        clip=recipe.train.clip,
        preflight=Preflight(loaded),
        evaluator=Evaluator(evaluation.documents, recipe.train.tokens_per_micro_batch, objective),
        sampler=build_sampler(recipe, loaded, evaluation, renderer) if held_out.samples else None,
        evaluate_every=held_out.every or -(-steps // 4),
        checkpoints=Checkpoints(folder / "checkpoints", recipe.checkpoint.keep) if folder else None,
        save_every=recipe.checkpoint.every or -(-steps // 4),
        keep_best=recipe.checkpoint.keep_best and folder is not None,
        failures=folder,
    )
    torch.manual_seed(recipe.train.seed)
    return Job(recipe, trainer, loaded, train, evaluation, tuple(notes))


def _built(optimizer: Callable[..., Optimizer], groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    try:
        return optimizer(groups, recipe.optimizer.rate)
    except (ValueError, TypeError) as error:
        raise UserError(f'optimizer "{recipe.optimizer.name}": {error}; correct the options under optimizer') from error


def choose_rows(recipe: Recipe) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, which never share a row."""
    held_out, seed = recipe.evaluation, recipe.train.seed
    train = sources.load(recipe.data.source, recipe.data.split)
    if held_out.source:
        evaluation = sources.load(held_out.source, held_out.split or "train")
        if not held_out.split and evaluation.held_out_split:
            evaluation = sources.load(held_out.source, evaluation.held_out_split)
    elif split := held_out.split or train.held_out_split:
        evaluation = sources.load(recipe.data.source, split)
    else:
        train, evaluation = dataset.hold_out(train, held_out.fraction, seed)
    evaluation = dataset.draw(evaluation, held_out.rows, seed)
    train = dataset.less(train, evaluation)
    if recipe.data.rows:
        train = dataset.first(train, recipe.data.rows)
    column = recipe.data.weight_column
    if "weight_column" in recipe.data.model_fields_set and column and column not in train.rows[0]:
        raise UserError(f"{train.name} has no column {column}; name the column of the weights in data.weight_column")
    return train, evaluation


def tokenized(recipe: Recipe, rows: Rows, renderer: Renderer) -> Part:
    data = recipe.data
    documents, report = dataset.tokenize(rows, data.format, renderer, data.cut_limit, data.weight_column)
    return Part(rows, documents, report)


def build_model(recipe: Recipe) -> tuple[Loaded, CausalLM]:
    """The model, adapted as the recipe says, on its device."""
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.model.precision, device)
    adapter = recipe.adapter
    # A trained weight is kept in fp32, whatever it is computed in: bf16 would round its updates away.
    stored = dtype if adapter.method == "lora" else torch.float32
    loaded = load(
        recipe.model.path,
        dtype=stored,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    hf = loaded.model
    if recipe.output.gguf:
        from truetune.models.gguf.write import require_writable

        require_writable(loaded)
    hf.to(device)  # type: ignore[arg-type]  # transformers wraps the method in a way that loses its signature
    require_causal(hf)
    tail = measure_tail(hf)
    route = choose_route(hf, tail.decoder, recipe.data.max_length)
    torch.manual_seed(recipe.train.seed)
    if adapter.method == "full":
        return loaded, CausalLM(hf, tail, route, dtype)
    options: dict[str, Any] = {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "dropout": adapter.dropout,
        "targets": adapter.targets,
        "rslora": adapter.rslora,
        "dora": adapter.dora,
        "also": adapter.also,
    }
    if adapter.path is None:
        model = add_lora(hf, tail.head, **options, init=adapter.init)
    else:
        written = {key: value for key, value in options.items() if key in adapter.model_fields_set}
        model = continued(loaded, tail.head, adapter.path, written)
    if dtype != torch.float32:
        keep_sums_in_fp32(hf)
    return loaded, CausalLM(model, tail, route, dtype)


def disk_need(job: Job) -> int:
    """Bytes that the run may write: checkpoints as many as are ever there at once, exports, and texts."""
    model, recipe = job.trainer.model, job.recipe
    trained = sum(p.nbytes for p in model.trainable().values())
    kept = sum(p.nbytes for p in model.kept().values())
    whole = sum(4 * p.numel() for p in model.parameters())  # fp32, should the base's dtype change its logits
    if model.head.up is not None:  # merged, an adapted head that was tied has a weight of its own
        whole += 4 * model.head.weight.numel()
    lora, merged, gguf = recipe.adapter.method == "lora", recipe.output.merged, recipe.output.gguf is not None
    moments = 2 * trained
    checkpoints = recipe.checkpoint.keep + 1 + recipe.checkpoint.keep_best  # one more while it is written
    weights = (kept + whole * merged if lora else whole) + whole * gguf
    files = [f for f in job.loaded.folder.iterdir() if f.suffix in (".json", ".jinja", ".txt", ".model")]
    words = sum(f.stat().st_size for f in files) * (1 + (lora and merged))
    return checkpoints * (kept + moments) + weights + words + TEXTS + STEP_TEXT * len(job.trainer.stream)


def require_space(job: Job, folder: Path) -> None:
    """Raise UserError unless the disk has room for the whole run, before anything is computed."""
    need, place = disk_need(job), existing(folder)
    held = sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file())  # of a resumed run
    free = shutil.disk_usage(place).free
    if free + held < need:
        raise UserError(
            f"the run may need {need / 1e9:.2f} GB at {place} and {(free + held) / 1e9:.2f} GB are free; free some "
            "space, lower checkpoint.keep, or name another output.folder"
        )


def require_known(model: CausalLM, part: Part) -> str | None:
    """What to know of documents longer than the model's config promises positions for, where it takes them.

    Raises UserError for a token or a position of the documents that the model has no place for.
    """
    vocabulary = model.head.weight.shape[0]
    for document in part.documents:
        largest = int(document.tokens.max())
        if largest >= vocabulary:
            raise UserError(
                f"{part.report.source}: row {document.row} (the first is 0) has token {largest}, but the model has "
                f"{vocabulary}; use the tokenizer of this model"
            )
    longest, positions = max(part.documents, key=len), positions_of(model.hf.config)
    if positions is None or len(longest) <= positions:
        return None
    where = f"{part.report.source}: row {longest.row} (the first is 0) has {len(longest)} tokens"
    if not takes_more_positions(model.hf):
        raise UserError(f"{where}, but the model has {positions} positions; set data.max_length to {positions}")
    return (
        f"{where}, more than the {positions} positions of the model's config; they are computed, not stored, so it "
        f"runs, but further than the model was made for (data.max_length={positions} would keep within)"
    )


def build_sampler(recipe: Recipe, loaded: Loaded, evaluation: Part, renderer: Renderer) -> Sampler:
    firsts = {document.row: document for document in reversed(evaluation.documents)}  # of each row its first document
    documents = [d for d in evaluation.documents if firsts[d.row] is d][: recipe.evaluation.samples]
    form, weight = evaluation.report.format, recipe.data.weight_column
    examples = [renderer.chosen(formats.read(form, row, 0, weight)) for row in evaluation.used(documents)]
    return Sampler(loaded, documents, list(map(formats.question, examples)), recipe.evaluation.sample_tokens)


def build_stream(recipe: Recipe, documents: list[Document]) -> Stream:
    train = recipe.train
    return Stream(
        [len(d) for d in documents],
        train.tokens_per_step,
        train.tokens_per_micro_batch,
        train.seed,
        epochs=train.epochs,
        steps=train.steps,
        tokens=train.tokens,
    )


def pick_device(wanted: str) -> torch.device:
    able = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if able else "cpu")
    if wanted == "cuda" and not able:
        raise UserError("device is cuda, but this torch sees no CUDA device; set device=auto, or see truetune doctor")
    return torch.device(wanted)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; "auto" is bfloat16 where the hardware has products for it."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
