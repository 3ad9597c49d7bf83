"""Mutation testing: small faults put into the program by Cosmic Ray, and whether the tests see them.

    python tools/mutants.py COUNT SEED RESULTS.json

Needs `pip install cosmic-ray pytest-timeout`. Draws COUNT places of ``PACKAGES`` where one of Cosmic Ray's operators
applies, and one mutant at each. Annotations are left out: nothing evaluates them. Each mutant stands in a copy of the
repository, where first the tests that are near it run, then the others; the copy without any must pass them. Two are
tried at a time. RESULTS.json gets one entry each, and those that it has already are not tried again; those that survive
are printed with their difference, to be judged by a reader.
"""

from __future__ import annotations

import ast
import difflib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("training", "data", "kernels", "optim", "checks")
NEAR = {
    "training": ["tests/unit/training", "tests/invariants"],
    "data": ["tests/unit/data", "tests/invariants/test_conservation.py"],
    "kernels": ["tests/numerics"],
    "optim": ["tests/unit/test_optim.py", "tests/invariants/test_parity.py"],
    "checks": ["tests/unit/checks"],
}
SECONDS = 900
"""For all tests of a mutant; a single one has a sixth of it."""
# The rest would see any change of the source as such, or look at none of it.
APART = ["--ignore=tests/unit/test_house.py", "--ignore=tests/unit/test_docs.py"]

Place = tuple[str, int, int]  # file, line, column
Mutant = tuple[str, str, int]  # file, operator, occurrence


def places() -> dict[Place, list[Mutant]]:
    """Every place where an operator applies, with the mutants that it has there."""
    found: defaultdict[Place, list[Mutant]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / "truetune" / package).glob("*.py")):
            name, code = str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
            hidden, tree = annotated(code), get_ast(code)
            for operator_name in plugins.operator_names():
                operator = plugins.get_operator(operator_name)
                if operator.arguments():
                    continue
                positions = (p for node in ast_nodes(tree) for p in operator().mutation_positions(node))
                for occurrence, ((line, column), _) in enumerate(positions):
                    if not any(a <= (line, column) < b for a, b in hidden):
                        found[name, line, column].append((name, operator_name, occurrence))
    return found


def annotated(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where annotations stand."""

    def annotations() -> Iterator[ast.expr | None]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                yield node.returns
            elif isinstance(node, ast.arg | ast.AnnAssign):
                yield node.annotation

    return [
        ((a.lineno, a.col_offset), (a.end_lineno or 0, a.end_col_offset or 0)) for a in annotations() if a is not None
    ]


def copied() -> Path:
    """A copy of what git tracks, and of what it would."""
    place = Path(tempfile.mkdtemp(prefix="mutants-"))
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


def tested(place: Path, tests: list[str]) -> str:
    """The first test that fails, "" if none does; one that takes for ever fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--timeout={SECONDS // 6}",
        *APART,
        *tests,
    ]
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"more than {SECONDS} s"
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else done.stdout[-200:] + done.stderr[-200:]


_place: Path | None = None


def mutated(mutant: Mutant) -> tuple[str, str]:
    """The code with the mutant in it, and how it differs."""
    name, operator, occurrence = mutant
    code = (ROOT / name).read_text(encoding="utf-8")
    changed = mutate_code(code, plugins.get_operator(operator)(), occurrence)
    return changed, "\n".join(difflib.unified_diff(code.splitlines(), changed.splitlines(), lineterm="", n=1))


def tried(mutant: Mutant) -> dict[str, Any]:
    """Put the mutant into this process's copy, run the tests, and take it out."""
    global _place  # noqa: PLW0603  # one copy for every process
    _place = _place or copied()
    name, operator, _ = mutant
    changed, difference = mutated(mutant)
    code = (_place / name).read_text(encoding="utf-8")
    (_place / name).write_text(changed, encoding="utf-8")
    try:
        near = NEAR[Path(name).parts[1]]
        killer = tested(_place, near) or tested(_place, ["tests", *(f"--ignore={path}" for path in near)])
    finally:
        (_place / name).write_text(code, encoding="utf-8")
    return {"file": name, "operator": operator, "difference": difference, "killed by": killer}


def main(count: int, seed: int, results: Path) -> None:
    found, chance = places(), random.Random(seed)
    drawn = [chance.choice(found[place]) for place in chance.sample(sorted(found), count)]
    outcomes = json.loads(results.read_bytes()) if results.is_file() else []
    done = {(o["file"], o["difference"]) for o in outcomes}
    left = [mutant for mutant in drawn if (mutant[0], mutated(mutant)[1]) not in done]
    if failing := tested(copied(), ["tests", "-n", "2"]):
        sys.exit(f"without any mutant this fails: {failing}")
    print(f"{len(found):,} places; {count} are drawn, {len(left)} of them to be tried", flush=True)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for outcome in pool.imap_unordered(tried, left):
            outcomes.append(outcome)
            results.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
            killer = outcome["killed by"] or f"SURVIVED\n{outcome['difference']}"
            print(f"{len(outcomes):3} {outcome['file']} {outcome['operator']}: {killer}", flush=True)
    survived = sum(not o["killed by"] for o in outcomes)
    print(f"{len(outcomes) - survived} of {len(outcomes)} were killed")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
