"""What is learned under the chat templates that models really have, on tokenizers of every kind, by brute force.

The templates come inside a package (see the Makefile); nothing of them is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from masks import KINDS, Expected, Message, marked, reference, stops_of, tokenizer_for

from truetune.data import formats
from truetune.data.chat import Renderer
from truetune.data.turns import MARKED
from truetune.errors import UserError

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[2]
ROW = "row 0 (the first is 0): "

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
PLAIN: list[Message] = [
    {"role": "user", "content": "How old is Ann?"},
    {"role": "assistant", "content": "Ann is 42, naïve ☕ and fine."},
    {"role": "user", "content": "  And Bob?\n"},
    {"role": "assistant", "content": "1234"},
]
THOUGHTS: list[Message] = [
    m | ({"reasoning_content": f"Message {i} asks an age."} if m["role"] == "assistant" else {})
    for i, m in enumerate(PLAIN)
]
CALLS: list[Message] = [
    {"role": "user", "content": "Is it sunny in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "sunny, 20 degrees"},
    {"role": "assistant", "content": "It is."},
]
CONVERSATIONS: dict[str, tuple[list[Message], list[Message] | None]] = {
    "plain": (PLAIN, None),
    "system": ([{"role": "system", "content": "Be brief."}, *PLAIN], None),
    "reasoning": (THOUGHTS, None),
    "tools": (CALLS, [TOOL]),
}


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    found = sorted((ROOT / ".cache" / "templates").rglob("*.jinja"))
    if not found:
        pytest.fail("the chat templates are not there; fetch them with: make .cache/templates")
    return {file.stem: file.read_text(encoding="utf-8") for file in found}


def verdict(template: str, kind: str, messages: list[Message], tools: list[Message] | None) -> tuple[str, Any, Any]:
    """What became of the conversation, and the documents that it became beside those that it should have become."""
    tokenizer = tokenizer_for(template, kind)
    expected: Expected | None = None
    for arguments in ("object", "JSON"):  # templates differ in which they show rightly, and the row has one of them
        spelled = json.loads(json.dumps(messages))
        for call in (call for m in spelled for call in m.get("tool_calls", ()) if arguments == "object"):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        try:
            stops = stops_of(tokenizer, spelled, tools)
            expected = reference(tokenizer, spelled, stops, tools)
        except Exception:  # a template is a program, and may raise anything
            stops = frozenset([tokenizer.eos_token_id])
            continue
        break
    try:
        example = formats.read("messages", {"messages": messages, "tools": tools}, 0)
        rendered = Renderer(tokenizer, stops, 1 << 20).documents(example)
    except UserError as fault:
        return f"refused: {str(fault).removeprefix(ROW)}", None, None
    if MARKED in rendered.notes:
        expected = marked(tokenizer, messages, stops, tools)
    found = [(d.tokens.tolist(), d.targets.tolist()) for d in rendered.documents]
    return "equal" if len(found) == 1 else "equal, unrolled", found, expected


def test_masks_equal_brute_force_under_real_templates(templates: dict[str, str], evidence: Callable[..., None]) -> None:
    table: dict[str, dict[str, str]] = {}
    wrong = []
    for name, template in templates.items():
        for label, (messages, tools) in CONVERSATIONS.items():
            told = set()
            for kind in KINDS:
                said, found, expected = verdict(template, kind, messages, tools)
                told.add(said)
                if found != expected:
                    wrong.append((name, label, kind))
            table.setdefault(name, {})[label] = "; ".join(sorted(told))
    (ROOT / "results" / "chat-templates.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    said = [verdict for row in table.values() for verdict in row.values()]
    evidence(
        "chat-templates",
        templates=len(table),
        tokenizers=len(KINDS),
        conversations=len(said),
        equal=said.count("equal"),
        unrolled=said.count("equal, unrolled"),
        refused=sum(v.startswith("refused") for v in said),
        wrong=len(wrong),
    )
    assert not wrong
    assert sum(row["plain"].startswith("equal") for row in table.values()) >= 60 <= len(table)
    assert sum("unrolled" in row["plain"] for row in table.values()) >= 8
    assert sum(row["tools"].startswith("equal") for row in table.values()) >= 30
    assert all(v.startswith(("equal", "refused")) for v in said)
