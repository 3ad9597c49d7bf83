"""``truetune bench``: what is fast on this machine, with the raw samples and the errors beside every figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from truetune.commands import group

app = group("Measure on this machine.")


@app.callback()
def _options() -> None:
    pass


@app.command("kernels")
def time_kernels(
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this operation; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each.")] = 7,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the raw samples there, as JSON.")] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="From now on run those of our kernels that won on this GPU.")
    ] = False,
) -> None:
    """Time every operation, forward and backward, against plain torch and torch's own.

    Samples are taken in turns, so that a slow minute of the machine meets all alike. On a GPU, where torch sees one,
    our Triton kernels are timed too.
    """
    from truetune.bench.kernels import write

    write(only or [], repeats, to, choose)


@app.command("training")
def compare_training(
    workload: Annotated[str, typer.Argument(metavar="WORKLOAD", help="small, medium, or a model's folder.")] = "small",
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="NAME[=PYTHON]", help="A peer, and the Python that has it; may be repeated."),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="MODE", help="lora, or full: every weight.")] = "lora",
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Timed steps of each side.")] = 5,
    documents: Annotated[int | None, typer.Option(min=2, metavar="N", help="Documents of a step.")] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe; may be repeated.")
    ] = None,
    keep_memory: Annotated[bool, typer.Option(help="Let glibc keep freed memory, on all sides.")] = True,
    apart: Annotated[
        bool, typer.Option("--apart", help="One side in memory at a time, started anew for every round.")
    ] = False,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the raw samples there, as JSON.")] = None,
) -> None:
    """Train beside other frameworks: same model, data, hyper-parameters and precision, in turns, on the CPU.

    Peers: loop, loop-single, loop-compiled, hf-trainer, trl, litgpt.
    """
    from truetune.bench.training import Asked, compare

    compare(Asked(workload, mode, peers or ["loop"], rounds, documents, keys or [], keep_memory, apart), to)


@app.command("optimizers")
def compare_optimizers(
    workload: Annotated[
        str | None, typer.Option(metavar="WORKLOAD", help="text (a small model from scratch), or a model's folder.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Only this method; may be repeated.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens of a run.")] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, metavar="H", help="Begin no run after so many hours; 0 only plans.")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep every run there, as a line of JSON.")] = None,
    tables: Annotated[
        list[Path] | None, typer.Option("--table", metavar="FILE", help="Only show what FILE has; may be repeated.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw it.")] = None,
) -> None:
    """Compare optimizers, each tuned until no change helps, by the tokens that tuned AdamW would need.

    Hours of work: what FILE has is not run again, so the same command goes on where it was stopped.
    """
    from truetune.bench.optimizers import Asked, optimize, show

    if tables:
        show(tables, methods or [], picture, idle=any(x is not None for x in (workload, tokens, hours, to)))
    else:
        optimize(Asked(workload or "text", methods or [], tokens, hours, to), picture)


@app.command("steps")
def time_steps(
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this rule; may be repeated.")] = None,
    layers: Annotated[int, typer.Option(min=1, max=30, metavar="N", help="Layers, of the model's 30.")] = 30,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of each.")] = 7,
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the raw samples there, as JSON.")] = None,
) -> None:
    """Time one optimizer step on the weights of a 135 M model, against public implementations of the same rule."""
    from truetune.bench.steps import write

    write(only or [], layers, repeats, to)


@app.command("table")
def show_table(
    results: Annotated[list[Path], typer.Argument(metavar="FILE...", help="What bench training wrote.")],
    picture: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw it.")] = None,
) -> None:
    """Print results of bench training as a table, and draw them."""
    from truetune.bench.table import noisy, read, table

    found = read(results)
    typer.echo(table(found))
    for sentence in (sentence for result in found for sentence in noisy(result)):
        typer.echo(f"note: {sentence}")
    if picture:
        from truetune.bench.picture import draw, speeds

        draw([speeds(result) for result in found], picture)
        typer.echo(f"picture: {picture}")
