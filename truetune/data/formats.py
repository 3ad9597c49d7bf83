"""What a row means: from its columns to a conversation or a text, with every fault named.

The formats are those of TRL's datasets (``messages``, ``prompt`` and ``completion`` as text or as lists of
messages, ``text``). Left out: preferences, images, and tools, which a row would have to declare to the
template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from truetune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages. The assistant turns from number ``context`` on are to be learned."""

    messages: list[dict[str, Any]]
    context: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """Text to be learned, after a prompt if it has one; ``prompt`` None means that all of it is learned."""

    prompt: str | None
    completion: str


Example = Conversation | Text


def question(example: Example) -> str:
    """What the example asks, for people to read: the last user message before its first trained turn, or the prompt."""
    if isinstance(example, Text):
        return example.prompt or ""
    asked = ""
    for i, message in enumerate(example.messages):
        if message["role"] == "assistant" and i >= example.context:
            break
        if message["role"] == "user":
            asked = message["content"]
    return asked


def answers(example: Example) -> list[str]:
    """What is to be learned, turn by turn."""
    if isinstance(example, Text):
        return [example.completion]
    return [m["content"] for m in example.messages[example.context :] if m["role"] == "assistant"]


class Format(NamedTuple):
    columns: tuple[str, ...]
    read: Callable[[Row, int], Example]


def detect(columns: Iterable[str]) -> str:
    """The first format of ``FORMATS`` whose columns are all there. Raises UserError if there is none."""
    found = list(columns)
    for name, form in FORMATS.items():
        if all(c in found for c in form.columns):
            return name
    known = "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in FORMATS.items())
    raise UserError(
        f"the columns {', '.join(found)} fit none of the formats {known}; rename the columns to those of one"
    )


def read(form: str, row: Row, number: int) -> Example:
    """The example in one row. Raises UserError that names the row and its fault."""
    missing = [c for c in FORMATS[form].columns if c not in row]
    if missing:
        refuse(number, f"the column {missing[0]} is missing", "every row needs the columns of the first")
    if row.get("tools"):
        refuse(number, "it declares tools, which would not be shown to the model", "remove them")
    return FORMATS[form].read(row, number)


def _read_messages(row: Row, number: int) -> Example:
    messages = _messages(row["messages"], "messages", number)
    if not any(m["role"] == "assistant" for m in messages):
        refuse(number, "it has no assistant turn, so nothing to learn", "add one or remove the row")
    return Conversation(messages)


def _read_prompt_completion(row: Row, number: int) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Text(_string(prompt, "prompt", number), _string(completion, "completion", number))
    context = _messages(prompt, "prompt", number)
    answer = _messages(completion, "completion", number)
    if not any(m["role"] == "assistant" for m in answer):
        refuse(number, "its completion has no assistant turn", "add one or remove the row")
    return Conversation(context + answer, context=len(context))


def _read_text(row: Row, number: int) -> Example:
    return Text(None, _string(row["text"], "text", number))


def _messages(value: Any, column: str, number: int) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        refuse(number, f"{column} is {_shown(value)}", "give a list of messages with role and content")
    for i, message in enumerate(value):
        where = f"{column}[{i}]"
        if not isinstance(message, dict):
            refuse(number, f"{where} is {_shown(message)}", "give an object with role and content")
        if message.get("role") not in ROLES:
            refuse(number, f"{where} has the role {message.get('role')!r}", f"use one of {', '.join(ROLES)}")
        _string(message.get("content"), f"{where}.content", number)
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _string(value: Any, where: str, number: int) -> str:
    if not isinstance(value, str):
        refuse(number, f"{where} is {_shown(value)}", "give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(number, f"{where} holds half of a surrogate pair, which is no text", "repair its encoding")
    return value


def _shown(value: Any) -> str:
    if value is None or value in ([], {}):
        return "empty"
    return f"a {type(value).__name__}"


def place(number: int) -> str:
    """How a fault names its row."""
    return f"row {number} (the first is 0)"


def refuse(number: int, fault: str, advice: str) -> NoReturn:
    """Raise the UserError of a row: what is wrong with it, and what to do."""
    raise UserError(f"{place(number)}: {fault}; {advice}")


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _read_messages),
    "prompt-completion": Format(("prompt", "completion"), _read_prompt_completion),
    "text": Format(("text",), _read_text),
}
