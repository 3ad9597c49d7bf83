"""What the commands do: train, generate, export, report.

A run is a folder: recipe.yaml, run.json (facts), metrics.jsonl (records), data/ (held-out rows, and those of
the first step), checkpoints/, adapter/ or model/, merged/, report.html and README.md.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TextIO

import truetune
from truetune import registry, spelling
from truetune import report as pages
from truetune.assembly import Job, assemble, pick_device, pick_dtype, require_space
from truetune.data.template import bounded, render
from truetune.errors import UserError
from truetune.facts import Facts, moved, now, require_same_adapter, require_same_base, require_same_run, this_process
from truetune.hints import next_commands
from truetune.models.adapter import base_of, with_adapter
from truetune.models.export import Export, place_of, writer_of
from truetune.models.generate import answer
from truetune.models.load import load
from truetune.recipe import Recipe
from truetune.refusals import explained, loading_explained, way_on
from truetune.training.checkpoint import atomic_folder
from truetune.training.console import Console
from truetune.training.gradient import NonFinite
from truetune.training.patience import Interrupted, ended_by_signals, halted_by_signals, patiently, write_text
from truetune.training.record import BEST_LOST, Alarm, Checks, Record, Samples, Step
from truetune.training.sinks import JsonLines, JsonStream, Sink, TensorBoard, WeightsAndBiases, clean, first_looks
from truetune.training.watch import watch

PROBE = 4
"""Documents whose logits an export is compared on."""


def train(
    recipe: Recipe,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    records: TextIO | None = None,
    command: str | None = None,
) -> Path:
    """Run the recipe; the run folder, with everything that came of it.

    resume: a run folder whose newest intact checkpoint is taken up, with ``recipe`` being its own.
    dry_run: stop after the checks. quiet: print only alarms and failed checks, to stderr.
    records: gets each record as a line of JSON at once. command: what was typed, for the report; sys.argv may be
    another program's, and hold its secrets.
    Raises UserError for what the user can mend, Interrupted after a signal.
    """
    if resume and dry_run:
        raise UserError(f"a resumed run is checked in any case; leave out --dry-run to go on with {resume}")
    folder = Path(resume) if resume else new_folder(recipe)
    facts = _facts_of(folder) if resume else None
    if facts and facts.values.get("status") == "finished":
        raise UserError(f"{folder} is finished, so there is nothing to go on with; start a new run to train further")
    tell = _silent if quiet else _tell_what
    began = "stopped before the run began, and nothing was written; start it again"
    with ended_by_signals(began), loading_explained(recipe):
        job = assemble(recipe, folder, tell)
        require_space(job, folder)
    if reason := job.trainer.model.route.reason:
        tell("slow", f"documents run one at a time; packed they would not be apart ({reason})")
    for note in (*job.notes, *job.train.notes):
        tell("note", note)
    with explained(folder, recipe):
        if facts:
            _resume(job, facts)
        else:
            facts = _begin(job, folder, command)
        try:
            if not resume:
                patiently(lambda: _write_rows(job, folder), folder / "data")
            tell("checking", "gradients, movement, the loss, and that documents stay apart")
            _run(job, folder, facts, dry_run, quiet, records)
        except Interrupted as stop:
            _leave(folder, facts, status="interrupted")
            raise Interrupted(f"{stop}; {way_on(folder)}") from None
        except BaseException:
            _leave(folder, facts, status="failed", finished=now())
            raise
    return folder


def _begin(job: Job, folder: Path, command: str | None) -> Facts:
    _create(folder)
    patiently(lambda: spelling.write(anchored(job.recipe), folder / "recipe.yaml"), folder)
    return Facts.start(folder, job, command)


def _run(job: Job, folder: Path, facts: Facts, dry_run: bool, quiet: bool, records: TextIO | None) -> None:
    trainer = job.trainer
    sinks = _sinks(job, folder, facts, quiet, records)
    try:
        with halted_by_signals(trainer.halt):
            steps = trainer.check() if dry_run else watch(trainer.steps(), void=bool(facts.values["void"]))
            _feed(steps, sinks, facts)
    finally:
        for sink in sinks:
            sink.close()
    if trainer.stop or not (dry_run or trainer.complete):
        raise Interrupted(f"stopped after step {trainer.step}")
    if dry_run:
        facts.write(status="dry run", finished=now())
        page = _write_page(folder)
        if not quiet:
            stream = trainer.stream
            plan = f"{len(stream):,} steps over {stream.tokens:,} tokens, {stream.epochs:.3g} epochs"
            print(f"dry run    nothing was trained; the plan is {plan}\nreport     {page}")
        return
    with ended_by_signals("stopped before everything was exported"):
        _finish(job, folder, facts, quiet)


def _leave(folder: Path, facts: Facts, **changes: Any) -> None:
    """Say in the folder how the run ended, as far as the disk allows."""
    facts.values |= changes
    with suppress(OSError):
        facts.save()
        pages.write(folder)


def _write_page(folder: Path) -> Path:
    return patiently(lambda: pages.write(folder), folder / "report.html")


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that the run can be continued from any folder."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).expanduser().resolve()) if name and Path(name).expanduser().exists() else name

    several = tuple(part.model_copy(update={"source": absolute(part.source)}) for part in recipe.data.sources)
    started = {"path": absolute(recipe.adapter.path)} if recipe.adapter.path else {}
    schedule = recipe.schedule
    function = registry.resolve("schedule", spelling.table("schedule"), schedule.name)
    written = schedule.options.keys() & registry.paths("schedule", schedule.name, function)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": absolute(recipe.model.path)}),
            "adapter": recipe.adapter.model_copy(update=started),
            "schedule": schedule.model_copy(update={key: absolute(schedule.options[key]) for key in written}),
            "data": recipe.data.model_copy(update={"source": absolute(recipe.data.source), "sources": several}),
            "evaluation": recipe.evaluation.model_copy(update={"source": absolute(recipe.evaluation.source)}),
        }
    )


def new_folder(recipe: Recipe) -> Path:
    """The run's folder: as named, which must be free or hold nothing that was trained, or a new one under runs/."""
    if recipe.output.folder:
        folder = Path(recipe.output.folder).expanduser()
        facts = _facts_of(folder) if (folder / "run.json").is_file() else None
        over = facts and facts.values.get("status") in ("dry run", "failed", "interrupted", "running")
        unused = over and not any(folder.glob("checkpoints/step-*"))
        if facts and unused and facts.alive:
            raise UserError(f"a run has just begun in {folder} and is still there; name another output.folder")
        if not unused and not _is_free(folder):
            raise UserError(f"{folder} already holds something; name another output.folder, or use --resume")
        return folder
    name = f"{Path(recipe.model.path).stem.lower()}-{datetime.now():%Y%m%d-%H%M%S}"
    numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in count(1))
    return next(folder for folder in numbered if not folder.exists())


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't create {folder} ({error.strerror}); name another output.folder") from error


def _resume(job: Job, facts: Facts) -> None:
    trainer = job.trainer
    assert trainer.checkpoints
    require_same_base(facts, job)
    require_same_run(facts, job)
    step, refused = trainer.checkpoints.newest()
    _tell(refused)
    for change in moved(facts, job):
        print(f"note: {change}; the last digits may differ", file=sys.stderr)
    trainer.resume(step)
    facts.write(status="running", finished=None, truetune=truetune.__version__, process=this_process())


def _tell_what(doing: str, what: str) -> None:
    print(f"{doing:<10} {clean(what)}", flush=True)


def _silent(doing: str, what: str) -> None:
    """Say nothing."""


def _tell(refused: Sequence[str]) -> None:
    for reason in refused:
        print(f"passed over: {reason}", file=sys.stderr)


def _write_rows(job: Job, folder: Path) -> None:
    """The rows that the figures rest on, for anyone who wants to recompute them."""
    target = folder / "data"
    target.mkdir(exist_ok=True)
    for name, rows in (
        ("evaluation", job.evaluation.used(range(len(job.evaluation.documents)))),
        ("first_step", job.train.used(job.trainer.stream.step(0))),
    ):
        lines = [json.dumps(row, default=str) for row in rows]
        write_text(target / f"{name}.jsonl", "\n".join(lines) + "\n")


def _sinks(job: Job, folder: Path, facts: Facts, quiet: bool, records: TextIO | None) -> list[Sink]:
    recipe, trainer = job.recipe, job.trainer
    kept, resume_at = folder / "metrics.jsonl", trainer.step or None
    sinks: list[Sink] = [JsonLines(kept, resume_at, trainer.owed)]
    if recipe.output.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", resume_at))
    if recipe.output.wandb:
        key = f"{folder.name} {facts.values['started']}"
        sinks.append(WeightsAndBiases(folder, folder.name, key, facts.values["recipe"]))
    if records:
        sinks.append(JsonStream(records))
    sinks.append(Console(len(trainer.stream), quiet, sys.stderr if quiet else None, first_looks(kept)))
    return sinks


def _feed(records: Iterable[Record], sinks: Sequence[Sink], facts: Facts) -> None:
    """Hand every record to every sink, and keep in the facts what outlives the run."""
    try:
        for record in records:
            for sink in sinks:
                sink.write(record)
            match record:
                case Checks():
                    known = {v["name"]: v for v in facts.values["verdicts"]}
                    known |= {v.name: asdict(v) for v in record.verdicts}
                    facts.values["verdicts"] = list(known.values())
                    for verdict in record.verdicts:
                        if not verdict.passed:
                            _void(facts, verdict.name)
                case Alarm() if record.voids:
                    _void(facts, record.name)
            if not isinstance(record, Step | Samples):
                facts.write(result=_result(facts))
    except NonFinite:
        _void(facts, "the loss or the gradient was not finite")
        facts.write(result=_result(facts))
        raise
    facts.write(result=_result(facts))


def _void(facts: Facts, reason: str) -> None:
    """From now on the throughput of this run is not quoted; the first reason stays."""
    facts.values["void"] = facts.values["void"] or reason


def _result(facts: Facts) -> dict[str, Any]:
    """What came of the run, by the records in its file: one that was resumed has dropped what it repeats."""
    before = last = best = None
    keeps_best = facts.values["recipe"]["checkpoint"]["keep_best"]
    steps, peaks = 0, {"memory": 0, "gpu_memory": None, "gpu_reserved": None}
    totals: dict[str, float] = dict.fromkeys(("tokens", "targets", "tokens_once", "targets_once", "seconds"), 0)
    with (facts.file.parent / "metrics.jsonl").open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):  # one at a time: a long run has more than should be held at once
            match record["kind"]:
                case "step":
                    steps = record["step"]
                    peaks = {key: max(record.get(key) or 0, peak or 0) or peak for key, peak in peaks.items()}
                    for key in totals:
                        once = record.get(key)  # None in older records, which shared nothing
                        totals[key] += record[key.removesuffix("_once")] if once is None else once
                case "evaluation" if record["step"]:
                    last, best = record, record if record["best"] else best
                case "evaluation":
                    before = before or record
                case "alarm":
                    keeps_best &= record["name"] != BEST_LOST
    quoted = totals["seconds"] and not facts.values["void"]
    return {
        "before": before,
        "after": best if keeps_best else last,
        "steps": steps,
        **totals,
        **{f"peak_{key}": peak for key, peak in peaks.items()},
        "tokens_per_second": totals["tokens_once"] / totals["seconds"] if quoted else None,
        "targets_per_second": totals["targets_once"] / totals["seconds"] if quoted else None,
    }


def _finish(job: Job, folder: Path, facts: Facts, quiet: bool) -> None:
    """Export, read back, report, and say what can be done next."""
    kinds = ["adapter"] if facts.values["model"]["adapter"] else ["model"]
    if job.recipe.output.merged and kinds == ["adapter"]:
        kinds.append("merged")
    if job.recipe.output.gguf:
        kinds.append(f"gguf-{job.recipe.output.gguf}")
    places = [place_of(folder, kind) for kind in kinds]
    exports = [
        patiently(partial(_export, job, kind, folder, place, facts), place)
        for kind, place in zip(kinds, places, strict=True)
    ]
    facts.write(status="finished", finished=now(), next=next_commands(folder, kinds))
    page = _write_page(folder)
    patiently(lambda: pages.card(folder, folder), folder / "README.md")
    if not quiet:
        _print_end(folder, page, exports, facts)


def _export(job: Job, kind: str, folder: Path, target: Path, facts: Facts, note: str | None = None) -> Export:
    """Write ``kind`` to ``target`` with its card, which warns of ``note``.

    Raises UserError, leaving nothing, if it reads back wrong.
    """
    write = writer_of(kind)
    probe = [d.tokens[:128].tolist() for d in islice(job.evaluation.documents, PROBE)]
    with atomic_folder(target) as scratch:
        export = replace(write(job.trainer.model, job.loaded, scratch, probe), path=str(target))
        note = "; ".join(filter(None, (note, export.note))) or None
        others = [e for e in facts.values["exports"] if e["path"] != export.path]
        figures = {
            k: v if math.isfinite(v) else None for k, v in (("difference", export.difference), ("bound", export.bound))
        }
        facts.write(exports=[*others, asdict(export) | figures | {"passed": export.passed, "note": note}])
        if not export.passed:
            raise UserError(
                f"the {kind} reads back with logits that differ by {export.difference:.2e}, above the bound "
                f"{export.bound:.2e}, and was not kept; please report it with the model's config"
            )
        pages.card(folder, scratch)
    return export


def _print_end(folder: Path, page: Path, exports: Sequence[Export], facts: Facts) -> None:
    lines = [f"run       {folder}", f"report    {page}"]
    for e in exports:
        lines.append(f"{e.kind:9} {e.path}  (logits read back within {e.difference:.1e}, bound {e.bound:.1e})")
    lines += [f"note      {e.note}" for e in exports if e.note]
    lines += ["next:", *(f"  {command}" for command in facts.values["next"])]
    print("\n".join(lines))


def generate(path: Path, prompts: Iterable[str], max_tokens: int) -> Iterator[str]:
    """Greedy answers of a run (its exported model) or of any model folder, one per prompt."""
    path = Path(path)
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    whole = next((path / k for k in ("merged", "model") if (path / k).is_dir()), None)
    base = str(whole or path)
    adapted = whole is None and (adapter / "adapter_config.json").is_file()
    revision = None
    if (path / "run.json").is_file():
        _facts_of(path)
        if whole is None and not adapted:
            raise UserError(f"{path} has no exported model yet; finish the run, or: truetune export {path}")
    if adapted:
        base, revision = base_of(adapter)
    loaded = load(base, dtype=pick_dtype("auto", pick_device("auto")), revision=revision)
    model: Any = loaded.model
    tokenizer = loaded.tokenizer
    if adapted:
        model, tokenizer = with_adapter(loaded, adapter)
    model.to(pick_device("auto")).eval()
    for prompt in prompts:
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}]
            rendering = bounded("the prompt", partial(render, tokenizer, asked, "the prompt", prompt=True))
            ids = tokenizer(rendering.text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        tokens, _ = answer(model, ids, max_tokens, loaded.stop_ids)
        yield str(tokenizer.decode(tokens, skip_special_tokens=True))


def export(folder: Path, kind: str, to: Path | None = None, step: int | None = None) -> Export:
    """Write ``kind`` ("adapter", "merged", "gguf-TYPE") of a run and read it back.

    step: of the checkpoint, which the run must have kept; the default is the best or the newest.
    """
    facts = _facts_of(folder)
    if to and not _is_free(to):
        raise UserError(f"{to} already holds something; name another folder with --to")
    recipe = spelling.read(str(folder / "recipe.yaml"))
    with loading_explained(recipe):
        job = assemble(recipe, folder)
    require_same_base(facts, job)
    require_same_adapter(facts, job)
    checkpoints = job.trainer.checkpoints
    assert checkpoints
    kind = kind if facts.values["model"]["adapter"] or kind.startswith("gguf-") else "model"
    target = to or place_of(folder, kind)
    if step is None:
        newest, refused = checkpoints.newest()
        _tell(refused)
        job.trainer.resume(newest)
        if note := job.trainer.take_best():
            print(note, file=sys.stderr)
    else:
        if step not in (kept := checkpoints.steps()):
            others = ", ".join(map(str, kept)) or "none"
            raise UserError(f"{folder} kept no checkpoint of step {step} (of these: {others}); choose one of them")
        job.trainer.resume(step)
        job.trainer.take_averages()
        note = f"these are the weights of step {step}, not those that the run ended with"
        target = to or target.with_name(f"{target.name}-step-{step}")
    with explained(folder, recipe), ended_by_signals(f"stopped before {target} was complete"):
        return patiently(partial(_export, job, kind, folder, target, facts, note), target)


def report(folder: Path) -> Path:
    """Make the report of a run again."""
    _facts_of(folder)
    with explained(folder):
        return _write_page(folder)


def _facts_of(folder: Path) -> Facts:
    file = folder / "run.json"
    if not file.is_file():
        raise UserError(f"{folder} is no run folder (it has no run.json); name one under runs/")
    try:
        return Facts.read(folder)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); restore the file from a copy") from error
