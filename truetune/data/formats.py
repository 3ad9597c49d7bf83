"""What a row means: from its columns to a conversation, a text or a preference, with every fault named.

The formats are those of TRL's datasets (``messages``, ``prompt`` and ``completion`` as text or as lists of messages,
``text``, preferences), ShareGPT's ``conversations`` and Alpaca's ``instruction``, ``input`` and ``output``. Where the
columns fit several, the first of ``FORMATS`` is taken. Left out: images and audio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from truetune.data.messages import REASONING, Message, Weights, conversation, refuse, shown, string, tools, weight_of
from truetune.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages. The assistant turns from number ``context`` on are to be learned.

    tools:   JSON schemas that the template is to declare, or None.
    weights: of every message; only those of assistant turns matter. None: all 1.
    """

    messages: list[Message]
    context: int = 0
    tools: list[Message] | None = None
    weights: Weights | None = None

    def weight(self, turn: int) -> float:
        return 1.0 if self.weights is None else self.weights[turn]

    @property
    def learned(self) -> list[int]:
        """Numbers of the turns that are to be learned; a turn of weight 0 is context."""
        turns = range(self.context, len(self.messages))
        return [i for i in turns if self.messages[i]["role"] == "assistant" and self.weight(i)]


@dataclass(frozen=True, slots=True)
class Text:
    """Text to be learned, after a prompt if it has one; ``prompt`` None means that all of it is learned."""

    prompt: str | None
    completion: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which the first is the better. Both have the prompt as their context."""

    chosen: Conversation | Text
    rejected: Conversation | Text


Example = Conversation | Text | Preference


def question(example: Example) -> str:
    """What the example asks, for people to read: the last user message before its first trained turn, or the prompt."""
    if isinstance(example, Preference):
        return question(example.chosen)
    if isinstance(example, Text):
        return example.prompt or ""
    before = example.messages[: next(iter(example.learned), None)]
    return next((str(m["content"]) for m in reversed(before) if m["role"] == "user"), "")


def answers(example: Example) -> list[str]:
    """What is to be learned, turn by turn: content, reasoning and calls."""
    if isinstance(example, Preference):
        return answers(example.chosen)
    if isinstance(example, Text):
        return [example.completion]
    turns = (example.messages[i] for i in example.learned)
    return ["".join(str(turn.get(key, "")) for key in ("content", *REASONING, "tool_calls")) for turn in turns]


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


def read(form: str, row: Row, number: int, weight: str | None = "weight") -> Example:
    """The example in one row. Raises UserError that names the row and its fault.

    weight: the column of the row's weight, which multiplies those of its messages; a row without it weighs 1.
    """
    missing = [c for c in FORMATS[form].columns if c not in row]
    if missing:
        need = f"every row of {form} needs {', '.join(FORMATS[form].columns)}"
        refuse(number, f"the column {missing[0]} is missing", f"{need}; see data.format and truetune show formats")
    example = FORMATS[form].read(row, number)
    if declared := tools(row.get("tools"), number):
        if not isinstance(example, Conversation):
            refuse(number, f"it declares tools, which {form} does not show to the model", "remove them")
        example = replace(example, tools=declared)
    value = given_weight(row, weight)
    return example if value is None else _times(example, weight_of(value, str(weight), number), number)


def given_weight(row: Row, weight: str | None) -> Any:
    """What a row has in the column of its weight, a number where text spells one, as in a CSV; None for nothing."""
    value = None if weight is None else row.get(weight)
    if not isinstance(value, str):
        return value
    try:
        return float(value) if value else None
    except ValueError:
        return value


def _times(example: Example, factor: float, number: int) -> Example:
    if isinstance(example, Preference):
        refuse(number, "it is a preference with a weight, which has no meaning yet", "set data.weight_column=none")
    if isinstance(example, Text):
        return replace(example, weight=factor)
    weights = example.weights or (1.0,) * len(example.messages)
    return replace(example, weights=_told([factor * w for w in weights]))


def _told(weights: Iterable[float]) -> Weights | None:
    """None where all that is learned weighs the same as without weights."""
    found = tuple(weights)
    return None if all(w == 1 for w in found) else found


def _conversation(messages: list[Message], weights: Weights, where: str, number: int, context: int = 0) -> Conversation:
    """The messages as an example; ``weights`` of other roles are set to 1, so that they say nothing."""
    if not any(m["role"] == "assistant" for m in messages[context:]):
        refuse(number, f"{where} has no assistant turn, so nothing to learn", "add one or remove the row")
    found = (w if m["role"] == "assistant" else 1.0 for m, w in zip(messages, weights, strict=True))
    return Conversation(messages, context, weights=_told(found))


def _read_messages(row: Row, number: int) -> Example:
    """A conversation; the assistant's turns are learned."""
    return _conversation(*conversation(row["messages"], "messages", number), "it", number)


def _read_sharegpt(row: Row, number: int) -> Example:
    """A conversation in ShareGPT's spelling; the assistant's turns are learned."""
    messages, weights = conversation(row["conversations"], "conversations", number)
    before = _system(row, number)
    if before and messages[0]["role"] in ("system", "developer"):
        refuse(number, "it has a system column and a system turn", "keep one")
    return _conversation(before + messages, (0.0,) * len(before) + weights, "it", number)


def _read_alpaca(row: Row, number: int) -> Example:
    """An instruction, what it is about, and the output, which is learned."""
    asked = [string(row["instruction"], "instruction", number)]
    if row.get("input"):
        asked.append(string(row["input"], "input", number))
    messages = _system(row, number)
    past = row.get("history") or []
    if not isinstance(past, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in past):
        refuse(number, "history is no list of pairs", "give [question, answer] for every earlier turn")
    for i, pair in enumerate([*past, ("\n".join(asked), row["output"])]):
        where = f"history[{i}]" if i < len(past) else "output"
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": string(text, where, number)})
    return Conversation(messages, context=len(messages) - 1)


def _system(row: Row, number: int) -> list[Message]:
    return [{"role": "system", "content": string(row["system"], "system", number)}] if row.get("system") else []


def _read_prompt_completion(row: Row, number: int) -> Example:
    """A prompt and its completion, as text or as lists of messages; the completion is learned."""
    return _answered(row["prompt"], row["completion"], "completion", number)


def _answered(prompt: Any, answer: Any, column: str, number: int) -> Conversation | Text:
    """Prompt and answer, both text or both messages."""
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return Text(string(prompt, "prompt", number), string(answer, column, number))
    before, weights = conversation(prompt, "prompt", number)
    after, more = conversation(answer, column, number)
    return _conversation(before + after, weights + more, f"its {column}", number, context=len(before))


def _read_text(row: Row, number: int) -> Example:
    """Plain text; all of it is learned."""
    return Text(None, string(row["text"], "text", number))


def _read_preference(row: Row, number: int) -> Example:
    """Two answers to one prompt, for methods to come; the prompt is a column or what both answers begin with."""
    prompt, (chosen, rejected) = row.get("prompt"), (row["chosen"], row["rejected"])
    if isinstance(chosen, list) != isinstance(rejected, list):
        refuse(number, f"chosen is {shown(chosen)} and rejected {shown(rejected)}", "give both in one form")
    if isinstance(prompt, str) and isinstance(chosen, list):  # often repeated as the first message of both
        opening = {"role": "user", "content": prompt}
        repeated = chosen[:1] == rejected[:1] == [opening]
        prompt = None if repeated else [opening]
    if prompt is not None:
        return Preference(*(_answered(prompt, row[side], side, number) for side in ("chosen", "rejected")))
    if not isinstance(chosen, list):
        return Preference(*(Text(None, string(row[side], side, number)) for side in ("chosen", "rejected")))
    (a, a_weights), (b, b_weights) = (conversation(row[side], side, number) for side in ("chosen", "rejected"))
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return Preference(
        _conversation(a, a_weights, "chosen", number, context=shared),
        _conversation(b, b_weights, "rejected", number, context=shared),
    )


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _read_messages),
    "preference": Format(("chosen", "rejected"), _read_preference),
    "sharegpt": Format(("conversations",), _read_sharegpt),
    "alpaca": Format(("instruction", "output"), _read_alpaca),
    "prompt-completion": Format(("prompt", "completion"), _read_prompt_completion),
    "text": Format(("text",), _read_text),
}
"""Every format by its name, in the order in which columns are tried."""
