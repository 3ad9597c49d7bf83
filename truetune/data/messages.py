"""Chat messages as rows hold them: checked, spelled in one way, and every fault named with its row.

A message is a dict with ``role`` and ``content`` in the spelling of OpenAI and Hugging Face: an assistant that calls
tools says so in ``tool_calls`` and may have no content; a ``tool`` turn holds a result; reasoning stands in a key
of its own. Left out: content in parts, such as images.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from truetune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of what an assistant thought before it answered; transformers hands each to a template that reads another."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""ShareGPT's ``from``, and the role that it stands for."""
LEAST, MOST = 1e-15, 1e15
"""Weights other than 0: the product of a row's and a message's is a normal number in float32."""

Message = dict[str, Any]
Weights = tuple[float, ...]


def conversation(value: Any, column: str, number: int) -> tuple[list[Message], Weights]:
    """The messages of a column, and the weight of each. Raises UserError that names the row and the message."""
    if not isinstance(value, list) or not value:
        refuse(number, f"{column} is {shown(value)}", "give a list of messages with role and content")
    pairs = [_message(message, f"{column}[{i}]", number) for i, message in enumerate(value)]
    return [message for message, _ in pairs], tuple(weight for _, weight in pairs)


def _message(value: Any, where: str, number: int) -> tuple[Message, float]:
    if not isinstance(value, dict):
        refuse(number, f"{where} is {shown(value)}", "give an object with role and content")
    message = {key: part for key, part in value.items() if part is not None}
    if "from" in message and "role" not in message:
        message = _of_sharegpt(message, where, number)
    role = message.get("role")
    if role not in ROLES:
        refuse(number, f"{where} has the role {role!r}", f"use one of {', '.join(ROLES)}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        string(message.get("content"), f"{where}.content", number)
    elif role != "assistant":
        refuse(number, f"{where} calls tools in the role {role}", "give tool_calls to assistant turns only")
    else:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls", number)
        message["content"] = string(message.get("content", ""), f"{where}.content", number)
    for key in REASONING:
        if key in message:
            string(message[key], f"{where}.{key}", number)
    weight = weight_of(message.pop("weight", 1 if role == "assistant" else 0), f"{where}.weight", number)
    if weight and role != "assistant":
        refuse(number, f"{where}.weight is {weight:g} in the role {role}", "give weights to assistant turns only")
    return message, weight


def _of_sharegpt(turn: Message, where: str, number: int) -> Message:
    speaker, value = turn.pop("from"), turn.pop("value", None)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        refuse(number, f"{where} is from {speaker!r}", f"use one of {', '.join(SPEAKERS)}")
    if speaker != "function_call":
        return {**turn, "role": SPEAKERS[speaker], "content": value}
    calls = _json(string(value, f"{where}.value", number), f"{where}.value", number)
    return {**turn, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _calls(value: Any, where: str, number: int) -> list[Message]:
    """Calls as ``{"type": "function", "function": {"name", "arguments"}}``, arguments as the row has them."""
    advice = 'give a list of objects like {"function": {"name": ..., "arguments": {...}}} there'
    if not isinstance(value, list):
        refuse(number, f"{where} is {shown(value)}", advice)
    calls = []
    for i, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            refuse(number, f"{where}[{i}] names no function", advice)
        arguments = function.get("arguments")
        arguments = {} if arguments is None else arguments
        if not isinstance(parsed(arguments, f"{where}[{i}].arguments", number), dict):
            refuse(number, f"{where}[{i}].arguments is {shown(arguments)}", "give an object, or its JSON")
        rest = {} if function is call else {k: v for k, v in call.items() if v is not None}
        calls.append({"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}})
    return calls


def tools(value: Any, number: int) -> list[Message] | None:
    """The tools that a row declares, as a list or its JSON; None if there are none."""
    found = parsed(value, "tools", number)
    if found in (None, "", [], {}):
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        refuse(number, f"tools is {shown(found)}", "give a list of JSON schemas of functions, or its JSON")
    return found


def parsed(value: Any, where: str, number: int) -> Any:
    """``value``, read as JSON if it is a string that is not blank."""
    return _json(value, where, number) if isinstance(value, str) and value.strip() else value


def _json(text: str, where: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        refuse(number, f"{where} is no JSON ({fault})", "repair it")


def weight_of(value: Any, where: str, number: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(number, f"{where} is {shown(value)}", "give a number of 0 or more")
    if not (value == 0 or LEAST <= value <= MOST):
        amount = f"beyond {MOST:g}" if abs(value) > MOST else f"{value:g}"
        refuse(number, f"{where} is {amount}", f"give 0, or a number from {LEAST:g} to {MOST:g}")
    return float(value)


def string(value: Any, where: str, number: int) -> str:
    if not isinstance(value, str):
        refuse(number, f"{where} is {shown(value)}", "give a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(number, f"{where} holds half of a surrogate pair, which is no text", "repair its encoding")
    return value


def shown(value: Any) -> str:
    if value is None or value in ([], {}):
        return "empty"
    return f"a {type(value).__name__}"


def place(number: int) -> str:
    """How a fault names its row."""
    return f"row {number} (the first is 0)"


def refuse(number: int, fault: str, advice: str) -> NoReturn:
    """Raise the UserError of a row: what is wrong with it, and what to do."""
    raise UserError(f"{place(number)}: {fault}; {advice}")
