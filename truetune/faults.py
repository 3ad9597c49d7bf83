"""What is wrong with a recipe: from what pydantic says of it to one sentence per key.

The same sentences serve a recipe that is written (``truetune.spelling`` adds where) and one that is built in Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from truetune import registry
from truetune.notation import KeyPath

DETAILS = {"faults": "details"}
"""The context of a validation whose caller makes the sentences itself."""


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields of a recipe that are parts with keys of their own."""
    return {
        name: info.annotation
        for name, info in model.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }


def items(model: type[BaseModel]) -> dict[KeyPath, type[BaseModel]]:
    """The keys of a recipe whose values are lists of parts, with the class of these."""
    found: dict[KeyPath, type[BaseModel]] = {}
    for name, section in sections(model).items():
        for key, info in section.model_fields.items():
            inner = get_args(info.annotation)[:1] if get_origin(info.annotation) is tuple else ()
            if inner and isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
                found[name, key] = inner[0]
    return found


def sentences(
    error: ValidationError,
    model: type[BaseModel],
    values: Mapping[str, Any],
    pick: Callable[[Sequence[KeyPath]], KeyPath] = lambda keys: keys[0],
) -> dict[KeyPath, str]:
    """Key -> what is wrong with it, of a recipe of class ``model`` made from ``values``.

    pick: of keys that do not go together, the one that is said to be wrong.
    """
    parts, listed = sections(model), items(model)
    details_of: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "conflict":
            path = pick([tuple(key.split(".")) for key in detail["ctx"]["keys"]])
        else:
            # Recipes are two levels deep, and two more in a list of parts; what follows in pydantic's location is its
            # own (the members of a union).
            path = tuple(map(str, detail["loc"]))
            path = path[: 4 if path[:2] in listed else 2 if path[0] in parts else 1]
        details_of.setdefault(path, []).append(detail)
    return {path: _sentence(path, details, model, values) for path, details in details_of.items()}


def _sentence(path: KeyPath, details: Sequence[Any], model: type[BaseModel], values: Mapping[str, Any]) -> str:
    key, detail, parts = called(path), details[0], sections(model)
    part = items(model)[path[:2]] if len(path) > 2 else parts.get(path[0], model)
    match detail["type"]:
        case "conflict":
            return detail["ctx"]["sentence"]
        case "missing":
            return f"{key} is missing ({part.model_fields[path[-1]].description}); add {key}=..."
        case "extra_forbidden":
            return _unknown(path, part, parts)
        case "model_type":
            return f"{key} is a section; write its keys under it ({', '.join(part.model_fields)})"
    value: Any = values
    for name in path:
        value = value[int(name) if isinstance(value, list | tuple) else name]
    hint = ""
    if detail["type"] == "literal_error":
        hint = registry.suggestion(str(value), re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
    elif detail["type"] == "string_type" and not isinstance(value, list):
        hint = "; put it in quotes"
    return f"{key} is {registry.spell(value)}, but {registry.must_be(details)}{hint}"


def called(path: KeyPath) -> str:
    """The key as a user would write it: ``data.sources[0].weight``."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(path))


def _unknown(path: KeyPath, part: type[BaseModel], parts: Mapping[str, type[BaseModel]]) -> str:
    """Nearest is the same key in another section, else the nearest key in this one."""
    elsewhere = [f'"{name}.{path[-1]}"' for name, other in parts.items() if path[-1] in other.model_fields]
    near = registry.suggestion(path[-1], part.model_fields)
    hint = f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere else near
    return f'unknown key "{called(path)}"{hint}; use one of {", ".join(part.model_fields)}'
