"""What is learned under templates of every habit, restated here, against brute force; and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from masks import KINDS, marked, reference, tokenizer_for

from truetune.data.chat import NO_TARGETS, TOO_LONG, WEIGHTLESS, Rendered, Renderer
from truetune.data.dataset import tokenize
from truetune.data.formats import Conversation, Preference, Text, read
from truetune.data.sources import Rows
from truetune.data.turns import CONTINUED, MARKED, UNROLLED
from truetune.errors import UserError

HEADER = "'<|im_start|>' + m.role + '\\n'"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ " + HEADER + " + m.content + '<|im_end|>\\n' }}{% endfor %}" + ASK
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ " + HEADER + " }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}"
    "{% endif %}{{ m.content.strip() + '<|im_end|>\\n' }}{% endfor %}" + ASK
)
CALLING = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\\n' }}{% endif %}{% for m in messages %}{{ "
    + HEADER
    + " + m.content }}{% for call in m.tool_calls %}{{ '<tool_call>' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}{{ ' ' + key + '=' + value | tojson }}{% endfor %}"
    "{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
CALLING_IN_JSON = (  # only where there is no content, and by joining strings
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ " + HEADER + " }}"
    "{% if m.content is defined %}{{ m.content }}{% else %}{{ m.tool_calls[0].function.name + ': ' +"
    " m.tool_calls[0].function.arguments }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
MARKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}" + ASK
)
BY_CONTENT = MARKING.replace("+ m.role + '\\n' }}", "+ m.role + (' says' if m.content | length > 4 else '') + '\\n' }}")
TEMPLATES = {
    "plain": PLAIN,
    "system in the first question": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\\n\\n' %}{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "thoughts": THINKS,
    "last question": (PLAIN.replace("m.content +", "m.content + ('/now' if m.role == 'user' and loop.last else '') +")),
    "empty thought": PLAIN.replace("assistant\\n'", "assistant\\n<think>\\n\\n</think>\\n\\n'"),
    "marks": MARKING,
    "only text": (
        "{% for m in messages %}{{ m.role + ': ' + m.content | trim + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How old is Ann?"},
    {"role": "assistant", "content": "☕ 42, naïve\n", "reasoning_content": "An age."},
    {"role": "user", "content": "And Bob?"},
    {"role": "assistant", "content": "7", "reasoning_content": "Another age."},
]
SPOKEN = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in CHAT]
TOOL = {"type": "function", "function": {"name": "get_age", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"role": "user", "content": "How old is Ann?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "function": {"name": "get_age", "arguments": '{"of": "Ann \\"A\\"", "exact": true}'}}
        ],
    },
    {"role": "tool", "content": "42", "tool_call_id": "1", "name": "get_age"},
    {"role": "assistant", "content": "42."},
]


def chat(messages: list[dict[str, Any]], **columns: Any) -> Conversation:
    return read("messages", {"messages": messages, **columns}, 0)


def rendered(template: str, example: Any, limit: int = 1 << 20, kind: str = "bytes", **options: Any) -> Rendered:
    tokenizer = tokenizer_for(template, kind)
    return Renderer(tokenizer, stops(tokenizer), limit, **options).documents(example)


def stops(tokenizer: Any) -> frozenset[int]:
    marker = "<|im_end|>" if "<|im_end|>" in tokenizer.chat_template else "</s>"
    return frozenset([tokenizer.convert_tokens_to_ids(marker)])


def learned(template: str, example: Any, **options: Any) -> list[str]:
    tokenizer = tokenizer_for(template, "bytes")
    return [tokenizer.decode(d.tokens[d.targets]) for d in rendered(template, example, **options).documents]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_equal_brute_force(name: str, kind: str) -> None:
    template = TEMPLATES[name]
    tokenizer, messages = tokenizer_for(template, kind), CHAT if name == "thoughts" else SPOKEN
    found = rendered(template, chat(messages), kind=kind)
    assert [(d.tokens.tolist(), d.targets.tolist()) for d in found.documents] == reference(
        tokenizer, messages, stops(tokenizer)
    )
    unrolled = name in ("thoughts", "last question", "empty thought")
    assert (UNROLLED in found.notes) == unrolled and len(found.documents) == 1 + unrolled
    assert (CONTINUED in found.notes) == (name in ("last question", "empty thought"))


def test_a_template_that_asks_for_no_second_answer_is_no_worse() -> None:
    """The place of an answer is found without a generation prompt after it, which some templates refuse."""
    template = TEMPLATES["empty thought"]
    strict = "{% if add_generation_prompt and messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    assert learned(strict + template, chat(SPOKEN)) == learned(template, chat(SPOKEN))


def test_a_thought_is_learned_where_the_template_shows_it() -> None:
    assert learned(THINKS, chat(CHAT)) == [
        "<think>\nAn age.\n</think>\n☕ 42, naïve<|im_end|>",
        "<think>\nAnother age.\n</think>\n7<|im_end|>",
    ]


@pytest.mark.parametrize("template", [CALLING, CALLING_IN_JSON])
@pytest.mark.parametrize("spelled", ["as OpenAI does", "as an object"])
def test_calls_are_learned_however_the_row_spells_them(template: str, spelled: str) -> None:
    messages = [dict(m) for m in CALLS]
    if spelled == "as an object":
        arguments = {"of": 'Ann "A"', "exact": True}
        messages[1] = {"role": "assistant", "tool_calls": [{"function": {"name": "get_age", "arguments": arguments}}]}
    first, *_ = learned(template, chat(messages, tools=[TOOL]))
    call = '<tool_call>get_age of="Ann \\"A\\"" exact=true</tool_call>'
    assert first == (call if template == CALLING else 'get_age: {"of": "Ann \\"A\\"", "exact": true}') + (
        "<|im_end|>42.<|im_end|>"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_marks_win_where_the_content_changes_the_header(kind: str) -> None:
    tokenizer = tokenizer_for(BY_CONTENT, kind)
    found = rendered(BY_CONTENT, chat(SPOKEN), kind=kind)
    assert MARKED in found.notes
    expected = marked(tokenizer, SPOKEN, stops(tokenizer))
    assert [(d.tokens.tolist(), d.targets.tolist()) for d in found.documents] == expected


def test_marks_may_begin_in_the_generation_prompt() -> None:
    early = MARKING.replace(
        "{{ '<|im_start|>' + m.role + '\\n' }}",
        "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' }}{% endif %}",
    ).replace(
        "{{ m.content + '<|im_end|>' }}{% endg", "{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>' }}{% endg"
    )
    assert learned(early, chat(SPOKEN)) == learned(MARKING, chat(SPOKEN)) == ["☕ 42, naïve\n<|im_end|>7<|im_end|>"]


def test_what_the_template_adds_is_told() -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + PLAIN
    )
    strict = "{% if messages[1:] and messages[1].role == 'user' %}{{ raise_exception('no answer') }}{% endif %}"
    for alternating in ("", strict):  # which refuses two questions in a row
        notes = rendered(alternating + template, chat(SPOKEN[1:])).notes
        assert notes == {"the chat template adds: system\nBe kind."}
    assert not rendered(template, chat(SPOKEN)).notes
    assert not rendered(TEMPLATES["system in the first question"], chat(SPOKEN[1:])).notes


def test_long_tools_may_make_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truetune.data.template.CHARACTERS", 0)
    long = {"type": "function", "function": {"name": "get_age", "description": "a" * 3000, "parameters": {}}}
    (document,) = rendered(CALLING, chat(CALLS, tools=[long])).documents
    assert len(document) > 3000


def without(role: str) -> str:
    return PLAIN.replace("for m in messages", f"for m in messages if m.role != '{role}'")


REFUSED = [
    (PLAIN, chat(CHAT), "does not show all of reasoning_content of turn 2; "),
    (PLAIN, chat(CALLS, tools=[TOOL]), "does not show all of tool_calls of turn 1; "),
    (
        CALLING.replace("value | tojson", "((value | tojson)[:-2] if value is string else value | tojson)"),
        chat(CALLS, tools=[TOOL]),
        "does not show all of tool_calls of turn 1; ",
    ),
    (PLAIN, chat(SPOKEN, tools=[TOOL]), "declares tools, which the chat template does not show; "),
    (without("system"), chat(SPOKEN), r"does not show turn 0 \(system\); "),
    (
        without("tool"),
        chat([*SPOKEN[:3], {"role": "tool", "content": "x"}, SPOKEN[4]]),
        r"does not show turn 3 \(tool\); ",
    ),
    (
        PLAIN.replace("assistant\\n'", "assistant\\n<think>\\n'"),
        chat(SPOKEN),
        "generation prompt opens <think>, and the chat template shows turn 2 without </think>; ",
    ),
    (
        MARKING.replace("{{ m.content + '<|im_end|>' }}{% endg", "{{ m.content[1:] + '<|im_end|>' }}{% endg").replace(
            "{% generation", "{{ m.content[0] }}{% generation"
        ),
        chat(SPOKEN),
        "generation mark of turn 2 leaves out '☕'; ",
    ),
    (
        MARKING.replace("'assistant' %}", "'assistant' and m.content | length < 4 %}"),
        chat(SPOKEN),
        "generation marks leave out turn 2; ",
    ),
    (
        PLAIN.replace("m.role + '\\n'", "m.role + (':' if m.content | length > 1 else '') + '\\n'"),
        chat(SPOKEN),
        "renders turn 2 differently by its content",
    ),
    (PLAIN, Preference(Text("a", "b"), Text("a", "c")), "is a preference, of which .*; name the better answer"),
]


@pytest.mark.parametrize(("template", "example", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_cannot_be_rendered_rightly_is_refused(template: str, example: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"^row 0 .*{said}"):
        rendered(template, example)


def test_what_is_not_shown_is_refused_where_every_token_is_learned_too() -> None:
    with pytest.raises(UserError, match=r"^row 0 .*does not show all of reasoning_content of turn 2; "):
        rendered(PLAIN, chat(CHAT), targets="all")


def test_tool_results_that_are_escaped_are_no_loss() -> None:
    template = PLAIN.replace("m.content +", "(m.content | tojson if m.role == 'user' else m.content) +")
    asked = [{"role": "user", "content": 'Say "hi"\n'}, SPOKEN[2]]
    assert learned(template, chat(asked)) == ["☕ 42, naïve\n<|im_end|>"]


# Which turns and tokens, and what they weigh.


def test_last_answer_alone() -> None:
    assert learned(PLAIN, chat(SPOKEN), targets="last") == ["7<|im_end|>"]
    assert learned(THINKS, chat(CHAT), targets="last") == ["<think>\nAnother age.\n</think>\n7<|im_end|>"]
    assert learned(PLAIN, Text("a", "b"), targets="last") == ["b<|im_end|>"]


def test_every_token_after_the_first() -> None:
    for template, messages in ((PLAIN, SPOKEN), (THINKS, [*CHAT[:2], SPOKEN[2], *CHAT[3:]])):
        (document,) = rendered(template, chat(messages), targets="all").documents
        assert document.targets.tolist() == [False] + [True] * (len(document) - 1)
        tokenizer = tokenizer_for(template, "bytes")
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert document.tokens.tolist() == whole and document.tokens[document.ends[0]] in stops(tokenizer)
    before = Conversation([*SPOKEN, *SPOKEN[3:], *SPOKEN[3:]], context=7)  # only the last turn is asked for
    assert rendered(PLAIN, before, targets="all").documents[0].target_count > 1
    tokenizer = tokenizer_for(PLAIN, "bytes")
    tokenizer.chat_template = None
    bare = Renderer(tokenizer, frozenset([tokenizer.eos_token_id]), 99, "all").documents(Text("a", "b")).documents[0]
    assert bare.target_count == len(bare) - 1


def weighed(weights: tuple[float, ...], **columns: Any) -> Conversation:
    turns = [m | {"weight": w} for m, w in zip([SPOKEN[2], SPOKEN[4]], weights, strict=True)]
    return chat([*SPOKEN[:2], turns[0], SPOKEN[3], turns[1]], **columns)


def test_weights_of_rows_and_turns_reach_their_tokens() -> None:
    (plain,) = rendered(PLAIN, chat(SPOKEN)).documents
    (document,) = rendered(PLAIN, weighed((0.5, 3), weight=2)).documents
    assert plain.weights is None and document.tokens.tolist() == plain.tokens.tolist()
    assert document.targets.tolist() == plain.targets.tolist()
    first, second = (i + 1 for i in plain.ends)
    assert set(document.weights[:first][document.targets[:first]].tolist()) == {1.0}
    assert set(document.weights[first:second][document.targets[first:second]].tolist()) == {6.0}
    (row,) = rendered(PLAIN, chat(SPOKEN, weight=4)).documents
    assert set(row.weights[row.targets].tolist()) == {4.0}
    unrolled = rendered(THINKS, replace(chat(CHAT), weights=(1, 1, 2, 1, 3))).documents
    assert [set(d.weights[d.targets].tolist()) for d in unrolled] == [{2.0}, {3.0}]
    (everything,) = rendered(PLAIN, chat(SPOKEN, weight=4), targets="all").documents
    assert set(everything.weights[1:].tolist()) == {4.0}


def test_weight_zero_is_context() -> None:
    assert learned(PLAIN, weighed((0, 1))) == ["7<|im_end|>"]
    (document,) = rendered(PLAIN, weighed((0, 1))).documents
    assert document.weights is None and len(document.ends) == 1
    for example in (weighed((0, 0)), chat(SPOKEN, weight=0), Text("a", "b", 0.0)):
        assert rendered(PLAIN, example).dropped == WEIGHTLESS
    assert rendered(PLAIN, Text(None, "b", 0.0)).dropped in (WEIGHTLESS, NO_TARGETS)


def test_weights_of_turns_and_all_tokens_exclude_each_other() -> None:
    for weights in ((1, 2), (0, 1)):
        with pytest.raises(UserError, match=r"turns have weights, but every token is learned; set data\.targets"):
            rendered(PLAIN, weighed(weights), targets="all")


def test_weights_of_bare_text() -> None:
    tokenizer = tokenizer_for(PLAIN, "bytes")
    (document,) = Renderer(tokenizer, stops(tokenizer), 99).documents(Text(None, "a b", 2.5)).documents
    assert set(document.weights[document.targets].tolist()) == {2.5}


# Rows that are too long.


@pytest.mark.parametrize("limit", range(2, 60))
def test_split_loses_and_doubles_no_target(limit: int) -> None:
    example = weighed((2, 3))
    (whole,) = rendered(PLAIN, example).documents
    found = rendered(PLAIN, example, limit, too_long="split")
    assert not len(found.cut) and found.length == len(whole)
    pieces = found.documents
    assert all(2 <= len(d) <= limit and d.target_count for d in pieces)
    assert [int(t) for d in pieces for t in d.tokens[d.targets]] == whole.tokens[whole.targets].tolist()
    assert [float(w) for d in pieces for w in d.weights[d.targets]] == whole.weights[whole.targets].tolist()
    assert [int(d.tokens[e]) for d in pieces for e in d.ends] == [int(whole.tokens[e]) for e in whole.ends]
    places = [i for i in range(0, len(whole) - 1, limit - 1) if whole.targets[i + 1 : i + limit].any()]
    assert [d.tokens.tolist() for d in pieces] == [whole.tokens[i : i + limit].tolist() for i in places]
    assert sum(found.tokens_by_role.values()) == sum(map(len, pieces))
    assert sum(found.targets_by_role.values()) == whole.target_count


def test_drop_leaves_out_the_row_and_counts_its_targets() -> None:
    (whole,) = rendered(PLAIN, chat(SPOKEN)).documents
    found = rendered(PLAIN, chat(SPOKEN), len(whole) - 1, too_long="drop")
    assert found.dropped == TOO_LONG and not found.documents and len(found.cut) == whole.target_count
    assert rendered(PLAIN, chat(SPOKEN), len(whole), too_long="drop").documents
    short, _ = rendered(THINKS, chat(CHAT)).documents
    kept = rendered(THINKS, chat(CHAT), len(short), too_long="drop")
    assert [d.tokens.tolist() for d in kept.documents] == [short.tokens.tolist()] and len(kept.cut)


def test_error_names_the_first_row_and_the_length_that_would_do() -> None:
    rows = Rows.of([{"messages": SPOKEN[1:3]}, {"messages": SPOKEN}, {"messages": [*SPOKEN, *SPOKEN[3:]]}], "chats")
    tokenizer = tokenizer_for(PLAIN, "bytes")

    def made(limit: int) -> None:
        tokenize(rows, "auto", Renderer(tokenizer, stops(tokenizer), limit, too_long="error"), 0.0)

    with pytest.raises(UserError, match=r"^chats: row 1 .* is one of 2 with more than 40 tokens") as fault:
        made(40)
    enough = int(str(fault.value).split("set data.max_length to ")[1].split(",")[0])
    made(enough)
    with pytest.raises(UserError, match=r"row 2 .* is one of 1 with"):
        made(enough - 1)


def test_report_counts_what_was_unrolled_and_added() -> None:
    tokenizer = tokenizer_for(THINKS, "bytes")
    rows = Rows.of([{"messages": CHAT}, {"messages": CHAT[:3]}, {"messages": CHAT, "weight": 0}], "chats")
    documents, report = tokenize(rows, "auto", Renderer(tokenizer, stops(tokenizer), 999), 0.0)
    weighed = "weighed in the loss by their column weight"
    assert report.notes == {UNROLLED: 1, weighed: 1} and report.dropped == {WEIGHTLESS: 1}
    assert [d.row for d in documents] == [0, 0, 1] and report.rows == 3 and report.documents == 3
    other = Rows.of([{"messages": CHAT}, {"messages": CHAT[:3], "weight": 2}, {"messages": CHAT, "weight": 0}], "chats")
    assert tokenize(other, "auto", Renderer(tokenizer, stops(tokenizer), 999), 0.0)[1].document_digest != (
        report.document_digest
    )
