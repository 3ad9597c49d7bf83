"""Hostile input by the thousand: each is taken, or refused in one sentence, in seconds and without much memory.

``Target`` says how inputs are made and which product function takes them; ``try_all`` counts what came of them.
"""

from __future__ import annotations

import json
import random
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from truetune.errors import UserError

SECONDS = 10
GROWTH = 1 << 30
"""Bytes that one input may cost at its peak; a rendering alone may take half of it."""
SENTENCE = re.compile(r"\S[^\n]+(; |, but )[^\n]*([\w/)'\"\]]|\.\.\.)")
"""As in the tests of single bad inputs: a fault, and at the end what to do."""


@dataclass(frozen=True)
class Target:
    """``act`` gives an input of ``inputs`` to the product; ``share`` of all inputs are for this target."""

    name: str
    inputs: st.SearchStrategy[Any]
    act: Callable[[Any], None]
    share: float


def try_all(target: Target, count: int, seed: int | None = None) -> Counter[str]:
    """How many inputs were "accepted" and how many were "errors"; without a seed always the same inputs.

    Raises AssertionError, with the smallest such input, where one ends neither way.
    """
    tally: Counter[str] = Counter()

    @settings(
        max_examples=count,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def examine(value: Any) -> None:
        tally["errors" if refused(target.act, value) else "accepted"] += 1

    (hypothesis.seed(seed)(examine) if seed is not None else examine)()
    return tally


def refused(act: Callable[[Any], None], value: Any) -> bool:
    """Whether the input was refused, in a good sentence and within the bounds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = peak()
    sentence, late = None, False
    with _belt():
        try:
            act(value)
        except UserError as error:
            sentence = str(error)
        except _Endless:
            late = True
    assert not late, f"ran for more than {SECONDS} s"
    assert peak() - before < GROWTH, f"took {peak() - before:,} bytes"
    if sentence is None:
        return False
    assert SENTENCE.fullmatch(sentence) and sentence.isprintable(), f"no good sentence: {sentence}"
    return True


def peak() -> int:
    """The most bytes that were resident since the peak was last cleared."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class _Endless(BaseException):
    """No Exception, which the product may take for a fault of what it calls."""


@contextmanager
def _belt() -> Iterator[None]:
    """No input may hang the tests, or fill the machine's memory."""

    def stop(*_: object) -> None:
        raise _Endless

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 4 * GROWTH, hard))
    signal.alarm(SECONDS)
    try:
        yield
        assert signal.getsignal(signal.SIGALRM) is stop and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Values that nothing expects.

WORDS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", " ", "\0", "\x1b[2J", "\u2028", "\ud800", "\ufeff", "é" * 9, "../../etc", "NaN", "null", "a\nb", "x" * 5000]
)
NUMBERS = (
    st.sampled_from([-1, 0, 1, 2, 3, -(2**31), 2**31, 2**32, 2**63, 2**64, 10**12, 10**400, 1e308, 5e-324, -0.5])
    | st.integers()
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS
JUNK = (
    SCALARS
    | st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
    | st.integers(5, 3000).map(
        lambda depth: json.loads("[" * (depth % 400) + "]" * (depth % 400)) if depth % 400 else 0
    )
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the parts of a JSON value are."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: str, junk: Any) -> Any:
    """A copy of ``value`` with one change to the part at ``path``."""
    if not path:
        return {"wrap": [value], "remove": None, "twice": [value, value]}.get(change, junk)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key, rest = path[0], path[1:]
    if rest or change in ("replace", "wrap"):
        copy[key] = changed(copy[key], rest, change, junk)
    elif change == "remove":
        del copy[key]
    elif isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[f"{key}_"] = copy.pop(key)
    return copy


@st.composite
def mutants(draw: Any, original: Any, most: int = 3) -> Any:
    """The JSON value with a few parts removed, replaced, renamed, wrapped or doubled."""
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(paths(original))[1:] or [()]))
        change = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "twice"]))
        original = changed(original, path, change, draw(JUNK) if change == "replace" else None)
    return original


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes cut short, with some overwritten, inserted or repeated."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "write", "insert", "repeat"])):
            case "cut":
                data = data[:at]
            case "write":
                new = draw(st.binary(min_size=1, max_size=8))
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=8) | st.just(b"[" * 20_000)) + data[at:]
            case "repeat":
                data = data[:at] + data
    return data


def spelled(value: Any) -> bytes:
    """JSON as Python writes it, NaN and surrogates included."""
    return json.dumps(value).encode()


def json_files(original: Any, most: int = 3) -> st.SearchStrategy[bytes]:
    """The text of a JSON file: mostly a mutant of ``original``, else its damaged bytes, else something else."""
    mutant = mutants(original, most).map(spelled)
    return st.one_of(mutant, mutant, mutant, damaged(spelled(original)), JUNK.map(spelled), st.binary(max_size=20))


def fresh_seed() -> int:
    return random.SystemRandom().randrange(1 << 32)
