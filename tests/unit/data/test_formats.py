"""What rows mean, and that every fault is named with its row."""

import json

import pytest

from truetune.data.formats import FORMATS, Conversation, Preference, Text, answers, detect, question, read
from truetune.errors import UserError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}
OTHER = {"role": "assistant", "content": "What?"}
TOOL = {"type": "function", "function": {"name": "greet", "parameters": {"type": "object", "properties": {}}}}
THOUGHT = {"reasoning_content": "They greet.", "custom": [1]}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "greet", "arguments": '{"loud": true}'}}],
}
CALLED = CALL | {"content": ""}
RESULT = {"role": "tool", "content": "done", "tool_call_id": "1", "name": "greet"}
PREFERENCE = Preference(Conversation([USER, ANSWER], 1), Conversation([USER, OTHER], 1))


def said(speaker, value):
    return {"from": speaker, "value": value}


def called(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["messages", "id"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["text"], "text"),
        (["text", "prompt", "messages"], "messages"),
        (["text", "completion"], "text"),
        (["conversations", "id"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["prompt", "completion", "chosen", "rejected"], "preference"),
        (["messages", "chosen", "rejected"], "messages"),
        (["prompt", "completion", "instruction", "output"], "alpaca"),
    ],
)
def test_format_is_found_by_its_columns(columns, form):
    assert detect(columns) == form


def test_unknown_columns_are_listed_with_the_formats():
    with pytest.raises(UserError) as fault:
        detect(["instruction", "answer"])
    for word in ("instruction, answer", *FORMATS, "prompt, completion"):
        assert word in str(fault.value)


@pytest.mark.parametrize(
    ("form", "row", "example"),
    [
        ("messages", {"messages": [USER, ANSWER], "id": 3}, Conversation([USER, ANSWER])),
        ("messages", {"messages": [USER | {"name": None}, ANSWER]}, Conversation([USER, ANSWER])),
        ("prompt-completion", {"prompt": "a", "completion": " b"}, Text("a", " b")),
        (
            "prompt-completion",
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            Conversation([USER, ANSWER, USER, ANSWER], context=3),
        ),
        ("text", {"text": "a b"}, Text(None, "a b")),
        ("messages", {"messages": [USER, CALL, RESULT, ANSWER]}, Conversation([USER, CALLED, RESULT, ANSWER])),
        (
            "messages",
            {"messages": [USER, CALL | {"content": None, "tool_calls": [CALL["tool_calls"][0]["function"]]}]},
            Conversation([USER, called("greet", '{"loud": true}')]),
        ),
        ("messages", {"messages": [USER, ANSWER | {"tool_calls": []}]}, Conversation([USER, ANSWER])),
        ("messages", {"messages": [USER, ANSWER | THOUGHT]}, Conversation([USER, ANSWER | THOUGHT])),
        ("messages", {"messages": [USER, ANSWER], "tools": [TOOL]}, Conversation([USER, ANSWER], tools=[TOOL])),
        (
            "messages",
            {"messages": [USER, ANSWER], "tools": json.dumps([TOOL])},
            Conversation([USER, ANSWER], 0, [TOOL]),
        ),
        ("messages", {"messages": [USER, ANSWER], "tools": "[]"}, Conversation([USER, ANSWER])),
        (
            "sharegpt",
            {"conversations": [said("human", "Hello?"), said("gpt", "Hello.")], "system": "Be.", "tools": [TOOL]},
            Conversation([{"role": "system", "content": "Be."}, USER, ANSWER], tools=[TOOL]),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    said("user", "Hello?"),
                    said("function_call", json.dumps({"name": "greet", "arguments": {"loud": True}})),
                    said("observation", "done"),
                    said("assistant", "Hello."),
                ]
            },
            Conversation(
                [USER, called("greet", {"loud": True}), {"role": "tool", "content": "done"}, ANSWER],
            ),
        ),
        ("sharegpt", {"conversations": [USER, ANSWER]}, Conversation([USER, ANSWER])),
        ("alpaca", {"instruction": "Hello?", "output": "Hello."}, Conversation([USER, ANSWER], 1)),
        (
            "alpaca",
            {
                "instruction": "Add.",
                "input": "1 2",
                "output": "3",
                "system": "Be.",
                "history": [["Hello?", "Hello."]],
            },
            Conversation(
                [
                    {"role": "system", "content": "Be."},
                    USER,
                    ANSWER,
                    {"role": "user", "content": "Add.\n1 2"},
                    {"role": "assistant", "content": "3"},
                ],
                4,
            ),
        ),
        (
            "alpaca",
            {"instruction": "Hello?", "input": "", "output": "Hello.", "system": ""},
            Conversation([USER, ANSWER], 1),
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, Preference(Text("a", "b"), Text("a", "c"))),
        ("preference", {"chosen": "b", "rejected": "c"}, Preference(Text(None, "b"), Text(None, "c"))),
        ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, PREFERENCE),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PREFERENCE),
        ("preference", {"prompt": "Hello?", "chosen": [ANSWER], "rejected": [OTHER]}, PREFERENCE),
        ("preference", {"prompt": "Hello?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PREFERENCE),
        # weights
        ("text", {"text": "a b", "weight": 2}, Text(None, "a b", 2.0)),
        ("text", {"text": "a b", "weight": None}, Text(None, "a b")),
        ("text", {"text": "a b", "weight": "0.5"}, Text(None, "a b", 0.5)),
        ("text", {"text": "a b", "weight": ""}, Text(None, "a b")),
        ("messages", {"messages": [USER, ANSWER | {"weight": 1}]}, Conversation([USER, ANSWER])),
        (
            "messages",
            {"messages": [USER | {"weight": 0}, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 0.5}], "weight": 4},
            Conversation([USER, ANSWER, USER, ANSWER], weights=(4.0, 0.0, 4.0, 2.0)),
        ),
        (
            "sharegpt",
            {"conversations": [said("human", "Hello?"), said("gpt", "Hello.") | {"weight": 3}]},
            Conversation([USER, ANSWER], weights=(1.0, 3.0)),
        ),
    ],
)
def test_rows_become_examples(form, row, example):
    assert read(form, row, 0) == example


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        ("messages", {"text": "a"}, "column messages is missing"),
        ("messages", {"messages": "hello"}, "messages is a str"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": None}, "messages is empty"),
        ("messages", {"messages": ["hello"]}, r"messages\[0\] is a str"),
        (
            "messages",
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            r"messages\[1\] has the role 'bot'",
        ),
        ("messages", {"messages": [{"content": "x"}]}, "the role None"),
        ("messages", {"messages": [USER, ANSWER | {"content": None}]}, r"messages\[1\].content is empty"),
        ("messages", {"messages": [USER | {"content": ["x"]}, ANSWER]}, r"messages\[0\].content is a list"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, ANSWER], "tools": "{"}, "tools is no JSON"),
        ("messages", {"messages": [USER, ANSWER], "tools": ["greet"]}, "tools is a list"),
        ("text", {"text": "a", "tools": [TOOL]}, "declares tools, which text does not show"),
        ("messages", {"messages": [USER | {"tool_calls": CALL["tool_calls"]}, ANSWER]}, "calls tools in the role user"),
        ("messages", {"messages": [USER, CALL | {"tool_calls": {"a": 1}}]}, r"tool_calls is a dict"),
        ("messages", {"messages": [USER, CALL | {"tool_calls": [{"id": 1}]}]}, r"tool_calls\[0\] names no function"),
        ("messages", {"messages": [USER, called("f", "{")]}, r"tool_calls\[0\].arguments is no JSON"),
        ("messages", {"messages": [USER, called("f", "[1]")]}, r"tool_calls\[0\].arguments is a str"),
        ("messages", {"messages": [USER, ANSWER | {"thinking": 3}]}, r"messages\[1\].thinking is a int"),
        ("sharegpt", {"conversations": [said("bot", "x")]}, "is from 'bot'"),
        ("sharegpt", {"conversations": [said("human", "x")]}, "no assistant turn"),
        (
            "sharegpt",
            {"conversations": [said("human", None), said("gpt", "x")]},
            r"conversations\[0\].content is empty",
        ),
        ("sharegpt", {"conversations": [USER, said("function_call", "greet()")]}, r"\[1\].value is no JSON"),
        (
            "sharegpt",
            {"conversations": [said("system", "x"), said("gpt", "x")], "system": "y"},
            "a system column and a system turn",
        ),
        ("alpaca", {"instruction": "a", "output": None}, "output is empty"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "history is no list of pairs"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": "no"}, "chosen is a list and rejected a str"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected has no assistant turn"),
        ("preference", {"chosen": "a", "rejected": "b", "weight": 2}, "preference with a weight"),
        ("text", {"text": "a", "weight": -1}, "weight is -1"),
        ("text", {"text": "a", "weight": float("nan")}, "weight is nan"),
        ("text", {"text": "a", "weight": float("inf")}, "weight is beyond 1e"),
        ("text", {"text": "a", "weight": 10**400}, "weight is beyond 1e"),
        ("text", {"text": "a", "weight": 1e-300}, "weight is 1e-300"),
        ("text", {"text": "a", "weight": "much"}, "weight is a str"),
        ("text", {"text": "a", "weight": "nan"}, "weight is nan"),
        ("text", {"text": "a", "weight": True}, "weight is a bool"),
        ("messages", {"messages": [USER, ANSWER | {"weight": -2}]}, r"messages\[1\].weight is -2"),
        ("messages", {"messages": [USER | {"weight": 1}, ANSWER]}, r"messages\[0\].weight is 1 in the role user"),
        ("prompt-completion", {"prompt": "a", "completion": None}, "completion is empty"),
        ("prompt-completion", {"prompt": [USER], "completion": "a"}, "completion is a str"),
        ("prompt-completion", {"prompt": [USER, ANSWER], "completion": [USER]}, "no assistant turn"),
        ("text", {"text": 3}, "text is a int"),
        ("text", {"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_faults_name_the_row(form, row, said):
    with pytest.raises(UserError, match=f"row 41 .*{said}.*; "):
        read(form, row, 41)


def test_a_column_of_weights_may_have_another_name_or_none():
    row = {"text": "a", "weight": "heavy", "importance": 3}
    assert read("text", row, 0, "importance") == Text(None, "a", 3.0)
    assert read("text", row, 0, None) == Text(None, "a")
    with pytest.raises(UserError, match="weight is a str"):
        read("text", row, 0)


def test_what_is_learned_and_asked_follows_the_weights():
    first, second = {"role": "user", "content": "First?"}, {"role": "user", "content": "Second?"}
    example = read("messages", {"messages": [first, ANSWER | {"weight": 0}, second, CALL, RESULT, OTHER]}, 0)
    assert example.learned == [3, 5] and question(example) == "Second?"
    assert answers(example)[1] == "What?" and "greet" in answers(example)[0]
    plain = read("messages", {"messages": [first, ANSWER, second, OTHER]}, 0)
    assert plain.learned == [1, 3] and question(plain) == "First?" and answers(plain) == ["Hello.", "What?"]
