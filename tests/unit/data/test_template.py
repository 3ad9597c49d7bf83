"""Hostile chat templates end in one sentence that names the row, within bounds of time, memory and output."""

from __future__ import annotations

import resource
import signal
import threading
import time

import pytest
from folders import CHATML, chats, tokenizer

from truetune.data import formats, template
from truetune.data.chat import Renderer
from truetune.errors import UserError

LOOPS = "{% for a in range(100000) %}" * 3 + "{% endfor %}" * 3
STRINGS = "{% set s = 'a' * 99 %}" + "{% for a in s %}" * 9 + "{% endfor %}" * 9
WRITES = LOOPS.replace("%}{% endfor", "%}{{ messages[0].content }}{% endfor", 1)
MACRO = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"


def document(text: str) -> int:
    words = tokenizer(text)
    made = Renderer(words, frozenset([words.eos_token_id]), 64).documents(formats.read("messages", chats(1)[0], 7), 7)
    return made.length


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LOOPS, r"runs for more than 0\.3 s"),
        (STRINGS, r"runs for more than 0\.3 s"),
        (WRITES, "runs for more than|MiB of memory"),
        ("{{ 'a' * 10000000000 }}", "more than 512 MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "more than 512 MiB of memory"),
        ("{{ messages[0].content | center(1000000000) }}", "more than 512 MiB of memory"),
        ("{{ 10**10**8 }}", r"computes a power"),
        ("{{ 'a' * 10**10 }}", r"computes a power"),
        ("{{ 'a' * 1000000 }}", r"writes 1,000,000 characters, above 262,\d+"),
        (MACRO, "calls itself without end"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__' .* is unsafe"),
        ("{{ raise_exception('no\nmore') }}", "refuses it: no more"),
        ("{{ '\\ud800' }}", "refuses it: .*surrogates not allowed"),
    ],
)
def test_a_hostile_template_ends_in_a_sentence(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.3)
    began = time.monotonic()
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=rf"^row 7 \(the first is 0\): the chat template .*({says}).*; "):
        document(text)
    assert time.monotonic() - began < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_others_have_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, hard))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        assert document(CHATML) > 9
        while len(rung) < 3:
            document(CHATML)
        assert resource.getrlimit(resource.RLIMIT_AS) == (1 << 45, hard)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_late_signal_of_the_timer_does_nothing_outside() -> None:
    document(CHATML)
    signal.raise_signal(signal.SIGVTALRM)


def test_another_thread_renders_without_the_limits_but_bounds_the_output() -> None:
    faults: list[str] = []

    def work() -> None:
        assert document(CHATML) > 9
        try:
            document("{{ 'a' * 1000000 }}")
        except UserError as error:
            faults.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(faults) == 1 and "characters, above" in faults[0]


def test_a_long_row_may_be_written_out_in_full() -> None:
    words = tokenizer()
    row = {"messages": [{"role": "user", "content": "a b " * 100_000}, {"role": "assistant", "content": "c"}]}
    renderer = Renderer(words, frozenset([words.eos_token_id]), 1 << 20)
    assert renderer.documents(formats.read("messages", row, 0)).length > 100_000
