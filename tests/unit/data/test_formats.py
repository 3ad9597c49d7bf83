"""What rows mean, and that every fault is named with its row."""

import pytest

from truetune.data.formats import FORMATS, Conversation, Text, detect, read
from truetune.errors import UserError

USER = {"role": "user", "content": "Hello?"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["messages", "id"], "messages"),
        (["prompt", "completion"], "prompt-completion"),
        (["text"], "text"),
        (["text", "prompt", "messages"], "messages"),
        (["text", "completion"], "text"),
    ],
)
def test_format_is_found_by_its_columns(columns, form):
    assert detect(columns) == form


def test_unknown_columns_are_listed_with_the_formats():
    with pytest.raises(UserError) as fault:
        detect(["instruction", "output"])
    for word in ("instruction, output", *FORMATS, "prompt, completion"):
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
        ("messages", {"messages": [USER, ANSWER], "tools": [{}]}, "declares tools"),
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
