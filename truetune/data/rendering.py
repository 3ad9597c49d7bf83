"""Rows to documents, a portion at a time, in this process or in several.

A portion is a pure function of its rows and of the renderer, so who makes it changes nothing. Other processes are
started only when the rows so far show that the rest would take long. They are new interpreters and no forks, since a
fork of a process with torch's threads may hang, and they exist on every system; they are spoken to in JSON and
safetensors, so that nothing is unpickled. What JSON would change of a row stays in this process.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from importlib import import_module
from importlib.metadata import version
from itertools import islice, tee
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from safetensors.numpy import load, save

from truetune.data import formats, traits
from truetune.data.batch import Document
from truetune.data.chat import Rendered, Renderer
from truetune.data.documents import Documents
from truetune.data.files import Row
from truetune.data.formats import Example
from truetune.errors import UserError

PORTION = 256
"""Rows of a portion."""
SOON, LONG = 1.0, 10.0
"""Seconds before which no process is started, and of work that must then be left; a start takes one or two."""

Numbered = list[tuple[int, Row]]


@dataclass
class Account:
    """What became of rows; adds up over portions.

    cut:   targets that truncation took away, by their position in the row: int64 [the longest row].
    chat:  how many rows a chat template rendered; longest: tokens of the longest row, before anything was cut;
           first_too_long: number of the first row above the limit. The rest is as in ``dataset.DataReport``.
    """

    chat: int = 0
    longest: int = 0
    first_too_long: int | None = None
    truncated: int = 0
    cut_rows: int = 0
    empty: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    targets_by_role: Counter[str] = field(default_factory=Counter)
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, other: Account) -> None:
        if self.first_too_long is None:
            self.first_too_long = other.first_too_long
        self.longest = max(self.longest, other.longest)
        self.cut = added(self.cut, other.cut)
        for name in (f.name for f in fields(self) if f.name not in ("first_too_long", "longest", "cut")):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, number: int, rendered: Rendered, answers: Sequence[str], chat: bool, max_length: int) -> None:
        self.chat += chat
        self.longest = max(self.longest, rendered.length)
        if rendered.length > max_length and self.first_too_long is None:
            self.first_too_long = number
        self.notes.update(rendered.notes)
        self.truncated += rendered.length > max_length
        self.cut_rows += len(rendered.cut) > 0
        if len(rendered.cut):
            self.cut = added(self.cut, np.bincount(rendered.cut))
        if rendered.dropped is not None:
            self.dropped[rendered.dropped] += 1
        self.tokens_by_role.update(rendered.tokens_by_role)
        self.targets_by_role.update(rendered.targets_by_role)
        if rendered.documents:
            self.empty += sum(not answer.strip() for answer in answers)


def added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two counts by position, the shorter filled with zeros: int64."""
    total = np.zeros(max(len(a), len(b)), dtype=np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


class Portion(NamedTuple):
    """traits: ``traits.TRAITS`` [rows], where the shape asks for them."""

    documents: Documents
    account: Account
    traits: np.ndarray | None = None


class Shape(NamedTuple):
    """How rows are read: a key of ``FORMATS``, and the column of a row's weight. traits: whether each is told of."""

    form: str
    weight: str | None = "weight"
    traits: bool = False


def render(rows: Numbered, shape: Shape, renderer: Renderer) -> Portion:
    """Raises UserError, which names the row, for the first that is not of the format or that cannot be rendered."""
    account = Account()
    documents: list[Document] = []
    seen: list[tuple[Example, Rendered]] = []
    examples, asked = tee((number, formats.read(shape.form, row, number, shape.weight)) for number, row in rows)
    for rendered, (number, row), (_, example) in zip(renderer.rendered(examples), rows, asked, strict=True):
        if formats.given_weight(row, shape.weight) is not None:
            account.notes[f"weighed in the loss by their column {shape.weight}"] += 1
        documents += rendered.documents
        if shape.traits:
            seen.append((example, rendered))
        answers, chat = formats.answers(renderer.chosen(example)), renderer.as_chat(example) is not None
        account.count(number, rendered, answers, chat, renderer.max_length)
    return Portion(Documents.of(documents), account, traits.table(seen, renderer) if shape.traits else None)


def portions(
    rows: Iterator[tuple[int, Row]], total: int, shape: Shape, renderer: Renderer
) -> Generator[Portion, None, None]:
    """The rows' portions in their order. Raises UserError as ``render`` does."""
    some = iter(lambda: list(islice(rows, PORTION)), [])
    began, done = time.monotonic(), 0
    for portion in some:
        yield render(portion, shape, renderer)
        done += len(portion)
        spent = time.monotonic() - began
        if spent > SOON and spent * (total - done) / done > LONG and cores() > 1 and can_move(renderer):
            break
    else:
        return
    with Processes(cores(), shape, renderer) as processes:
        yield from processes.map(some)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_move(renderer: Renderer) -> bool:
    """Whether another process would render the same: the tokenizer is no model's code, and survives being saved."""
    if not type(renderer.tokenizer).__module__.startswith("transformers."):
        return False
    with tempfile.TemporaryDirectory(prefix="truetune-") as folder:
        renderer.tokenizer.save_pretrained(folder)
        return identity(_renderer(start_of(renderer, folder))) == identity(renderer)


def start_of(renderer: Renderer, folder: str) -> dict[str, Any]:
    """All that another process needs to render the same, as JSON; the tokenizer was saved in the folder."""
    kind = type(renderer.tokenizer)
    return {"folder": folder, "kind": [kind.__module__, kind.__qualname__], "options": options(renderer)}


def _renderer(start: dict[str, Any]) -> Renderer:
    module, name = start["kind"]  # by its class, since to find that out takes transformers seconds
    words = getattr(import_module(module), name).from_pretrained(start["folder"])
    return Renderer(words, **start["options"] | {"stop_ids": frozenset(start["options"]["stop_ids"])})


def options(renderer: Renderer) -> dict[str, Any]:
    """What the renderer was made with, beside the tokenizer, as JSON."""
    names = [name for name in inspect.signature(Renderer).parameters if name != "tokenizer"]
    values = {name: getattr(renderer, name) for name in names}
    return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in values.items()}


def identity(renderer: Renderer) -> dict[str, Any]:
    """All that documents depend on beside the rows and their format, as JSON."""
    words = renderer.tokenizer
    backend = cast(Any, words).backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(backend.encode("utf-8", "surrogatepass")).hexdigest(),
        "kind": type(words).__qualname__,
        "special": {name: str(token) for name, token in sorted(words.special_tokens_map.items())},
        "begins": words("")["input_ids"],
        "template": renderer.template_digest,
        "options": options(renderer),
        "versions": [version(name) for name in ("truetune", "transformers", "tokenizers", "jinja2")],
    }


class Processes:
    """``count`` interpreters that render; leaving the context ends them."""

    def __init__(self, count: int, shape: Shape, renderer: Renderer) -> None:
        self._shape, self._renderer = shape, renderer
        self._idle: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        self._folder = tempfile.TemporaryDirectory(prefix="truetune-")
        renderer.tokenizer.save_pretrained(self._folder.name)
        start = start_of(renderer, self._folder.name) | {"shape": shape}
        self._helpers = [Helper(start) for _ in range(count)]
        for helper in self._helpers:
            self._idle.put(helper)
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.end()
        self._threads.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def map(self, some: Iterator[Numbered]) -> Iterator[Portion]:
        pending: deque[Future[Portion]] = deque()
        for rows in some:
            pending.append(self._begun(rows))
            if len(pending) > 3 * len(self._helpers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _begun(self, rows: Numbered) -> Future[Portion]:
        spelled = _spelled(rows)
        if spelled is not None:
            return self._threads.submit(self._ask, spelled)
        here: Future[Portion] = Future()
        try:
            here.set_result(render(rows, self._shape, self._renderer))
        except UserError as fault:  # told when its turn comes, so that the first fault is the first row's
            here.set_exception(fault)
        return here

    def _ask(self, spelled: bytes) -> Portion:
        helper = self._idle.get()
        try:
            return helper.ask(spelled)
        finally:
            self._idle.put(helper)


def _spelled(rows: Numbered) -> bytes | None:
    """The rows as a line of JSON; None if they would come back otherwise."""
    try:
        text = json.dumps(rows)
    except (TypeError, ValueError):
        return None
    return text.encode() if [tuple(pair) for pair in json.loads(text)] == rows else None


class Helper:
    """One process that renders what it is asked to."""

    def __init__(self, start: dict[str, Any]) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from truetune.data.rendering import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for whoever started it
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._start = json.dumps(start).encode() + b"\n"

    def ask(self, spelled: bytes) -> Portion:
        """Raises UserError as ``render`` does, and if the process is not there any more."""
        try:
            self._to.write(self._start + spelled + b"\n")
            self._to.flush()
            self._start = b""
            header = json.loads(self._from.readline())
            blob = self._from.read(header.get("size", 0))
            if len(blob) < header.get("size", 0):
                raise ValueError("the answer was cut")
        except (OSError, ValueError) as error:
            raise UserError(
                "a process that tokenises ended before its rows were done; see what it said above, and free some memory"
            ) from error
        if "fault" in header:
            raise UserError(header["fault"])
        columns = load(blob)
        told: dict[str, Any] = {k: Counter(v) if isinstance(v, dict) else v for k, v in header["account"].items()}
        account = Account(**told, cut=columns.pop("cut"))
        kept = columns.pop("traits", None)
        return Portion(Documents(columns), account, None if kept is None else kept.view(traits.TRAITS))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._to, self._from):
            try:
                pipe.close()
            except OSError:  # what was still to be written has no reader
                continue


def serve() -> None:
    """What a process of ``Helper`` does: answer one line after another until there are no more."""
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    start = json.loads(asked.readline())
    renderer = _renderer(start)
    gc.disable()  # between portions there is next to nothing to look through
    gc.freeze()
    for line in asked:
        _answer(line, Shape(*start["shape"]), renderer, answers)
        gc.collect()


def _answer(line: bytes, shape: Shape, renderer: Renderer, answers: BinaryIO) -> None:
    try:
        documents, account, kept = render([tuple(pair) for pair in json.loads(line)], shape, renderer)
    except UserError as fault:
        answers.write(json.dumps({"fault": str(fault)}).encode() + b"\n")
    else:
        blob = save(
            {**documents.columns, "cut": account.cut, **({} if kept is None else {"traits": kept.view(np.uint8)})}
        )
        told = {name: value for name, value in vars(account).items() if name != "cut"}
        answers.write(json.dumps({"account": told, "size": len(blob)}).encode() + b"\n" + blob)
    answers.flush()
