"""A name in a recipe -> the callable it stands for, and its options checked before anything is built.

Every kind of part has one dict literal, name -> callable (``OPTIMIZERS``, ``SCHEDULES``). A name that holds
a colon is the user's own, ``module:attribute``, and is called in the same way, so that any optimizer of torch
will do. What the signature says is all there is to know: options are its parameters, less the leading ones,
which the program supplies itself; what only ``**rest`` would take is refused, since nothing may ever read it.

There is no registration at import time, no plugin search and no entry point: a table is read, not filled.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from truetune.errors import UserError

SUPPLIED = {"optimizer": ("groups", "rate"), "schedule": ("total",)}
"""Kind -> the leading arguments that the program passes itself, by position; their names are free."""

OFFERED = {"optimizer": (), "schedule": ("plan",)}
"""Kind -> further arguments of the program's, by name, for what has a parameter of that name."""

_WORDS = {
    "a valid boolean": "true or false",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid list": "a list",
}
"""What pydantic calls a type -> what a recipe calls it."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def resolve(kind: str, table: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """What ``name`` stands for: an entry of ``table``, or the user's own as ``module:attribute``.

    Raises UserError for a name that is neither.
    """
    if ":" in name:
        return _import(kind, name)
    if name not in table:
        raise UserError(
            f'unknown {kind} "{name}"{suggestion(name, table)}; use one of {", ".join(table)}, '
            "or your own as module:attribute"
        )
    return table[name]


def bind(
    kind: str, table: Mapping[str, Callable[..., Any]], name: str, options: Mapping[str, Any], **offered: Any
) -> Callable[..., Any]:
    """What ``name`` stands for with its options bound; to be called with the arguments of ``SUPPLIED``.

    offered: the arguments of ``OFFERED``; what has no such parameter goes without.
    Options come in the types that the signature asks for: an int as a float, a list as a tuple.
    Raises UserError as ``resolve`` does, and for options with the first fault and the number of the others.
    """
    function = resolve(kind, table, name)
    found = list(faults(kind, name, function, options).values())
    if found:
        raise UserError(and_more(found))
    known = user_options(kind, name, function)
    chosen = {key: _convert(known[key], value) for key, value in options.items()}
    wanted = inspect.signature(function).parameters.keys() & OFFERED[kind]
    return partial(function, **chosen, **{key: offered[key] for key in wanted})


def faults(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, str]:
    """Option -> what is wrong with it, in one sentence; an option that is missing is a fault too.

    Raises UserError when ``function`` can't be called as its kind is.
    """
    allowed = user_options(kind, name, function)
    found = {}
    for key, value in options.items():
        if key in allowed:
            if misfit := _misfit(allowed[key], value):
                found[key] = f"{kind}.{key} is {spell(value)}, but {misfit}"
        else:
            choice = f"use one of {', '.join(allowed)}" if allowed else "remove it"
            found[key] = f'{kind} "{name}" has no option "{key}"{suggestion(key, allowed)}; {choice}'
    for key, parameter in allowed.items():
        if parameter.default is parameter.empty and key not in options:
            found[key] = f'{kind} "{name}" needs the option "{key}"; add {kind}.{key}=...'
    return found


def user_options(kind: str, name: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a recipe may set: all but those that the program supplies.

    Raises UserError when there are fewer than it supplies, or no signature to see (some builtins).
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # an annotation that only a type checker imports: names are checked, types are not
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(f'{kind} "{name}" shows no signature; wrap it in a function of yours') from None
    supplied = SUPPLIED[kind]
    leading = [p.name for p in signature.parameters.values() if p.kind in _POSITIONAL][: len(supplied)]
    if len(leading) < len(supplied):
        raise UserError(f'{kind} "{name}" must take ({", ".join(supplied)}) first; wrap it in a function of yours')
    return {
        key: parameter
        for key, parameter in signature.parameters.items()
        if key not in (*leading, *OFFERED[kind])
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def paths(kind: str, name: str, function: Callable[..., Any]) -> list[str]:
    """The options that are paths, as annotated."""
    return [key for key, option in user_options(kind, name, function).items() if option.annotation is Path]


def suggestion(name: str, allowed: Collection[str]) -> str:
    """`` (did you mean "x"?)`` for the nearest allowed name, or nothing."""
    near = get_close_matches(name, allowed, n=1, cutoff=0.55)
    return f' (did you mean "{near[0]}"?)' if near else ""


def spell(value: Any) -> str:
    """A value as a recipe spells it: ``none``, ``true``, ``"text"``, ``[0.9, 0.95]``."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def and_more(found: Sequence[str]) -> str:
    """The first fault, and the second if it is the only other, else how many more there are."""
    first, *others = found
    if len(others) == 1:
        return f"{first}; and {others[0]}"
    return f"{first} (and {len(others)} more faults)" if others else first


def _import(kind: str, name: str) -> Callable[..., Any]:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise UserError(f'{kind} "{name}" is not of the form module:attribute; write it so, without .py')
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but lacks one of its own imports is a fault of that module: show it whole.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f'{kind} "{name}": there is no module "{error.name}"; run where it can be imported') from None
    if not hasattr(module, attribute):
        raise UserError(
            f'{kind} "{name}": module "{module_name}" has no "{attribute}"'
            f"{suggestion(attribute, dir(module))}; name a function of it"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f'{kind} "{name}" is a {type(function).__name__}; name a function')
    return function


def _misfit(parameter: inspect.Parameter, value: Any) -> str | None:
    try:
        _convert(parameter, value)
    except ValidationError as error:
        return must_be(error.errors())
    return None


def must_be(errors: Collection[Mapping[str, Any]]) -> str:
    """What pydantic says of one value, in a recipe's words; the members of a union are joined by "or"."""
    said = []
    for error in errors:
        sentence = re.sub(r"^\w+ should", "must", error["msg"].replace(" after validation", ""))
        for theirs, ours in _WORDS.items():
            sentence = sentence.replace(theirs, ours)
        said.append(sentence)
    return " or ".join(dict.fromkeys(said)).replace(" or must be ", " or ")


def _convert(parameter: inspect.Parameter, value: Any) -> Any:
    """Strict as JSON is: an int may stand for a float and an array for a tuple, nothing else."""
    annotation = parameter.annotation
    if annotation is parameter.empty or isinstance(annotation, str):
        return value
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticUserError:  # no type that a recipe could spell, so nothing to compare with
        return value
    return adapter.validate_json(json.dumps(value, default=str))
