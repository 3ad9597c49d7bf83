"""Built-in data: the docstrings of the installed standard library as questions and answers.

It needs no network and no licence but Python's own; the same build of Python always has the same rows, and
other versions and builds nearly the same. A row is ``{"messages": [user, assistant], "module": ..., "name":
...}``: the question names one function, class, method or property (with its signature in half of the cases
that have one), and the answer is the opening of its docstring, cut to whole paragraphs or sentences. Dropped
are docstrings that are no prose, that only repeat another one, or that say less than five words.

The split is by top-level module, so that no module is in both halves. What a model can learn from the
train half about the test half is the style, the brevity and where to stop; hardly any facts.

Left out: modules that do something when imported, packages for installers and tests, code pages, what is
private, and what the machine's platform lacks (such modules raise ImportError).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from math import ceil
from types import ModuleType
from typing import Any, NamedTuple

SPLITS = ("train", "test")

QUESTIONS = (
    "What does `{}` do?",
    "Describe `{}` from Python's standard library.",
    "In Python, what is `{}` for?",
    "Explain `{}` briefly.",
)

_ACTIVE = ("antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo", "readline", "rlcompleter")
_TOOLS = ("test", "ensurepip", "distutils", "lib2to3", "venv")  # setuptools puts its own distutils in place
_TABLES = ("encodings", "pydoc_data", "ntpath", "nturl2path", "genericpath")  # code pages; os.path's others
_GONE = (  # from Python 3.12 and 3.13: without them every Python has nearly the same rows
    "aifc asynchat asyncore audioop cgi cgitb chunk crypt imghdr imp mailcap msilib nis nntplib ossaudiodev "
    "pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
)
_LEFT_OUT = frozenset((*_ACTIVE, *_TOOLS, *_TABLES, *_GONE.split()))
_PUBLIC_NAME = {"posixpath": "os.path"}
_HIDDEN_HOMES = frozenset({"posix", "nt", "genericpath"})

_LIMIT = 440  # characters of an answer: about 100 tokens of English
_ALIKE = 0.9  # Jaccard index of two answers' words from which the later one is dropped
_HELD_OUT = 0.09  # share of the modules; the salt 259 makes it the same share of the rows, of many modules

# "name(args) -> result" alone on a line, and the same before "-- what it does"
_SIGNATURE_LINE = re.compile(r"[\w.]+\s*\(.*\)\s*(?:(?:-+>|=).*)?|[\w.]+\(.*,")
_SIGNATURE_LEAD = re.compile(r"[\w.]+\(.*?\)\s*(?:-+>\s*[^:.]*?)?\s*(?:--|:)\s+")
_BLOCK = re.compile(
    r">>>|[:@](?:param|return|rtype|raise)|[-*=#|+]|\(.*\) = |\d+[.)] |[\w*]+ *:( |$)"
    r"|(?:[Kk]eyword )?[Aa]rg(?:ument)?s?\b.*:$|(?:Parameters|Returns?|Raises|Usage|Examples?|Notes?)\b:?$"
)
_BOILERPLATE = re.compile(
    r"Alias for |Same as |Deprecated|See |Built-in |Helper for |Internal|Abstract |Initialize self|"
    r"Like \S+\(|TODO|XXX|Undocumented|Not implemented|A?n? ?[Mm]ethod generated"
)


class _Entry(NamedTuple):
    module: str
    name: str
    thing: Any
    doc: str


def rows(split: str) -> list[dict[str, Any]]:
    """Docstrings of the installed standard library as questions and answers; nothing is downloaded.

    split: ``"train"`` or ``"test"``, always in the same order. The first call takes a second.
    """
    return [row for row in _collected() if _split_of(row["module"]) == split]


@cache
def _collected() -> list[dict[str, Any]]:
    """The rows of both splits, read by a bare interpreter.

    Here, other packages may have put their own functions into the library's modules (torch and transformers
    do), and a file of the user's may hide one of them; there, nothing but the library can be imported.
    """
    bare = [sys.executable, "-I", "-S", __file__]
    return json.loads(subprocess.run(bare, check=True, capture_output=True).stdout)


def _read() -> list[dict[str, Any]]:
    answered = [(entry, answer) for entry in _entries() if (answer := _answer(entry.doc))]
    kept = _distinct([_words_without_name(answer, entry) for entry, answer in answered])
    return [
        {
            "messages": [
                {"role": "user", "content": _question(entry)},
                {"role": "assistant", "content": answer},
            ],
            "module": entry.module,
            "name": entry.name,
        }
        for (entry, answer), keep in zip(answered, kept, strict=True)
        if keep
    ]


def _distinct(sets: list[frozenset[str]]) -> list[bool]:
    """Which sets have no earlier kept one with a Jaccard index of ``_ALIKE`` or more, nor under three words.

    Two sets that alike share one of the rarest words of each (prefix filtering: Chaudhuri, Ganti and
    Kaushik, 2006), so that each set meets few others.
    """
    count = Counter(word for words in sets for word in words)
    having: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
    kept = []
    for words in sets:
        rarest = sorted(words, key=lambda w: (count[w], w))[: len(words) - ceil(_ALIKE * len(words)) + 1]
        others = (other for word in rarest for other in having[word])
        new = len(words) >= 3 and all(len(words & o) < _ALIKE * len(words | o) for o in others)
        kept.append(new)
        if new:
            for word in rarest:
                having[word].append(words)
    return kept


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split_of(module: str) -> str:
    top = module.partition(".")[0]
    return "test" if _digest(f"split 259: {top}") < _HELD_OUT * 2**64 else "train"


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """(public name, module) of the standard library, packages before their submodules."""
    names = sorted(n for n in sys.stdlib_module_names - _LEFT_OUT if not n.startswith("_"))
    while names:
        name = names.pop(0)
        try:
            module = importlib.import_module(name)
        except ImportError:  # of another platform, or built without its library
            continue
        yield _PUBLIC_NAME.get(name, name), module
        children = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))]
        names[:0] = [f"{name}.{c}" for c in sorted(children) if not c.startswith("_") and c not in _LEFT_OUT]


def _entries() -> Iterator[_Entry]:
    """Everything public with a docstring of its own, each under the first public name that it has."""
    seen: set[int] = set()
    for module_name, module in _modules():
        exported = getattr(module, "__all__", ())
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            if not _at_home(thing, name, module, exported):
                continue
            members = sorted(vars(thing).items()) if inspect.isclass(thing) else []
            named = [(name, thing)] + [(f"{name}.{k}", m) for k, m in members if not k.startswith("_")]
            for path, member in named:
                member = getattr(member, "__func__", member)
                # vars, because a class without a docstring would show its parent's
                doc = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
                described = inspect.isroutine(member) or inspect.isdatadescriptor(member) or member is thing
                if described and isinstance(doc, str) and id(member) not in seen:
                    seen.add(id(member))
                    yield _Entry(module_name, path, member, inspect.cleandoc(doc))


def _at_home(thing: Any, name: str, module: ModuleType, exported: Any) -> bool:
    """Whether this module is where the thing belongs, not one that merely imports it."""
    home = getattr(thing, "__module__", None)
    if home == module.__name__:
        return True
    inner = isinstance(home, str) and (home.startswith((module.__name__ + ".", "_")) or home in _HIDDEN_HOMES)
    return inner and name in exported


def _answer(doc: str) -> str | None:
    """The docstring's opening prose, or None if it has none."""
    paragraphs = _prose(doc)
    if not paragraphs:
        return None
    text = paragraphs[0]
    if len(text) > _LIMIT:
        text = text[: text.rfind(". ", 0, _LIMIT) + 1]
    for paragraph in paragraphs[1:]:
        if len(text) + len(paragraph) >= _LIMIT:
            break
        text = paragraph if paragraph.startswith(text[:-1]) else f"{_ended(text)} {paragraph}"
    text = _ended(text)
    starts_well = re.match(r"[A-Z`'\"][\w`'\"(]* \S|A ", text) and not _BOILERPLATE.match(text)
    return text if starts_well and len(text.split()) >= 5 else None


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?", ".)", ".'", '."')) else text + "."


def _prose(doc: str) -> list[str]:
    """Leading paragraphs, each as one line, up to the first that is a list, a table or code."""
    doc = doc.strip()
    if lead := _SIGNATURE_LEAD.match(doc):
        doc = doc[lead.end() :]
        doc = doc[:1].upper() + doc[1:]
    lines = doc.split("\n")
    while lines and (not lines[0].strip() or _SIGNATURE_LINE.fullmatch(lines[0].strip())):
        lines.pop(0)
    paragraphs = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        block_lines = block.split("\n")
        clean = []
        for line in block_lines:
            if _BLOCK.match(line.strip()) or (line.startswith((" ", "\t"))):
                break
            clean.append(line.strip())
        text = re.sub(r"(:\w+:)?`+", "`", " ".join(" ".join(clean).split()))
        whole = len(clean) == len(block_lines)
        if not whole or text.endswith(":"):
            text = text[: f"{text} ".rfind(". ") + 1]  # what introduces a list goes with the list
        if text:
            paragraphs.append(text)
        if not whole or not text:
            break
    return paragraphs


def _words_without_name(answer: str, entry: _Entry) -> frozenset[str]:
    """What two answers must not share: their words, less endings, numbers and the thing's own name."""
    own = set(re.findall(r"[a-z]+", f"{entry.module} {entry.name}".lower()))
    return frozenset(w.rstrip("s") for w in re.findall(r"[a-z]{2,}", answer.lower()) if w not in own)


def _question(entry: _Entry) -> str:
    name = entry.name if entry.module == "builtins" else f"{entry.module}.{entry.name}"
    digest = _digest(name)
    if digest & 1:
        name += _signature(entry.thing)
    return QUESTIONS[digest // 2 % len(QUESTIONS)].format(name)


def _signature(thing: Any) -> str:
    """``(text, width=70)``, or nothing where there is none, or it is long or not the same in every run."""
    try:
        signature = inspect.signature(thing)
    except (
        TypeError,
        ValueError,
        AttributeError,
    ):  # the last: some defaults of 3.13 that inspect cannot find
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    text = re.sub(r"^\((?:self|cls|\$self)(?:, /)?(?:, )?", "(", text)
    return text if len(text) <= 80 and "<" not in text else ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what a module says while it is imported
        _found = _read()
    json.dump(_found, sys.stdout)
