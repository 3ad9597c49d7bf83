"""The promises of this program, tried on the user's own model, data and machine: ``truetune prove``.

Each is a function of a ``Ground`` (the recipe, shortened and really run) that answers with one verdict: what was
measured, and the bound. The table is the list that users see.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from truetune import report
from truetune.errors import UserError
from truetune.facts import Facts
from truetune.promises.crash import crash_safety
from truetune.promises.gradients import accumulation, isolation, parity
from truetune.promises.ground import Ground
from truetune.promises.rows import conservation, silence
from truetune.promises.runs import determinism, resume, speed, training
from truetune.recipe import Recipe
from truetune.run import new_folder
from truetune.training.record import Verdict

PROMISES: dict[str, Callable[[Ground], Verdict]] = {
    "accumulation": accumulation,
    "isolation": isolation,
    "conservation": conservation,
    "exact resume": resume,
    "parity": parity,
    "real training": training,
    "nothing silent": silence,
    "determinism": determinism,
    "crash safety": crash_safety,
    "honest speed": speed,
}


def prove(recipe: Recipe, folder: Path | None = None) -> Iterator[Verdict]:
    """Yield the verdict on each promise as it is found; at the end a report holds them all.

    folder: of the short run and its report; else ``proof_folder``.
    Raises UserError as ``truetune train`` does, before the first verdict.
    """
    folder = folder or proof_folder(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as spare:
        try:
            ground = Ground.prepare(recipe, folder, Path(spare))
        except UserError as error:
            if not (folder / "run.json").is_file():  # it never began
                raise
            yield Verdict("the run itself", False, str(error), "")
            return
        verdicts = []
        for name, promise in PROMISES.items():
            verdict = _tried(name, promise, ground)
            verdicts.append(verdict)
            yield verdict
    facts = Facts.read(folder)
    facts.write(verdicts=[*facts.values["verdicts"], *(asdict(v) for v in verdicts)])
    report.write(folder)


def proof_folder(recipe: Recipe) -> Path:
    """Where the short run goes. Raises UserError if something is there."""
    named = recipe.output.folder
    if named:
        output = recipe.output.model_copy(update={"folder": f"{named.rstrip('/')}-proof"})
        return new_folder(recipe.model_copy(update={"output": output}))
    folder = new_folder(recipe)
    return folder.with_name(f"{folder.name}-proof")


def _tried(name: str, promise: Callable[[Ground], Verdict], ground: Ground) -> Verdict:
    try:
        verdict = replace(promise(ground), name=name)
    except UserError as error:
        verdict = Verdict(name, False, str(error), "")
    if not verdict.passed:
        ground.failed.append(name)
    return verdict
