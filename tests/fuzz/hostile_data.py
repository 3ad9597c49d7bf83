"""Rows, conversations and chat templates of every evil kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from folders import CHATML, chats, tokenizer
from fuzzing import JUNK, SCALARS, WORDS, Target, damaged, mutants, spelled
from hypothesis import strategies as st

from truetune.data import dataset, formats, sources
from truetune.data.chat import Renderer
from truetune.data.sources import Rows

GOOD: list[dict[str, Any]] = [
    chats(1)[0],
    {"prompt": "What?", "completion": "That."},
    {"text": "It is what it is."},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]
LINES = [
    b"", b"   ", b"\xef\xbb\xbf{}", b"{}", b"[]", b"null", b"NaN", b'{"text": NaN}', b'{"text": "a", "text": "b"}',
    b"{", b'{"text": "\\ud800"}', b"\xff", b'{"text": "\x00"}', b'{"text": "' + b"x" * 300_000 + b'"}',
    b"[" * 100_000,
    b'{"text": ' + b'{"a":' * 3000 + b"1" + b"}" * 3001, b'{"text": ' + b"9" * 6000 + b"}", b"\x1b[2J", b"\xe2\x80\xa8",
    b'{"a\\nb": 1}', b'{"\\ud800": 1}', b'{"text": 1e999}', b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
]  # fmt: skip


def lines() -> st.SearchStrategy[bytes]:
    good = st.sampled_from(GOOD)
    mutant = good.flatmap(mutants).map(spelled)
    return st.one_of(mutant, mutant, good.map(spelled), good.map(spelled).flatmap(damaged), st.sampled_from(LINES))


def same_lines() -> st.SearchStrategy[list[bytes]]:
    """Lines of one format, so that more than the first is read; one of them may be bad."""
    several = st.integers(0, len(GOOD) - 1).map(lambda i: [spelled(GOOD[i])] * 3)
    return st.tuples(several, st.lists(lines(), max_size=1)).map(lambda parts: parts[0] + parts[1])


@st.composite
def conversations(draw: Any) -> dict[str, Any]:
    """A row whose messages are nearly right."""
    turn = st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "assistant", "system", "tool", "User", ""]) | SCALARS,
            "content": st.sampled_from(["Yes.", "a b c", "", "  ", "\n", "<|im_end|>", "x" * 3000]) | WORDS | JUNK,
        },
        optional={
            "tool_calls": st.just([{"function": {"name": "f", "arguments": {}}}]) | JUNK,
            "name": WORDS,
            "thinking": JUNK,
        },
    )
    good = st.sampled_from(["user", "assistant"]).flatmap(
        lambda role: st.fixed_dictionaries(
            {"role": st.just(role), "content": st.sampled_from(["Yes.", "No", " a ", ""])}
        )
    )
    turns = draw(st.lists(st.one_of(good, good, good, turn), max_size=6))
    if draw(st.integers(0, 20)) == 0:
        turns = turns * 40
    row: dict[str, Any] = {"messages": turns}
    match draw(st.integers(0, 9)):
        case 0:
            row["tools"] = draw(JUNK)
        case 1:
            row = {"prompt": turns[:1], "completion": turns[1:]}
        case 2:
            row = {"prompt": draw(WORDS), "completion": turns}
        case 3:
            row = {"messages": draw(JUNK)}
    return row


HOSTILE = [
    "10**10**8", "2**1000000000", "'a' * 10000000000", "'a' * 100000000", "'%1000000000d' % 1",
    "'a'|center(1000000000)", "messages[0].content * 300000000", "''.__class__.__mro__",
    "messages.__class__", "nothing.at.all", "1/0", "1//0",
    "messages|tojson", "messages|string * 1000", "lipsum(100000)", "range(10000000)|list", "range(99999)|list|string",
    "raise_exception('no\nyes')", "namespace(__x=1)", "self.__init__.__globals__", "dict(a=1).b.c", "messages[99].role",
    "cycler.__init__", "[" * 60 + "]" * 60, "(" * 300 + "1" + ")" * 300, "messages.append(1)", "'\\ud800'",
    "strftime_now('%' * 100)", "{}['a']['b']", "messages|map(attribute='role')|join", "joiner().x", "'a'|int(0, 99)",
    "messages|sort", "'{0.__class__}'.format(1)", "1 if", "'a'|nofilter", "7|nosuch", "x is divisibleby 0",
]  # fmt: skip
PLAIN = [
    "m.role",
    "m.content",
    "m['content'] | trim",
    "loop.index",
    "'<|im_end|>\\n'",
    "bos_token",
    "eos_token",
    "m.name",
]
BLOCKS = [
    ("{% for m in messages %}", "{% endfor %}"),
    ("{% for a in range(100000) %}", "{% endfor %}"),
    ("{% for a in 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}", "{% endfor %}"),
    ("{% for a in messages recursive %}{{ loop(messages) }}", "{% endfor %}"),
    ("{% if messages|length > 1 %}", "{% endif %}"),
    ("{% if loop.last %}", "{% endif %}"),
    ("{% macro f(x) %}{{ f(x) }}", "{% endmacro %}{{ f(1) }}"),
    ("{% set n = namespace(x='a') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}", "{% endfor %}{{ n.x }}"),
    ("{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}", "{% endfor %}"),
    ("{% set x %}", "{% endset %}{{ x }}"),
    ("{% call f() %}", "{% endcall %}"),
    ("{% generation %}", "{% endgeneration %}"),
    ("{% block b %}", "{% endblock %}{{ self.b() }}"),
    ("{% include 'a' %}", ""),
    ("{% for %}", "{% endfor %}"),
    ("{% raw %}", ""),
    ("{# ", ""),
    ("{%- if add_generation_prompt %}", "{% endif %}"),
]
TEMPLATES = st.recursive(
    st.one_of(
        st.sampled_from(PLAIN).map(lambda e: f"{{{{ {e} }}}}"),
        st.sampled_from(HOSTILE).map(lambda e: f"{{{{ {e} }}}}"),
        st.sampled_from(
            [CHATML, CHATML, "{{ messages[-1].content }}", "{% for m in messages|reverse %}{{ m.content }}{% endfor %}"]
        ),
        WORDS,
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(st.sampled_from(BLOCKS), inner).map(lambda parts: parts[0][0] + parts[1] + parts[0][1]),
    ),
    max_leaves=5,
)


def targets(folder: Path, shares: tuple[float, float, float]) -> list[Target]:
    words, row = tokenizer(), formats.read("messages", chats(1)[0], 0)
    stops = frozenset([words.eos_token_id])
    renderer = Renderer(words, stops, 64)

    def read(found: list[bytes]) -> None:
        file = folder / "rows.jsonl"
        file.write_bytes(b"\n".join(found))
        rows = sources.load(str(file))
        dataset.draw(rows, 2, 0)
        dataset.tokenize(rows, "auto", renderer, 0.5)

    def converse(found: dict[str, Any]) -> None:
        form = formats.detect(found)
        renderer.documents(formats.read(form, found, 0))
        dataset.tokenize(Rows.of([found, *GOOD[:1]], "rows"), form, renderer, 1.0)

    def render(template: str) -> None:
        words = tokenizer_of[0]
        words.chat_template = template
        Renderer(words, stops, 64).documents(row)

    tokenizer_of = [tokenizer()]
    several = st.lists(lines(), max_size=3) | same_lines()
    return [
        Target("rows", several, read, shares[0]),
        Target("messages", conversations(), converse, shares[1]),
        Target("templates", TEMPLATES, render, shares[2]),
    ]
