"""How a recipe is written: a YAML or TOML file, ``key=value`` on the command line, a recipe that ships.

Spelling is strict. A key that nothing reads, a value that does not fit and an option that its optimizer or
schedule does not have are one sentence with ``file:line``, the nearest right name, and what is allowed.
How the two file formats are read is in ``truetune.notation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from truetune import faults, registry
from truetune.errors import UserError
from truetune.notation import MOST_NESTED, KeyPath, half_a_character, read_toml, read_value, read_yaml, write_yaml
from truetune.recipe import VERSION, Named, Part, Recipe
from truetune.training.patience import write_text

READY = Path(__file__).parent / "recipes"
SUFFIXES = (".yaml", ".yml", ".toml")
MOST_BYTES = 1 << 17

SECTIONS = faults.sections(Recipe)
ITEMS = faults.items(Recipe)


def read(path_or_name: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the ready recipe of that name, with ``key=value`` overrides upon it.

    Keys of overrides are dotted; of two for one key the last wins. Raises UserError with the first fault,
    where it is written, and the number of the others.
    """
    spelled = _gather(path_or_name, overrides)
    recipe = _validate(spelled)
    _check_parts(recipe, spelled)
    return recipe


def write(recipe: Recipe, path: Path) -> None:
    """Write as YAML what differs from the defaults, and the version; ``read`` gives back an equal recipe."""
    text = write_yaml({"version": VERSION, **recipe.model_dump(exclude_defaults=True)})
    write_text(path, text)


class Described(NamedTuple):
    """One key of a recipe: its value as it is spelled, whether it was written, and what it means."""

    key: str
    value: str
    written: bool
    description: str


def describe(path_or_name: str | None, overrides: Sequence[str] = ()) -> Iterator[Described]:
    """Every key of the recipe with its value after the defaults; required keys may still be open.

    Raises UserError for what is wrong with those that are written.
    """
    spelled = _gather(path_or_name, overrides)
    still_open = [
        (name, key)
        for name, section in SECTIONS.items()
        for key, info in section.model_fields.items()
        if info.is_required() and isinstance(spelled.values[name], dict) and key not in spelled.values[name]
    ]
    data = spelled.values["data"]
    if isinstance(data, dict) and not (data.get("source") or data.get("sources")):
        still_open.append(("data", "source"))
    for name, key in still_open:
        spelled.values[name][key] = "required"
    recipe = _validate(spelled)
    for name, value in recipe:
        if not isinstance(value, Part):
            yield Described(name, registry.spell(value), (name,) in spelled.places, "")
            continue
        for key, inner in value:
            info = type(value).model_fields.get(key)
            if (name, key) in ITEMS:
                inner = [part.model_dump(exclude_defaults=True) for part in inner]
            shown = "required" if (name, key) in still_open else registry.spell(inner)
            meaning = (info.description or "") if info else f"option of this {name}"
            yield Described(f"{name}.{key}", shown, (name, key) in spelled.places, meaning)


def ready() -> dict[str, Path]:
    """The recipes that ship, by name."""
    return {path.stem: path for path in sorted(READY.glob("*.yaml"))}


def table(kind: str) -> Mapping[str, Callable[..., Any]]:
    """The names of a kind of part. Imported late, since optimizers bring torch, which takes seconds."""
    if kind == "optimizer":
        from truetune.optim import OPTIMIZERS

        return OPTIMIZERS
    from truetune.schedules import SCHEDULES

    return SCHEDULES


@dataclass
class _Spelled:
    """What was written, before it is checked, and where."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where ``path`` is written, else where the section around it is."""
        around = (path[:length] for length in range(len(path), 0, -1))
        return next((self.places[p] for p in around if p in self.places), self.source)

    def order(self, path: KeyPath) -> int:
        """Position among all that is written; what is missing comes last."""
        return list(self.places).index(path) if path in self.places else len(self.places)

    def last(self, paths: Sequence[KeyPath]) -> KeyPath:
        """Of ``paths`` the one that is written last."""
        return max((path for path in paths if path in self.places), key=self.order, default=paths[0])

    def override(self, text: str) -> None:
        """Set what one ``key=value`` says. Raises UserError if it is none."""
        key, equals, value = (part.strip() for part in text.partition("="))
        path = tuple(key.split("."))
        if not equals or not all(path):
            raise UserError(f'command line: "{text}" is not key=value; write for example train.steps=100')
        if len(path) > MOST_NESTED:
            raise UserError(f"command line: {key} is nested too deeply; write section.key=value")
        if half_a_character(text):
            raise UserError(f"command line: {text} is not UTF-8; mend the encoding of the terminal")
        place = f"command line: {text}"
        if not value:
            raise UserError(f"{place} has no value; write {key}=none if none is meant")
        section = self.values
        for length, part in enumerate(path[:-1], start=1):
            self.places.setdefault(path[:length], place)
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[path[-1]] = read_value(value, lambda _: place)
        for replaced in [p for p in self.places if p[: len(path)] == path]:
            del self.places[replaced]  # what is written last also stands last
        self.places[path] = place


def _gather(path_or_name: str | None, overrides: Sequence[str]) -> _Spelled:
    spelled = _Spelled("command line") if path_or_name is None else _read_file(_locate(path_or_name))
    for name in SECTIONS:
        if spelled.values.get(name) is None:  # absent, or all its keys are commented out
            spelled.values[name] = {}
    for text in overrides:
        spelled.override(text)
    version = spelled.values.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        newer = type(version) is int and version > VERSION
        advice = "upgrade Truetune" if newer else f"write version: {VERSION}, or leave it out"
        raise UserError(
            f"{spelled.place(('version',))}: the recipe has version {registry.spell(version)}, "
            f"but this Truetune reads {VERSION}; {advice}"
        )
    return spelled


def _locate(path_or_name: str) -> Path:
    path = Path(path_or_name)
    if path.suffix not in SUFFIXES:
        known = ready()
        if path_or_name in known:
            return known[path_or_name]
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a recipe, or continue its run with --resume {path}")
        raise UserError(
            f'there is no ready recipe "{path_or_name}"{registry.suggestion(path_or_name, known)}; '
            f"use one of {', '.join(known)}, or a file that ends in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES]
        raise UserError(f"there is no file {path}{registry.suggestion(path.name, beside)}; check the path")
    return path


def _read_file(path: Path) -> _Spelled:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than any recipe; check the path")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    read_text = read_toml if path.suffix == ".toml" else read_yaml
    return _Spelled(str(path), *read_text(text, lambda line: f"{path}:{line}"))


def _validate(spelled: _Spelled) -> Recipe:
    try:
        return Recipe.model_validate(spelled.values, context=faults.DETAILS)
    except ValidationError as error:
        raise _first(faults.sentences(error, Recipe, spelled.values, spelled.last), spelled) from None


def _check_parts(recipe: Recipe, spelled: _Spelled) -> None:
    """Names and options of the named parts, where they are not the default."""
    found: dict[KeyPath, str] = {}
    for kind in registry.SUPPLIED:
        part: Named = getattr(recipe, kind)
        if part.name == type(part).model_fields["name"].default and not part.options:
            continue
        try:
            function = registry.resolve(kind, table(kind), part.name)
            wrong = registry.faults(kind, part.name, function, part.options)
        except UserError as error:
            wrong = {"name": str(error)}
        found |= {(kind, key): sentence for key, sentence in wrong.items()}
    if found:
        raise _first(found, spelled)


def _first(wrong: Mapping[KeyPath, str], spelled: _Spelled) -> UserError:
    paths = sorted(wrong, key=spelled.order)
    return UserError(registry.and_more([f"{spelled.place(path)}: {wrong[path]}" for path in paths]))
