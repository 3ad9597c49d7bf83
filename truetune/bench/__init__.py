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
) -> None:
    """Time every operation, forward and backward, against plain torch and torch's own.

    Samples are taken in turns, so that a slow minute of the machine meets all alike.
    """
    from truetune.bench.kernels import write

    write(only or [], repeats, to)
