"""YAML and TOML as plain values, with the place of every key.

YAML is read by the rules of its version 1.2, so that ``5e-4`` is a number and ``no`` a word, and ``none`` is
null as in Python. Tags, anchors and aliases are refused: a recipe is plain data, and one without aliases
can't grow when it is read. TOML has no null; there, a key is left out. Values are never interpolated.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from typing import Any, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from truetune.errors import UserError

KeyPath = tuple[str, ...]
Place = Callable[[int], str]
"""Line, counted from 1 -> how the user finds it."""

MOST_NESTED = 20
_LONG_KEY = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]+[ \t]*\.[ \t]*){40}")


def read_yaml(text: str, place: Place) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The values, and key path -> place. Raises UserError with the place of what can't be read."""
    node = _compose(text, place)
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        _refuse(place(node.start_mark.line + 1), "a recipe is made of keys; write for example device: cpu")
    places: dict[KeyPath, str] = {}
    return _plain(node, place, places), places


def read_toml(text: str, place: Place) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """As ``read_yaml``. The parser keeps no lines, so they are searched for afterwards."""
    if long := _LONG_KEY.search(text):  # the parser takes quadratic time for it
        _refuse(place(text.count("\n", 0, long.start()) + 1), "a key is nested too deeply; write section.key")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        _refuse(place(int(line[1]) if line else text.count("\n") + 1), f"{error}; mend this line of TOML")
    except RecursionError:
        _refuse(place(1), "values are nested too deeply; a recipe is sections of keys")
    except ValueError:  # of Python's int
        _refuse(place(1), "a number has thousands of digits; write a smaller one")
    places: dict[KeyPath, str] = {}
    section: KeyPath = ()
    for number, line_text in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+([^\[\]]+)\]", line_text)
        key = header or re.match(r"\s*([\w.\"' -]+?)\s*=", line_text)
        if key is None:
            continue
        path = tuple(part.strip(" \"'") for part in key[1].split("."))
        if header:
            section = path
        else:
            path = section + path
        for length in range(1, len(path) + 1):
            places.setdefault(path[:length], place(number))
    return values, places


def read_value(text: str, place: Place) -> Any:
    """One value of the command line: quoted text or a [list] as in YAML, else one plain scalar.

    So paths and regular expressions need no quotes. Raises UserError.
    """
    if text.startswith(("'", '"', "[")):
        node = _compose(text, place)
        return None if node is None else _plain(node, place, {})
    return _scalar(_Loader("").resolve(yaml.ScalarNode, text, (True, False)), text)


def half_a_character(text: str) -> bool:
    """Whether ``text`` holds half of a surrogate pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def write_yaml(values: dict[str, Any]) -> str:
    """Text that ``read_yaml`` reads back as the same values (tuples as lists)."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """Composes nodes, and refuses what makes YAML more than data."""

    nested = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        for fault, found in (
            ("anchors (&) and aliases (*) are no part of a recipe", event.anchor is not None),
            ("tags (!) are no part of a recipe", getattr(event, "tag", None) is not None),
            ("this is nested too deeply", self.nested > MOST_NESTED),
        ):
            if found:
                raise ComposerError(None, None, fault, event.start_mark)
        self.nested += 1
        node = super().compose_node(parent, index)
        self.nested -= 1
        if isinstance(node, yaml.ScalarNode) and half_a_character(node.value):
            raise ComposerError(None, None, "half of a surrogate pair is no text", event.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what ``_Loader`` would not read back as text."""

    def represent_text(self, text: str) -> yaml.Node:
        # Left to itself, PyYAML folds rare line breaks (U+0085, U+2028) and reads them back as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


# Tag -> plain scalars that have it. Python reads no int of thousands of digits; such a one is a float here.
_PLAIN = {
    "null": r"~|null|Null|NULL|none|None|NONE|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9](_?[0-9]){0,299}",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}  # else those of YAML 1.1 are inherited
    for _name, _pattern in _PLAIN.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})\\Z"), None)


def _compose(text: str, place: Place) -> yaml.Node | None:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        _refuse(place(line + 1), f"{error.problem}; mend this line of YAML")
    except ReaderError as error:
        line = text.count("\n", 0, error.position)
        _refuse(place(line + 1), f"the character {chr(error.character)!a} is not allowed; remove it")


def _plain(node: yaml.Node, place: Place, places: dict[KeyPath, str], path: KeyPath = ()) -> Any:
    """The node as plain values; fills ``places``."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.tag, node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, place, places, (*path, str(i))) for i, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = place(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            _refuse(here, "a key is one word; write key: value")
        inner = (*path, key_node.value)
        if key_node.value in values:
            _refuse(here, f"{'.'.join(inner)} is given twice; keep one")
        places[inner] = here
        values[key_node.value] = _plain(value_node, place, places, inner)
    return values


def _scalar(tag: str, text: str) -> Any:
    match tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _refuse(place: str, sentence: str) -> NoReturn:
    raise UserError(f"{place}: {sentence}") from None
