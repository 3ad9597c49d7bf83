"""What a run did, as rows of words: the tables that the page and the model card share.

A row is (label, value); what was not recorded has no row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from truetune.report.folder import Json, Run
from truetune.training.sinks import duration, size

Row = tuple[str, str]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def count(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:,.0f}"


def number(value: float | None, digits: int = 4) -> str:
    """A measured number. In a record null, and NaN, mean that it was not finite."""
    return "not finite" if value is None or value != value else f"{value:.{digits}g}"


def percent(share: float | None, signed: bool = False) -> str:
    if share is None or share != share:
        return "not finite"
    # A no-break space and a real minus sign.
    return f"{100 * share:{'+' if signed else ''}.1f}\u00a0%".replace("-", "\u2212")


def status(run: Run) -> str:
    """One sentence: how the run ended, and what that means for the figures."""
    planned = run.get("plan.steps")
    at = f"step {run.step:,}" + (f" of {planned:,}" if planned else "")
    part = "every figure here is of the part that ran"
    return {
        "finished": f"Finished at {at}.",
        "interrupted": f"Interrupted at {at}; {part}.",
        "failed": f"Failed at {at}; {part}.",
        "dry run": "A dry run: only the checks ran.",
        "running": f"Still running, or killed, at {at}; {part}.",
    }.get(run.get("status"), f"How this run ended is not recorded; its last record is of {at}.")


def throughput(run: Run) -> str:
    """Useful tokens per second, or the sentence that says why none is quoted."""
    if run.void:
        return f"Not quoted: {run.void}"
    tokens, targets = run.get("result.tokens_per_second"), run.get("result.targets_per_second")
    if tokens is None:
        return "Not quoted: the run recorded none"
    learned = f", {targets:,.0f} targets/s" if targets is not None else ""
    return f"{tokens:,.0f} tokens/s{learned}"


def totals(run: Run) -> list[Row]:
    """What was trained, in what time, on what."""
    tokens, targets, seconds = (run.total(name) for name in ("tokens", "targets", "seconds"))
    once = run.get("result.tokens_once")
    cores, memory = run.get("environment.cores"), run.get("environment.memory_bytes")
    device = run.get("environment.device")
    machine = (
        run.get("environment.cpu"),
        f"{cores} cores" if cores else None,
        size(memory) if memory else None,
        device if device != "cpu" else None,
    )
    return _rows(
        ("Tokens trained", tokens, count),
        ("Computed, shared prefixes once", None if once == tokens else once, count),
        ("Target tokens", targets, partial(_part, whole=tokens)),
        ("Time in steps" if run.get("result.seconds") is None else "Time", seconds, duration),
        ("Throughput", throughput(run), str),
        ("Peak memory", run.memory, size),
        ("Peak memory of the GPU", run.get("result.peak_gpu_memory"), size),
        ("Machine", ", ".join(part for part in machine if part) or None, str),
    )


def model(run: Run) -> list[Row]:
    get = run.get
    whole = get("model.parameters")
    return _rows(
        ("Model", get("model.source", get("model.path")), called),
        ("Family", get("model.family"), str),
        ("Parameters", whole, count),
        ("Trainable", get("model.trainable"), partial(_part, whole=whole)),
        ("Precision", get("model.precision"), str),
        ("Frozen base in training", get("model.base"), str),
        ("Packing route", get("model.route"), str),
        ("License", get("model.license"), str),
    )


def settings(run: Run) -> list[Row]:
    """The hyper-parameters that decide what was learned; the recipe has them all."""
    get = run.get
    lora = get("recipe.adapter.method") == "lora"
    adapter = "model.lora" if get("model.adapter_from") else "recipe.adapter"  # whose shapes the run has
    return _rows(
        ("Method", get("recipe.adapter.method"), lambda name: {"full": "every weight", "lora": "LoRA"}[name]),
        (
            "Rank, alpha, dropout",
            _all(run, adapter, "rank", "alpha", "dropout") if lora else None,
            str,
        ),
        ("Adapted modules", get(f"{adapter}.targets") if lora else None, _listed),
        ("Scaled by", "alpha / sqrt(rank)" if lora and get(f"{adapter}.rslora") else None, str),
        ("DoRA", "yes" if lora and get(f"{adapter}.dora") else None, str),
        ("Start", "PiSSA" if lora and get("recipe.adapter.init") == "pissa" else None, str),
        ("Trained in full beside", get(f"{adapter}.also") or None, _listed),
        ("Continues the adapter", get("model.adapter_from.path"), str),
        ("LoRA+ ratio", get("recipe.adapter.lora_plus_ratio") if lora else None, number),
        ("Optimizer", get("recipe.optimizer"), _named),
        ("Peak learning rate", get("recipe.optimizer.rate"), number),
        ("Schedule", get("recipe.schedule"), _named),
        ("Steps", get("plan.steps"), count),
        ("Epochs", get("plan.epochs"), number),
        ("Tokens per step", get("recipe.train.tokens_per_step"), count),
        ("Longest row", get("recipe.data.max_length"), lambda value: f"{value:,} tokens"),
        ("Gradient clipped at", get("recipe.train.clip"), number),
        ("Gradient's norm grows in a step", get("recipe.train.clip_growth"), lambda value: f"{value:g}-fold at most"),
        ("Seed", get("recipe.train.seed"), str),
    )


def environment(run: Run) -> list[Row]:
    get = run.get
    packages = ("python", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    return _rows(
        ("truetune", get("truetune"), str),
        *((name, get(f"environment.{name}"), str) for name in packages),
        ("Platform", get("environment.platform"), str),
        ("Processor", get("environment.cpu"), str),
        ("Cores", get("environment.cores"), str),
        ("Threads", get("environment.threads"), str),
        ("Memory", get("environment.memory_bytes"), size),
        ("Device", get("environment.device"), str),
        ("Started", get("started"), when),
        ("Finished", get("finished"), when),
    )


def hashes(run: Run) -> list[Row]:
    return _rows(
        ("Model weights (SHA-256)", run.get("model.sha256"), str),
        ("Chat template (SHA-256)", run.get("model.template_sha256"), str),
        ("Training data", run.get("data.train.digest"), str),
        ("Held-out data", run.get("data.evaluation.digest"), str),
    )


def data(run: Run) -> list[tuple[str, str, str]]:
    """(label, training, held out) of the two data reports."""
    parts = run.get("data.train", {}), run.get("data.evaluation", {})
    left, right = (dict(_data(part)) for part in parts)
    return [(label, left.get(label, ""), right.get(label, "")) for label in {**left, **right}]


def sources(run: Run) -> list[tuple[str, list[str]]]:
    """(name, cells) of each source, where there are several: what its rows held, what became of it, its losses."""
    told = []
    for source in run.get("data.sources", []):
        name, train, held_out = source["name"], source["train"], source["evaluation"] or {}
        losses = [((end or {}).get("by_source") or {}).get(name) for end in (run.before, run.after)]
        held = train["targets"] + train["targets_cut"]
        figures = (train["rows"], train["documents"], train["tokens"], held, train["targets"], train["targets_cut"])
        cells = [*map(count, figures), count(sum(train["dropped"].values())), count(held_out.get("targets", 0))]
        told.append((name, [f"{source['weight']:g}", *cells, *("" if x is None else number(x) for x in losses)]))
    return told


def roles(run: Run) -> list[tuple[str, int, int, float]]:
    """(role, tokens, targets, share of the longest role's tokens) of the training data."""
    tokens = run.get("data.train.tokens_by_role", {})
    targets = run.get("data.train.targets_by_role", {})
    most = max(tokens.values(), default=0) or 1
    return [(role, n, targets.get(role, 0), n / most) for role, n in tokens.items()]


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be ``owner/name`` on the Hugging Face hub, and is no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def called(name: str) -> str:
    """A hub id as it is, of a path the last part: the rest tells a reader nothing but about its author."""
    return name if is_hub_id(name) else Path(name).name


def when(text: str) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()


def _data(part: Json) -> list[Row]:
    # The rows held what is left and what was cut away.
    held = (part.get("targets") or 0) + (part.get("targets_cut") or 0)
    dropped = part.get("dropped")
    lengths = [part.get(name) for name in ("shortest", "median", "mean", "longest")]
    return _rows(
        ("Source", part.get("source"), called),
        ("Format", part.get("format"), str),
        ("Rows", part.get("rows"), count),
        ("Documents used", part.get("documents"), count),
        ("Tokens", part.get("tokens"), count),
        ("Target tokens", part.get("targets"), partial(_part, whole=part.get("tokens"))),
        ("Rows truncated", part.get("truncated"), partial(_part, whole=part.get("rows"))),
        ("Target tokens cut away", part.get("targets_cut"), partial(_part, whole=held)),
        ("Rows dropped", None if dropped is None else sum(dropped.values()), count),
        *((f"Dropped: {reason}", n, count) for reason, n in (dropped or {}).items()),
        *((f"Rows: {note}", n, count) for note, n in part.get("notes", {}).items()),
        ("Empty answers", part.get("empty"), count),
        ("Length: shortest, median, mean, longest", None if None in lengths else lengths, _lengths),
    )


def _part(value: float, whole: float | None) -> str:
    """A count with its share of the whole, where that is known."""
    return count(value) + (f" ({percent(value / whole)})" if whole else "")


def _lengths(values: list[float]) -> str:
    return ", ".join(f"{value:,.0f}" for value in values)


def _rows(*rows: tuple[str, Any, Callable[[Any], str]]) -> list[Row]:
    return [(label, spell(value)) for label, value, spell in rows if value is not None]


def _all(run: Run, part: str, *names: str) -> str | None:
    values = [run.get(f"{part}.{name}") for name in names]
    return None if None in values else ", ".join(f"{value:g}" for value in values)


def _listed(value: str | Iterable[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def _named(part: Json) -> str:
    """A part that is chosen by name, with its further options."""
    options = [f"{key}={value}" for key, value in part.items() if key not in ("name", "rate")]
    return f"{part.get('name', '')} ({', '.join(options)})" if options else str(part.get("name", ""))
