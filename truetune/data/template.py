"""Chat templates, which come with a model and are programs, run within bounds of time, memory and output.

transformers renders them in Jinja's sandbox, which keeps them from files and from Python's internals, but not
from looping for years or filling the memory. Here the renderings of one row share a limit of processor time
(a timer, whose signal ends them) and of memory (the soft limit of the address space is lowered for as long as
they take). Both need Linux and the main thread; elsewhere only the length of the output is bounded. The signal
acts between two operations of Python, so one that takes minutes on its own is not interrupted. Powers are the
plain way to such a one, and no template that is meant well needs them, so they are refused; others remain, such
as dividing numbers with millions of digits, which only a process of its own would end.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2

from truetune.errors import UserError

LINUX = sys.platform == "linux"
if LINUX:
    import resource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5.0
"""Processor time that the renderings of one row may take; honest ones take less than a thousandth of it."""
MEMORY = 1 << 29
"""Bytes that the process may grow by while they run."""
CHARACTERS = 1 << 18
"""Characters that a rendering may have, beside four for every one of its messages."""

Span = tuple[int, int]  # from the first character to the one after the last
Done = TypeVar("Done")
_ADVICE = "use a template that comes with the model, or shorten what it is given"


_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")


class Rendering(NamedTuple):
    """text, and the spans that the template marks as generated; None if it marks nothing anywhere."""

    text: str
    marks: list[Span] | None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    where: str,
    template: str | None = None,
    prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> Rendering:
    """The messages as text, with the generation prompt if ``prompt``; to be called within ``bounded``.

    template: in place of the tokenizer's own.
    Raises UserError, which begins with ``where``, for whatever keeps the template from it.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = template or tokenizer.get_chat_template()
        _refuse_powers(template)
        marked = bool(_MARKS.search(template))
        options: dict[str, Any] = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt}
        options |= {"return_assistant_tokens_mask": marked, **tokenizer.special_tokens_map}
        found: Any = render_jinja_template([messages], **options)
        (text,), spans = found
        text.encode()  # half of a surrogate pair is no text
    except (MemoryError, RecursionError):
        raise
    except Exception as fault:  # a template is a program, and may raise anything
        reason = " ".join(str(fault).split()).rstrip(".;") or type(fault).__name__
        raise UserError(f"{where}: the chat template refuses it: {reason[:300]}; change or remove it") from fault
    if len(text) > CHARACTERS and len(text) > (most := CHARACTERS + 4 * len(str(messages)) + 4 * len(str(tools))):
        raise UserError(f"{where}: the chat template writes {len(text):,} characters, above {most:,}; {_ADVICE}")
    return Rendering(text, spans[0] if marked else None)


def bounded(where: str, work: Callable[[], Done]) -> Done:
    """What ``work`` returns, which takes at most ``SECONDS`` and ``MEMORY``. Costs microseconds.

    Raises UserError, which begins with ``where``, when it would take more, or calls itself without end.
    """
    # No other thread can be interrupted, and to lower the limit of memory twice would be to keep it.
    limits = _limits if threading.current_thread() is threading.main_thread() else None
    try:
        try:
            if limits:
                limits.set()
            return work()
        finally:  # no context manager: the timer or Ctrl-C may come in between, and must not leave the limits in place
            if limits:
                try:
                    limits.lift()
                except BaseException:
                    limits.lift()
                    raise
    except _Late:
        fault = f"runs for more than {SECONDS:g} s"
    except MemoryError:
        fault = f"takes more than {MEMORY >> 20} MiB of memory"
    except RecursionError:
        fault = "is nested too deeply, or calls itself without end"
    raise UserError(f"{where}: the chat template {fault}; {_ADVICE}")


class _Late(BaseException):
    """Time is over. No Exception, so that nothing on the template's way catches it."""


class _Limits:
    """The limits, which ``set`` puts in place and ``lift`` takes back.

    The signal is SIGVTALRM, which a SIGALRM of others does not meet; its handler stays, and does nothing
    between two uses.
    """

    def __init__(self) -> None:
        self._armed = False
        self._ceiling = 0
        self._stale = 0.0
        self._before = resource.getrlimit(resource.RLIMIT_AS)

    def set(self) -> None:
        soft, hard = self._before = resource.getrlimit(resource.RLIMIT_AS)
        if (now := time.monotonic()) > self._stale:  # reading the size costs as much as a rendering
            self._stale = now + 1
            signal.signal(signal.SIGVTALRM, self._stop)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            self._ceiling = pages * resource.getpagesize() + MEMORY
        ceiling = self._ceiling if soft == resource.RLIM_INFINITY else min(soft, self._ceiling)
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, hard))
        self._armed = True
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1.0)  # again, should the first be raised where it is ignored

    def lift(self) -> None:
        self._armed = False
        resource.setrlimit(resource.RLIMIT_AS, self._before)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            raise _Late


_limits = _Limits() if LINUX else None


@lru_cache(maxsize=4)
def _refuse_powers(template: str) -> None:
    """Raises ValueError. Constants are computed when the template is compiled, so this comes before."""
    if any(kind == "operator" and text == "**" for _, kind, text in jinja2.Environment().lex(template)):
        raise ValueError("it computes a power (**), which may take forever")
