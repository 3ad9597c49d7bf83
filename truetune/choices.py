"""What there is to choose from, as rows of words with state and source: ``truetune show``.

Every table is read from the dict literal that the program itself uses, so that none can list what is not there. What
is in such a table works: a method is entered when its test passes. Families of models are not chosen by name; what
was measured of them is read from ``results/``, which a clone of the repository has and an installed package has not.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import truetune
from truetune.recipe import Named, Recipe
from truetune.registry import spell, user_options
from truetune.spelling import SECTIONS, ready, table

Row = tuple[str, ...]
ROOT = Path(truetune.__file__).parents[1]
FAMILIES = ROOT / "results" / "trust" / "families"


def parts(kind: str) -> Iterator[Row]:
    """Optimizers or schedules: name, state, what it is and from which paper, options with defaults, file."""
    for name, function in table(kind).items():
        known: Mapping[str, inspect.Parameter] = user_options(kind, name, function)
        options = "  ".join(key if p.default is p.empty else f"{key}={spell(p.default)}" for key, p in known.items())
        yield name, "works", _purpose(function), options, _file(function)


def optimizers() -> Iterator[Row]:
    """As ``parts``, with the bytes of state that each keeps of an fp32 matrix m x n, m <= n, at rank r."""
    for name, state, purpose, *rest in parts("optimizer"):
        held = re.search(r"State: (.+) bytes\.", inspect.getdoc(table("optimizer")[name]) or "")
        yield name, state, purpose, f"{held[1]} bytes" if held else "", *rest


def schedules() -> Iterator[Row]:
    """As ``parts``, with each drawn."""
    from truetune.report.shapes import blocks, factors

    for name, state, *rest in parts("schedule"):
        yield name, state, blocks(factors(name)), *rest


def formats() -> Iterator[Row]:
    """What a row may be: name, state, its columns, what is learned, file."""
    from truetune.data.formats import FORMATS

    for name, form in FORMATS.items():
        yield name, "works", ", ".join(form.columns), _purpose(form.read), _file(form.read)


def sources() -> Iterator[Row]:
    """Where rows may come from: what is written, state, what it is, file."""
    from truetune.data.sources import BUILT_IN, SOURCES

    for name, (_, read) in BUILT_IN.items():
        yield name, "works", _purpose(read), _file(read)
    for kind, read_source in SOURCES.items():
        if kind != "built-in":
            yield kind, "works", _purpose(read_source), _file(read_source)


def families() -> Iterator[Row]:
    """Families of models that were trained beside a plain loop: name, state, what is special, route, file."""
    files = sorted(FAMILIES.glob("*.json"))
    if not files:
        yield "any", "not measured", "no results/trust/families here; each model is proven at its own start", "", ""
    for file in files:
        kept = json.loads(file.read_bytes())
        failed = kept.get("failed")
        state = f"fails: {failed}" if failed else "works"
        yield kept.get("family", file.stem), state, kept.get("features", ""), kept.get("route", ""), _told(file)


def recipes() -> Iterator[Row]:
    """The ready recipes: name, the line that says what each is for, file."""
    for name, path in ready().items():
        yield name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# "), _told(path)


def keys() -> Iterator[Row]:
    """Every key of a recipe: name, what it may be, default, meaning."""
    for name, info in Recipe.model_fields.items():
        if name not in SECTIONS:
            yield name, allowed(info.annotation), spell(info.default), info.description or ""
            continue
        section = SECTIONS[name]
        for key, inner in section.model_fields.items():
            default = "required" if inner.is_required() else spell(inner.default)
            yield f"{name}.{key}", allowed(inner.annotation), default, inner.description or ""
        if issubclass(section, Named):
            yield f"{name}.<option>", "", "", f"the options of the {name}: truetune show {name}s"


def allowed(annotation: Any) -> str:
    """What a value may be, in a recipe's words: ``lora | full``, ``integer or none``."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if isinstance(annotation, UnionType):
        return " or ".join(dict.fromkeys(allowed(member) for member in get_args(annotation)))
    words = {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "none"}
    return words.get(annotation, "list")


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, with the names of optimizers and schedules, for editors that complete them."""
    made = Recipe.model_json_schema()
    for kind in ("optimizer", "schedule"):
        name = made["$defs"][SECTIONS[kind].__name__]["properties"]["name"]
        own = {"pattern": r"^\w+(\.\w+)*:\w+$", "description": "your own, as module:attribute"}
        name["anyOf"] = [{"enum": list(table(kind))}, own]
    for section in made["$defs"].values():
        section["type"] = ["object", "null"]  # a section whose keys are all commented out
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | made


SHOWN: dict[str, Callable[[], Iterator[Row]]] = {
    "formats": formats,
    "sources": sources,
    "families": families,
    "optimizers": optimizers,
    "schedules": schedules,
    "recipes": recipes,
    "keys": keys,
}
"""What ``truetune show`` prints as a table."""


def _purpose(function: Callable[..., Any]) -> str:
    """The first sentence of its docstring, on one line."""
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return text.replace("``", "")


def _file(function: Callable[..., Any]) -> str:
    return _told(Path(inspect.getsourcefile(inspect.unwrap(function)) or ""))


def _told(file: Path) -> str:
    """The path as the repository has it; of what lies elsewhere, whole."""
    return file.resolve().relative_to(ROOT).as_posix() if file.resolve().is_relative_to(ROOT) else str(file)
