"""The house rules that no linter knows. Each rule is a function from sources to faults, and is seen to fail."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from truetune.optim import OPTIMIZERS
from truetune.recipe import Recipe
from truetune.schedules import SCHEDULES
from truetune.spelling import SECTIONS

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "docs" / "papers.md"
LONGEST_FILE, LONGEST_FUNCTION = 450, 80
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MACHINE_PATHS = (str(ROOT), f"{Path.home()}/", f"{tempfile.gettempdir()}/")
"""Where this checkout, the user's files and passing files are, on whatever machine the test runs."""

Sources = dict[str, str]
"""Path, relative to the root, to text."""


def sources(*folders: str) -> Sources:
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


# Size.


def too_long(texts: Sources) -> Iterator[str]:
    for name, text in texts.items():
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            yield f"{name} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"{name}:{node.lineno} {node.name} has {lines} lines"


def test_no_file_and_no_function_is_too_long() -> None:
    assert not list(too_long(sources("truetune", "tools", "reproductions")))


def test_too_long_is_seen() -> None:
    body = "    x = 1\n"
    assert not list(too_long({"a.py": "def f():\n" + body * 79 + "y = 1\n" * 370}))
    assert list(too_long({"a.py": "def f():\n" + body * 80})) == ["a.py:1 f has 81 lines"]
    assert list(too_long({"a.py": "y = 1\n" * 451})) == ["a.py has 451 lines"]


# Swallowed errors, and calls that run code that comes with data.


def unsafe(texts: Sources) -> Iterator[str]:
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if fault := _swallows(node) or _runs_code(node):
                yield f"{name}:{getattr(node, 'lineno', 0)} {fault}"


def _swallows(node: ast.AST) -> str | None:
    wide = {"Exception", "BaseException"}
    if isinstance(node, ast.ExceptHandler):
        if node.type is None:
            return "bare except"
        caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
        if caught & wide and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
            return "except of every exception without a raise"
    if isinstance(node, ast.Call) and _name(node.func) == "suppress" and {_name(a) for a in node.args} & wide:
        return "suppress of every exception"
    return None


def _runs_code(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        found = {module.partition(".")[0] for module in modules} & PICKLES
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found |= {"torch.load" for alias in node.names if alias.name == "load"}
        return f"import of {found.pop()}" if found else None
    if not isinstance(node, ast.Call):
        return None
    function = ast.unparse(node.func)
    if function.removeprefix("builtins.") in {"eval", "exec", "compile", "__import__", "torch.load", "os.system"}:
        return f"call of {function}"
    given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    for option in ("trust_remote_code", "allow_pickle", "shell"):
        if given.get(option) is True:
            return f"{option}=True"
    return None


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def test_no_error_is_swallowed_and_no_foreign_code_is_run() -> None:
    assert not list(unsafe(sources("truetune", "tools", "reproductions")))


@pytest.mark.parametrize(
    "statement",
    [
        "try: f()\nexcept: raise",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (OSError, BaseException) as e: print(e)",
        "with contextlib.suppress(Exception): f()",
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from joblib import load",
        "from torch import nn, load",
        "__import__('pickle')",
        "os.system('ls')",
        "subprocess.run(text, shell=True)",
        "torch.load(file)",
        "load(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_is_seen(statement: str) -> None:
    assert len(list(unsafe({"a.py": statement}))) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "model.eval()",
        "try: f()\nexcept OSError: pass",
        "try: f()\nexcept Exception as e: raise UserError(str(e)) from e",
        "load(path, trust_remote_code=recipe.model.trust_remote_code)",
    ],
)
def test_what_is_safe_is_let_pass(statement: str) -> None:
    assert not list(unsafe({"a.py": statement}))


# Every key of a recipe is read.


def reads(texts: Sources) -> set[tuple[str, str]]:
    """(section, key) for every ``section.key`` in a function, directly or by a local name for the section.

    A local name is one that its function assigns from ``<anything>.section``, or a parameter that is annotated
    with the section's class. Other ways to read a key are not seen: write ``recipe.section.key``.
    """
    found: set[tuple[str, str]] = set()
    for text in texts.values():
        for scope in ast.walk(ast.parse(text)):
            if isinstance(scope, ast.FunctionDef):
                names = dict(_local_names(scope))
                found |= {
                    (section, node.attr)
                    for node in ast.walk(scope)
                    if isinstance(node, ast.Attribute) and (section := _section(node.value, names))
                }
    return found


def _local_names(scope: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    classes = {section.__name__: name for name, section in SECTIONS.items()}
    for argument in scope.args.args + scope.args.kwonlyargs:
        if argument.annotation and (section := classes.get(_name(argument.annotation))):
            yield argument.arg, section
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=False) if both else [(target, value)]  # type: ignore[attr-defined]
            for left, right in pairs:
                if isinstance(left, ast.Name) and isinstance(right, ast.Attribute) and right.attr in SECTIONS:
                    yield left.id, right.attr


def _section(node: ast.expr, names: dict[str, str]) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr if node.attr in SECTIONS else "recipe" if node.attr == "recipe" else None
    if isinstance(node, ast.Name):
        return "recipe" if node.id == "recipe" else names.get(node.id)
    return None


def keys() -> set[tuple[str, str]]:
    """Every key of a recipe; ``version`` apart, which is read before there is a recipe."""
    whole = {("recipe", name) for name in Recipe.model_fields if name != "version"}
    return whole | {(name, key) for name, section in SECTIONS.items() for key in section.model_fields}


def test_every_key_of_a_recipe_is_read() -> None:
    texts = sources("truetune")
    del texts["truetune/recipe.py"]
    assert not sorted(keys() - reads(texts))


def test_a_key_that_nothing_reads_is_seen() -> None:
    text = """
def f(recipe, adapter: Adapter):
    held_out, seed = recipe.evaluation, recipe.train.seed
    return held_out.rows, adapter.rank, recipe.device, other.rank, job.recipe.data.split

def g(held_out):
    return held_out.every
"""
    read = reads({"a.py": text})
    assert {("evaluation", "rows"), ("adapter", "rank"), ("recipe", "device"), ("data", "split")} <= read
    assert {("train", "seed"), ("recipe", "evaluation")} <= read
    assert not {("evaluation", "every"), ("data", "rows"), ("model", "path")} & read
    assert keys() > read & keys() and ("model", "path") in keys() - read


# What the repository holds.


def machine_paths(texts: Sources) -> Iterator[str]:
    for name, text in texts.items():
        for number, line in enumerate(text.splitlines(), start=1):
            if any(path in line for path in MACHINE_PATHS):
                yield f"{name}:{number} {line.strip()[:80]}"


def test_no_file_of_the_repository_names_a_path_of_one_machine() -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = {name: ROOT / name for name in names if (ROOT / name).is_file()}
    assert "pyproject.toml" in files
    texts = {name: file.read_text(encoding="utf-8", errors="replace") for name, file in files.items()}
    assert not list(machine_paths(texts))


def test_a_machine_path_is_seen() -> None:
    for path in MACHINE_PATHS:
        assert len(list(machine_paths({"a": f"x\ncd '{path}'"}))) == 1
    assert not list(machine_paths({"a": "~/runs/x runs/x ./x docs/x.md"}))


# The list of papers.


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table: method, paper, state, where."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith(("| Method", "|---"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def wrong_rows(text: str) -> Iterator[str]:
    for row in rows(text):
        if len(row) != 4 or row[2] not in ("works", "planned"):
            yield f"{row[0]}: four cells, the third works or planned"
            continue
        places = re.findall(r"`([^`]+)`", row[3])
        if bool(places) != (row[2] == "works"):
            yield f"{row[0]}: has a place in the code exactly if it works"
        yield from (f"{row[0]}: there is no {place}" for place in places if not (ROOT / place).is_file())


def unlisted(text: str) -> set[str]:
    working = " ".join(row[0] for row in rows(text) if row[2] == "works")
    return {*OPTIMIZERS, *SCHEDULES} - set(re.findall(r"`([^`]+)`", working))


def test_papers_lists_what_is_there_and_nothing_else_as_working() -> None:
    text = PAPERS.read_text(encoding="utf-8")
    assert len(rows(text)) > 80
    assert not list(wrong_rows(text)) and not unlisted(text)


def test_a_wrong_list_of_papers_is_seen() -> None:
    for row in (
        "| A | B | works | |",
        "| A | B | works | `truetune/none.py` |",
        "| A | B | planned | `truetune/cli.py` |",
        "| A | B | soon | |",
    ):
        assert len(list(wrong_rows(row))) == 1
    assert not list(wrong_rows("| A | B | works | `truetune/cli.py` |\n| C | D | planned | |"))
    assert "adamw" in unlisted("| `adamw` | B | planned | |") and "adamw" not in unlisted(
        "| (`adamw`) | B | works | x |"
    )
