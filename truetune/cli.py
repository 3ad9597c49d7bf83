"""The command line. Every command reads what it was given, calls one function, and prints what it returns.

Whatever takes time to import is imported inside the command that needs it, so that ``--help`` is instant.
A fault that the user can mend is one line on stderr and exit status 2; any other exception is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from truetune import bench
from truetune.commands import group
from truetune.errors import UserError

if TYPE_CHECKING:
    from truetune.recipe import Recipe


app = group("Train language models: fast, and verified to be real.")
show = group("Print what there is to choose from.")
app.add_typer(show, name="show")
app.add_typer(bench.app, name="bench")

RecipeAndKeys = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE|KEY=VALUE", help="A recipe's file or name, then keys such as train.steps=100."),
]
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is wrong, and where the result is.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, an object a line; words for people go to stderr.")]


@contextmanager
def _standard_output(for_json: bool) -> Iterator[TextIO | None]:
    """Standard output if JSON is to be all that is there: whatever else is printed goes to standard error."""
    if not for_json:
        yield None
        return
    stream = sys.stdout
    with redirect_stdout(sys.stderr):
        yield stream


def _say_version(wanted: bool) -> None:
    if wanted:
        from truetune import __version__

        typer.echo(f"truetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of ``truetune``."""
    # So that a recipe can name the user's own as module:attribute; last, so that it hides nothing installed.
    sys.path.append(str(Path.cwd()))
    for stream in (sys.stdout, sys.stderr):  # what it cannot spell must not end a run
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports: of kernels nobody asked for
    app(prog_name="truetune")


@app.command()
def train(
    arguments: RecipeAndKeys = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show and check all, train nothing.")] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train as the recipe says; for a start: truetune train quickstart model.path=MODEL."""
    recipe = _recipe(arguments or [], resume)
    from truetune.run import Interrupted
    from truetune.run import train as run_train

    try:
        command = shlex.join(["truetune", "train", *(arguments or []), *(["--dry-run"] if dry_run else [])])
        with _standard_output(json) as records:
            folder = run_train(recipe, resume=resume, dry_run=dry_run, quiet=quiet, records=records, command=command)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from None
    if quiet and not json:
        typer.echo(folder)


@app.command()
def inspect(
    arguments: RecipeAndKeys = None,
    rows: Annotated[
        list[int] | None, typer.Option("--row", metavar="N", min=0, help="Show this training row; may be repeated.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write it as a self-contained HTML page as well.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what would be trained on, token by token, without loading or training the model."""
    recipe = _recipe(arguments or [], None)
    from truetune import inspection

    with _standard_output(json) as stream:
        found = inspection.inspect(recipe, rows or ())
        if page:
            inspection.write_page(found, page)
        if stream:
            _print_json(stream, asdict(found))
    if not json:
        inspection.write(found)
        if page:
            typer.echo(f"\npage  {page}")
    if found.refused:
        raise UserError(found.refused)


@app.command()
def prove(arguments: RecipeAndKeys = None, quiet: Quiet = False, json: Json = False) -> None:
    """Try every promise of this program on the recipe's own model and data; takes minutes."""
    recipe = _recipe(arguments or [], None)
    from truetune.promises import PROMISES, proof_folder
    from truetune.promises import prove as tried

    folder = proof_folder(recipe)
    width, held = max(map(len, PROMISES)), 0
    with _standard_output(json) as stream:
        for verdict in tried(recipe, folder):
            held += verdict.passed
            advice = "" if verdict.passed or not verdict.advice else f"; {verdict.advice}"
            if stream:
                _print_json(stream, asdict(verdict))
            elif not (quiet and verdict.passed):
                mark = "holds" if verdict.passed else "FAILS"
                typer.echo(f"{mark}  {verdict.name.ljust(width)}  {verdict.figure}{advice}")
        if not quiet:
            typer.echo(f"{held} of {len(PROMISES)} promises hold\nreport  {folder / 'report.html'}")
    if quiet and not json:
        typer.echo(folder)
    if held < len(PROMISES):
        raise typer.Exit(1)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="The folder of a run or a model.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="May be repeated; without it: lines of standard input."),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens an answer may have.")] = 128,
) -> None:
    """Answer prompts with what was trained."""
    prompts = prompt or [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise UserError("there is no prompt; give --prompt TEXT, or one prompt a line on standard input")
    from truetune.run import generate as run_generate

    for answer in run_generate(path, prompts, max_tokens):
        typer.echo(answer)


@app.command()
def export(
    run: RunFolder,
    merged: Annotated[
        bool | None, typer.Option("--merged/--adapter", help="The whole model (the default), or only the adapter.")
    ] = None,
    gguf: Annotated[
        str | None, typer.Option("--gguf", metavar="TYPE", help="A GGUF file of type f32, f16, bf16 or q8_0.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=1, help="A checkpoint that was kept; default: the best.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="Where to write it.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the trained model so that other programs load it."""
    if gguf is not None and merged is not None:
        raise UserError("--gguf writes the whole model in one file; leave out --merged and --adapter")
    if gguf not in (None, *GGUF_TYPES):
        raise UserError(f"--gguf is one of {', '.join(GGUF_TYPES)}, not {gguf}; choose one")
    from truetune.hints import commands_for
    from truetune.run import export as run_export

    with _standard_output(json) as stream:
        done = run_export(run, f"gguf-{gguf}" if gguf else "adapter" if merged is False else "merged", to, step)
    if stream:
        _print_json(stream, asdict(done) | {"passed": done.passed})
    elif quiet:
        typer.echo(done.path)
    else:
        typer.echo(f"{done.path}  (logits read back within {done.difference:.1e}, bound {done.bound:.1e})")
        if done.note:
            typer.echo(f"note: {done.note}", err=True)
        if commands := commands_for(done.kind, run, Path(done.path)):
            typer.echo("\n".join(["next:", *(f"  {command}" for command in commands)]))


@app.command()
def merge(
    parts: Annotated[
        list[str], typer.Argument(metavar="ADAPTER_OR_RUN=WEIGHT...", help="What is added, and how much.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where to write it.")],
    merged: Annotated[bool, typer.Option("--merged/--adapter", help="The whole model, or one adapter.")] = False,
) -> None:
    """Add adapters of one base with weights: one adapter, or the whole model."""
    from truetune.merging import merge as run_merge

    done = run_merge(parts, to, merged)
    typer.echo(f"{done.path}  (logits read back within {done.difference:.1e}, bound {done.bound:.1e})")


@app.command()
def report(run: RunFolder) -> None:
    """Write the page of a run and print its path."""
    from truetune.run import report as run_report

    typer.echo(run_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The folders of runs.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Where the page goes; default: RUN/compare.html.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Say what differs between runs, what came of each, and whether that can be compared at all."""
    from truetune.report.compare import compare as compared

    found, page = compared(runs, to)
    if json:
        _print_json(sys.stdout, found.as_json() | {"page": str(page)})
    elif quiet:
        typer.echo(page)
    else:
        for rows in (found.recipe, found.results):
            if rows:
                _print_table([("", *found.names), *((label, *cells) for label, cells in rows)])
                typer.echo()
        for doubt in found.doubts:
            typer.echo(f"ATTENTION  {doubt}")
        typer.echo(f"page  {page}")


@app.command()
def doctor(quiet: Quiet = False, json: Json = False) -> None:
    """Say what this machine has for training, and what it lacks."""
    from truetune.doctor import examine

    findings = list(examine())
    if json:
        for finding in findings:
            _print_json(sys.stdout, finding._asdict())
    elif shown := [f for f in findings if not quiet or f.state in ("warning", "missing")]:
        _print_table(shown)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


TABLES = {
    "formats": "What a row may be, told by its columns, and what of it is learned.",
    "sources": "Where rows may come from.",
    "families": "Families of models that were trained beside a plain loop, and what was found.",
    "optimizers": "Names for optimizer.name, with the options of each and their defaults.",
    "recipes": "The ready recipes, and what each is for.",
    "keys": "Every key that a recipe may have, what it may be, its default and its meaning.",
}
"""What ``truetune show`` prints as a table; ``truetune.choices`` has the rows."""


def _show(name: str) -> Callable[[], None]:
    def command() -> None:
        from truetune.choices import SHOWN

        _print_table(SHOWN[name]())

    return command


for _name, _purpose in TABLES.items():
    show.command(_name, help=_purpose)(_show(_name))


@show.command()
def schedules(
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE.svg", help="Also draw them as a picture.")] = None,
) -> None:
    """Names for schedule.name, drawn with a warm-up, with the options of each and their defaults."""
    _show("schedules")()
    if to:
        from truetune.report.shapes import write_picture

        write_picture(to)
        typer.echo(f"picture  {to}")


@show.command()
def recipe(arguments: RecipeAndKeys = None) -> None:
    """Every key with its value after the defaults, and its meaning; * marks what is written."""
    from truetune.spelling import describe

    keys = describe(*_split(arguments or []))
    _print_table((d.key, "*" if d.written else "", d.value, d.description) for d in keys)


@show.command()
def schema() -> None:
    """The JSON schema of recipes, for editors that complete them."""
    import json

    from truetune.choices import schema as recipes

    typer.echo(json.dumps(recipes(), indent=2))


@show.command()
def checkpoints(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folders of runs.")],
) -> None:
    """The checkpoints of runs: where, how large, and whether every file is as it was written."""
    from truetune.training.checkpoint import Checkpoints, verify

    rows = []
    for run in runs:
        if not (run / "checkpoints").is_dir():
            raise UserError(f"{run} has no folder of checkpoints; give the folder of a run")
        kept = Checkpoints(run / "checkpoints")
        for folder in map(kept.path, kept.steps()):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            try:
                verify(folder)
                state = "intact"
            except UserError as error:
                state = str(error)
            rows.append((str(folder), f"{size / 1e6:.1f} MB", state))
    _print_table(rows)


def _recipe(arguments: Sequence[str], resume: Path | None) -> Recipe:
    """The recipe that was asked for, whose model and data are there as far as a path can tell."""
    from truetune.data.sources import kind
    from truetune.models.find import find

    recipe = _read_recipe(arguments, resume)
    find(recipe.model.path, recipe.model.revision)
    for source in (recipe.data.source, *(part.source for part in recipe.data.sources), recipe.evaluation.source):
        if source:
            kind(source)
    return recipe


def _read_recipe(arguments: Sequence[str], resume: Path | None) -> Recipe:
    from truetune.spelling import read

    if resume is None:
        return read(*_split(arguments))
    if arguments:
        raise UserError(f"--resume goes on with the recipe of {resume}; leave out {' '.join(arguments)}")
    own = resume / "recipe.yaml"
    if not own.is_file():
        raise UserError(f"{resume} is not the folder of a run, it has no recipe.yaml; check the path")
    return read(str(own))


def _split(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The recipe, if the first argument is one, and the keys."""
    if arguments and "=" not in arguments[0]:
        return arguments[0], arguments[1:]
    return None, arguments


def _print_json(stream: TextIO, values: Mapping[str, Any]) -> None:
    """One line of JSON."""
    import json

    stream.write(json.dumps(values, default=str) + "\n")
    stream.flush()


def _print_table(rows: Iterable[Sequence[str]]) -> None:
    """Columns of text, two spaces apart; plain, so that it can be piped."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
