"""What the commands do: train, generate, export, report.

A run is a folder: recipe.yaml, run.json (facts), metrics.jsonl (records), data/ (held-out rows, and those of
the first step), checkpoints/, adapter/ or model/, merged/, report.html and README.md.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from truetune import report as pages
from truetune import spelling
from truetune.assembly import Job, assemble, pick_device, pick_dtype
from truetune.errors import UserError
from truetune.facts import Facts, now
from truetune.models.export import Export, export_adapter, export_merged
from truetune.models.generate import answer
from truetune.models.load import load
from truetune.recipe import Recipe
from truetune.training.checkpoint import atomic_folder
from truetune.training.record import Alarm, Checks, Evaluation, Record, Saved, Step, as_json
from truetune.training.sinks import Console, JsonLines, Sink, TensorBoard
from truetune.training.trainer import Trainer
from truetune.training.watch import watch

PROBE = 4
"""Documents whose logits an export is compared on."""


class Interrupted(UserError):
    """The run stopped at a step boundary, saved; the message says how to go on."""


def train(recipe: Recipe, *, resume: Path | None = None, dry_run: bool = False, quiet: bool = False) -> Path:
    """Run the recipe; the run folder, with everything that came of it.

    resume: a run folder whose newest intact checkpoint is taken up, with ``recipe`` being its own.
    dry_run: stop after the checks. Raises UserError for what the user can mend, Interrupted after a signal.
    """
    folder = resume or new_folder(recipe)
    job = assemble(recipe, folder)
    _require_space(job, folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = job.trainer
    if resume:
        facts = _resume(job, folder)
    else:
        spelling.write(recipe, folder / "recipe.yaml")
        facts = Facts.start(folder, job, f"truetune {' '.join(sys.argv[1:])}")
        _write_rows(job, folder)
    sinks = _sinks(recipe, folder, trainer, quiet)
    try:
        if dry_run:
            _feed(_checks_only(trainer), sinks, facts)
            facts.write(status="dry run", finished=now())
            return folder
        with _stopping_at_signals(trainer):
            _feed(watch(trainer.steps()), sinks, facts)
    except UserError:
        facts.write(status="failed", finished=now())
        pages.write(folder)
        raise
    except BaseException:
        facts.write(status="failed", finished=now())
        raise
    finally:
        for sink in sinks:
            sink.close()
    if trainer.step < len(trainer.stream):
        facts.write(status="interrupted")
        pages.write(folder)
        raise Interrupted(f"stopped after step {trainer.step}; go on with: truetune train --resume {folder}")
    _finish(job, folder, facts)
    return folder


def new_folder(recipe: Recipe) -> Path:
    """The run's folder: as named, which must be free, or a new one under runs/."""
    if recipe.output.folder:
        folder = Path(recipe.output.folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already holds something; name another output.folder, or use --resume")
        return folder
    name = f"{Path(recipe.model.path).stem.lower()}-{datetime.now():%Y%m%d-%H%M%S}"
    numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in count(1))
    return next(folder for folder in numbered if not folder.exists())


def _require_space(job: Job, folder: Path) -> None:
    """The whole plan's need of disk, before anything is computed."""
    model, recipe = job.trainer.model, job.recipe
    trained = sum(p.numel() * 4 for p in model.trainable().values())
    whole = sum(p.numel() * 4 for p in model.parameters())
    need = 3 * trained * (recipe.checkpoint.keep + 2) + trained + (whole if recipe.output.merged else 0)
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"the run may need {need / 1e9:.1f} GB at {place} and {free / 1e9:.1f} GB are free; free some space, "
            "lower checkpoint.keep, or name another output.folder"
        )


def _resume(job: Job, folder: Path) -> Facts:
    trainer = job.trainer
    assert trainer.checkpoints
    facts = Facts.read(folder)
    then, here = facts.values["model"]["sha256"], job.loaded.digest
    if then != here:
        raise UserError(f"the base model has changed since the run began ({then[:12]} became {here[:12]}); restore it")
    for side, part in (("train", job.train), ("evaluation", job.evaluation)):
        if facts.values["data"][side]["digest"] != part.report.digest:
            raise UserError(f"the {side} data has changed since the run began; restore it, or start a new run")
    step, refused = trainer.checkpoints.newest()
    for reason in refused:
        print(f"passed over: {reason}", file=sys.stderr)
    trainer.resume(step)
    facts.write(status="running", finished=None)
    return facts


def _write_rows(job: Job, folder: Path) -> None:
    """The rows that the figures rest on, for anyone who wants to recompute them."""
    first = [job.trainer.documents[i] for i in job.trainer.stream.step(0)]
    target = folder / "data"
    target.mkdir()
    for name, rows in (
        ("evaluation", job.evaluation.used(job.evaluation.documents)),
        ("first_step", job.train.used(first)),
    ):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sinks(recipe: Recipe, folder: Path, trainer: Trainer, quiet: bool) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", resume_at=trainer.step or None)]
    if recipe.output.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", resume_at=trainer.step or None))
    sinks.append(Console(len(trainer.stream), quiet=quiet))
    return sinks


def _checks_only(trainer: Trainer) -> Iterator[Record]:
    assert trainer.preflight
    yield trainer.preflight(trainer)


def _feed(records: Iterable[Record], sinks: Sequence[Sink], facts: Facts) -> None:
    """Hand every record to every sink, and keep in the facts what outlives the run."""
    result = facts.values["result"]
    totals = {k: result.get(k) or 0 for k in ("steps", "tokens", "targets", "seconds", "peak_memory")}
    for record in records:
        for sink in sinks:
            sink.write(record)
        match record:
            case Checks():
                known = {v["name"]: v for v in facts.values["verdicts"]}
                known |= {v.name: asdict(v) for v in record.verdicts}
                failed = [v.name for v in record.verdicts if not v.passed]
                facts.write(
                    verdicts=list(known.values()),
                    void=facts.values["void"] or (failed[0] if failed else None),
                )
            case Alarm() if record.voids:
                facts.write(void=facts.values["void"] or record.name)
            case Evaluation():
                keeps_best = facts.values["recipe"]["checkpoint"]["keep_best"]
                if record.step == 0:
                    result["before"] = as_json(record)
                elif record.best or not keeps_best:  # the evaluation of the weights that the run ends with
                    result["after"] = as_json(record)
                facts.write()
            case Step():
                totals["steps"] = record.step
                totals["tokens"] += record.tokens
                totals["targets"] += record.targets
                totals["seconds"] += record.seconds
                totals["peak_memory"] = max(totals["peak_memory"], record.memory)
            case Saved():
                facts.write(result=result | totals | _speed(totals, facts))
    facts.write(result=facts.values["result"] | totals | _speed(totals, facts))


def _speed(totals: dict[str, Any], facts: Facts) -> dict[str, float | None]:
    quoted = totals["seconds"] and not facts.values["void"]
    return {
        "tokens_per_second": totals["tokens"] / totals["seconds"] if quoted else None,
        "targets_per_second": totals["targets"] / totals["seconds"] if quoted else None,
    }


@contextmanager
def _stopping_at_signals(trainer: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops the run at the next step boundary; a second one stops it at once."""

    def stop(number: int, _: FrameType | None) -> None:
        if trainer.stop:
            raise KeyboardInterrupt
        trainer.stop = True
        print(
            f"\n{signal.Signals(number).name}: saving at the next step boundary; again to stop at once",
            file=sys.stderr,
        )

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(job: Job, folder: Path, facts: Facts) -> None:
    """Export, read back, report, and say what can be done next."""
    kinds = ["adapter"] if facts.values["model"]["adapter"] else ["model"]
    if job.recipe.output.merged and kinds == ["adapter"]:
        kinds.append("merged")
    try:
        exports = [_export(job, kind, folder, folder / kind, facts) for kind in kinds]
    except UserError:
        facts.write(status="failed", finished=now())
        pages.write(folder)
        raise
    facts.write(status="finished", finished=now(), next=_next_commands(folder, kinds))
    page = pages.write(folder)
    pages.card(folder, folder)
    _print_end(folder, page, exports, facts)


def _export(job: Job, kind: str, folder: Path, target: Path, facts: Facts) -> Export:
    """Write ``kind`` to ``target`` with its card. Raises UserError, leaving nothing, if it reads back wrong."""
    write = export_adapter if kind == "adapter" else export_merged
    probe = [d.tokens[:128].tolist() for d in job.evaluation.documents[:PROBE]]
    with atomic_folder(target) as scratch:
        export = replace(write(job.trainer.model, job.loaded, scratch, probe), path=str(target))
        others = [e for e in facts.values["exports"] if e["path"] != export.path]
        facts.write(exports=[*others, asdict(export) | {"passed": export.passed}])
        if not export.passed:
            raise UserError(
                f"the {kind} reads back with logits that differ by {export.difference:.2e}, above the bound "
                f"{export.bound:.2e}, and was not kept; please report it with the model's config"
            )
        pages.card(folder, scratch)
    return export


def _next_commands(folder: Path, kinds: Sequence[str]) -> list[str]:
    commands = [f'truetune generate {folder} --prompt "..."', f"truetune report {folder}"]
    if kinds == ["adapter"]:
        commands.append(f"truetune export {folder} --merged")
    return commands


def _print_end(folder: Path, page: Path, exports: Sequence[Export], facts: Facts) -> None:
    lines = [f"run      {folder}", f"report   {page}"]
    for e in exports:
        lines.append(f"{e.kind:8} {e.path}  (logits read back within {e.difference:.1e}, bound {e.bound:.1e})")
    lines += ["next:", *(f"  {command}" for command in facts.values["next"])]
    print("\n".join(lines))


def generate(path: Path, prompts: Iterable[str], max_tokens: int) -> Iterator[str]:
    """Greedy answers of a run (its exported model) or of any model folder, one per prompt."""
    path = Path(path)
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    whole = next((path / k for k in ("merged", "model") if (path / k).is_dir()), None)
    base = whole
    if base is None and (adapter / "adapter_config.json").is_file():
        base = Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    dtype = pick_dtype("auto", pick_device("auto"))
    loaded = load(str(base or path), dtype=dtype)
    model: Any = loaded.model
    if whole is None and base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.to(pick_device("auto")).eval()
    tokenizer = loaded.tokenizer
    for prompt in prompts:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        tokens, _ = answer(model, ids, max_tokens, loaded.stop_ids)
        yield str(tokenizer.decode(tokens, skip_special_tokens=True))


def export(folder: Path, kind: str, to: Path | None = None) -> Path:
    """Write ``kind`` ("adapter" or "merged") of a run from its best or newest checkpoint; where it is."""
    facts = _facts_of(folder)
    job = assemble(spelling.read(str(folder / "recipe.yaml")), folder)
    checkpoints = job.trainer.checkpoints
    assert checkpoints
    step, _ = checkpoints.newest()
    job.trainer.resume(step)
    if job.trainer.best and job.trainer.keep_best:
        job.trainer.resume(job.trainer.best.step)
    kind = kind if facts.values["model"]["adapter"] else "model"
    done = _export(job, kind, folder, to or folder / kind, facts)
    print(f"{done.path}  (logits read back within {done.difference:.1e}, bound {done.bound:.1e})")
    return Path(done.path)


def report(folder: Path) -> Path:
    """Make the report of a run again."""
    _facts_of(folder)
    return pages.write(folder)


def _facts_of(folder: Path) -> Facts:
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} is no run folder (it has no run.json); name one under runs/")
    return Facts.read(folder)
