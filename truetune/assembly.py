"""Recipe -> Trainer: the one file that knows every folder below it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from truetune import registry
from truetune.checks.preflight import Preflight
from truetune.data import dataset, formats
from truetune.data.batch import Document
from truetune.data.chat import Renderer
from truetune.devices import has_fast_bf16
from truetune.errors import UserError
from truetune.kernels.native.memory import keep_memory
from truetune.kernels.op import is_on
from truetune.kernels.triton import install
from truetune.kernels.triton.choices import chosen_for
from truetune.models.adapt import add_lora
from truetune.models.adapter import continued
from truetune.models.base import quantize_base, require_able
from truetune.models.coverage import coverage
from truetune.models.export import reload
from truetune.models.load import Loaded, load, quiet, require_causal
from truetune.models.precision import keep_sums_in_fp32, keep_trained_in_bf16
from truetune.models.route import choose_route, sharing_disproof
from truetune.models.router import Router, choose_router, has_router_loss
from truetune.models.small import positions_of, takes_more_positions
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.optim import state_bytes
from truetune.recipe import Recipe
from truetune.rows import Part, Side, build_renderer, build_stream, choose_rows, sources_of, tokenized
from truetune.rules import build_optimizer
from truetune.schedules import SCHEDULES, Plan, ends_of, with_warmup
from truetune.training.checkpoint import Checkpoints
from truetune.training.evaluate import Evaluator, Sampler
from truetune.training.patience import existing
from truetune.training.trainer import Trainer

TEXTS, STEP_TEXT = 4_000_000, 1_000
"""Bytes allowed for facts, rows, samples and the report, and for the records of one step."""


@dataclass(frozen=True)
class Job:
    """A trainer with what it was made of; notes: sentences that the user should read before it runs; unshared: why
    documents that begin alike do not share the computation of that, None where they do."""

    recipe: Recipe
    trainer: Trainer
    loaded: Loaded
    train: Side
    evaluation: Side
    notes: tuple[str, ...] = ()
    unshared: str | None = None


def _silently(_: str, __: str) -> None:
    """Tell nobody."""


def assemble(recipe: Recipe, folder: Path | None = None, tell: Callable[[str, str], object] = _silently) -> Job:
    """Everything that the recipe asks for, ready for ``job.trainer.steps()``.

    folder: where checkpoints and failures go; without it the run keeps neither, and ends with its last weights.
    tell: called with what is begun and on what, since each of these takes seconds or minutes.
    Raises UserError for whatever the recipe names that is not there or does not fit.
    """
    tell("reading", ", ".join(source.source for source in sources_of(recipe)))
    chosen = choose_rows(recipe)
    tell("loading", recipe.model.path)
    loaded, model = build_model(recipe)
    train_rows, held_out_rows = (sum(len(choice.rows) for choice in side) for side in chosen)
    if recipe.train.activation_memory is not None:
        model.keep_within(round(recipe.train.activation_memory * 2**30))
    tell("tokenising", f"{train_rows:,} rows to train on and {held_out_rows:,} held out")
    renderer = build_renderer(recipe, loaded.tokenizer, loaded.stop_ids)
    train, evaluation = (tokenized(recipe, rows, renderer) for rows in chosen)
    if train.report.template:  # the default, where the tokenizer has none: it must leave with the model
        loaded.tokenizer.chat_template = renderer.template
    notes = [note for part in (*train.parts, *evaluation.parts) if (note := require_known(model, part))]
    if isinstance(model.model, PeftModel) and (reach := coverage(model.model)).experts:
        notes.append(str(reach))
    stream = build_stream(recipe, train.lengths)
    notes += _told(recomputation(recipe, model, train.lengths))
    notes += [
        f"less than one row of {part.name} is trained on in this run; raise its weight"
        for part, source in zip(train.parts, sources_of(recipe), strict=True)
        if source.weight * len(part.documents) * stream.epochs < 0.5
    ]
    steps = len(stream)
    known = Plan(recipe.optimizer.rate, stream.tokens_at, stream.documents / steps)
    shape = registry.bind("schedule", SCHEDULES, recipe.schedule.name, recipe.schedule.options, plan=known)
    router = choose_router(model, recipe.train.router_loss)
    if router is None and recipe.train.router_loss is None and has_router_loss(model.hf):
        notes.append(
            "experts are trained without a loss for their balance, as the model's config has it; train.router_loss "
            "sets one"
        )
    objective = NextToken(router, recipe.train.filtered_loss)
    unshared = why_unshared(model, router)
    held_out = recipe.evaluation
    trainer = Trainer(
        model=model,
        objective=objective,
        optimizer=build_optimizer(recipe, model),
        schedule=with_warmup(shape, steps, recipe.schedule.warmup, recipe.schedule.warmup_from),
        documents=train.documents,
        stream=stream,
        shares=unshared is None,
        clip=recipe.train.clip,
        preflight=Preflight(loaded),
        evaluator=Evaluator(evaluation.documents, recipe.train.tokens_per_micro_batch, objective, evaluation.by_source),
        sampler=build_sampler(recipe, loaded, evaluation, renderer) if held_out.samples else None,
        evaluate_every=held_out.every or -(-steps // 4),
        checkpoints=Checkpoints(folder / "checkpoints", recipe.checkpoint.keep) if folder else None,
        save_every=recipe.checkpoint.every or -(-steps // 4),
        save_minutes=recipe.checkpoint.minutes,
        keep_best=recipe.checkpoint.keep_best and folder is not None,
        failures=folder,
    )
    torch.manual_seed(recipe.train.seed)
    return Job(recipe, trainer, loaded, train, evaluation, tuple(notes), unshared)


def recomputation(recipe: Recipe, model: CausalLM, lengths: Sequence[np.ndarray]) -> dict[str, int] | None:
    """Of the largest micro-batch that documents of these tokens, source by source, could make: its tokens, how many
    layers are computed again in its backward pass, and the bytes that are kept and may be. None without a budget."""
    if model.budget is None:
        return None
    ordered, train = np.sort(np.concatenate(lengths))[::-1], recipe.train
    most = min(train.tokens_per_micro_batch, train.tokens_per_step - 1 + int(ordered[0]))
    filled = np.diff(ordered.cumsum().clip(max=most), prepend=0)
    filled = filled[filled > 0]
    count = model.budget.recomputed(filled)
    return {
        "tokens": int(filled.sum()),
        "recomputed": count,
        "layers": len(model.budget.layers),
        "bytes": model.budget.needs(filled)[count],
        "limit": model.budget.limit,
    }


def _told(found: dict[str, int] | None) -> list[str]:
    if found is None or (not found["recomputed"] and found["bytes"] <= found["limit"]):
        return []
    again = (
        f"{found['recomputed']} of {found['layers']} layers are computed again in the backward pass of a micro-batch "
        f"of up to {found['tokens']:,} tokens"
    )
    if found["bytes"] <= found["limit"]:
        return [f"{again}, so that layers keep {_gib(found['bytes'])} of {_gib(found['limit'])} GiB"]
    return [
        f"{again}, yet layers keep {_gib(found['bytes'])} GiB, more than train.activation_memory "
        f"({_gib(found['limit'])}); raise it to that, or lower train.tokens_per_micro_batch"
    ]


def _gib(size: int) -> str:
    """Rounded up, so that it is enough."""
    return f"{math.ceil(size / 2**30 * 1000) / 1000:g}"


def why_unshared(model: CausalLM, router: Router | None) -> str | None:
    """Why documents that begin alike must not share the computation of that, or None where they may."""
    if not is_on("shared_prefixes"):
        return "turned off by TRUETUNE_OFF"
    if router is not None:
        return "the router loss is one of each document"
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "dropout is another in each document"
    return sharing_disproof(model.hf, model.tail.decoder, model.route)


def build_model(recipe: Recipe) -> tuple[Loaded, CausalLM]:
    """The model, adapted as the recipe says, on its device."""
    device = pick_device(recipe.device)
    if device.type == "cpu":
        keep_memory()
    install(chosen_for(device))
    low = recipe.model.weights == "bf16"
    dtype = pick_dtype("bf16" if low else recipe.model.precision, device)
    adapter, base = recipe.adapter, recipe.model.base
    if base:
        require_able(base, device)
    # Else a trained weight is kept in fp32, whatever it is computed in: bf16 would round its updates away.
    stored = dtype if adapter.method == "lora" or low else torch.float32
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
        if low:
            keep_sums_in_fp32(hf)
            keep_trained_in_bf16(hf)
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
    if low:
        keep_trained_in_bf16(model)
    wrapped = CausalLM(model, tail, route, dtype)
    if base:
        with quiet():
            resting = reload(loaded, loaded.folder, "auto")
        quantize_base(wrapped.hf, tail.head, base, resting)
    return loaded, wrapped


def disk_need(job: Job) -> int:
    """Bytes that the run may write: checkpoints as many as are ever there at once, exports, and texts."""
    model, recipe = job.trainer.model, job.recipe
    averages = sum(4 * p.numel() for p in model.trainable().values())
    kept = sum(p.nbytes for p in model.kept().values())
    whole = sum(4 * p.numel() for p in model.parameters())  # fp32, should the base's dtype change its logits
    if model.head.up is not None:  # merged, an adapted head that was tied has a weight of its own
        whole += 4 * model.head.weight.numel()
    lora, merged, gguf = recipe.adapter.method == "lora", recipe.output.merged, recipe.output.gguf is not None
    rule = job.trainer.optimizer
    moments = state_bytes(rule) + averages * getattr(rule, "averages_weights", False)
    checkpoints = recipe.checkpoint.keep + 1 + recipe.checkpoint.keep_best  # one more while it is written
    checkpoints += len(ends_of(job.trainer.schedule))
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
    longest = max(part.documents, key=len)
    largest = max(part.documents, key=lambda document: int(document.tokens.max()))
    known = Extremes(len(longest), longest.row, int(largest.tokens.max()), largest.row)
    return require_room(part.report.source, known, model.head.weight.shape[0], model.hf.config, lambda: model.hf)


class Extremes(NamedTuple):
    """The longest document's tokens and row, and the largest token and its row: the first such ones."""

    longest: int
    longest_row: int
    largest: int
    largest_row: int


def require_room(
    source: str, found: Extremes, vocabulary: int, config: PreTrainedConfig, model: Callable[[], PreTrainedModel]
) -> str | None:
    """``require_known`` for documents of these extremes; ``model`` is asked for only where its kind must be tried."""
    if found.largest >= vocabulary:
        raise UserError(
            f"{source}: row {found.largest_row} (the first is 0) has token {found.largest}, but the model has "
            f"{vocabulary}; use the tokenizer of this model"
        )
    positions = positions_of(config)
    if positions is None or found.longest <= positions:
        return None
    where = f"{source}: row {found.longest_row} (the first is 0) has {found.longest} tokens"
    if not takes_more_positions(model()):
        raise UserError(f"{where}, but the model has {positions} positions; set data.max_length to {positions}")
    return (
        f"{where}, more than the {positions} positions of the model's config; they are computed, not stored, so it "
        f"runs, but further than the model was made for (data.max_length={positions} would keep within)"
    )


def build_sampler(recipe: Recipe, loaded: Loaded, evaluation: Side, renderer: Renderer) -> Sampler:
    counts = dataset.shares(recipe.evaluation.samples, [part.report.rows for part in evaluation.parts])
    documents: list[Document] = []
    questions: list[str] = []
    for part, count in zip(evaluation.parts, counts, strict=True):
        firsts: dict[int, Document] = {}  # of each row its first document
        for document in part.documents:
            if len(firsts) < count:
                firsts.setdefault(document.row, document)
        documents += firsts.values()
        form, weight = part.report.format, recipe.data.weight_column
        examples = [renderer.chosen(formats.read(form, row, 0, weight)) for row in part.used(firsts)]
        questions += map(formats.question, examples)
    return Sampler(loaded, documents, questions, recipe.evaluation.sample_tokens)


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
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32
