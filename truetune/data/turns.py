"""Where the answers of a conversation stand in its renderings.

What is learned is found by rendering the conversation turn by turn with the tokenizer's own template, never by
looking for marker strings. For an assistant turn, ``prompt`` is the rendering of what comes before it with the
generation prompt, the very text that the model continues when it is used, and ``whole`` the rendering that ends
with the turn.

1. Where ``prompt`` is a prefix of ``whole``, the answer is the rest.
2. Where it is not, because the generation prompt holds something that no rendered turn has (an empty thought), or
   because the template renders the last question in a way of its own, the answer starts where two renderings with
   different contents first differ, and is put behind ``prompt``: again what the model would continue.
3. Where these do not differ in that way either, the template's ``{% generation %}`` mark, if it has one, tells where
   the answer starts in ``whole``. Everywhere else a mark has to contain the answer; what it has before that is given
   by the generation prompt, and is not learned.

If every answer's text is a prefix of the full rendering, the conversation is one document. If not, since the
template rewrites earlier turns when others follow, it is *unrolled*: one document per answer, which ends with it.
What the template does not show of an answer, of the turns before it or of the tools is refused, never left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from truetune.data.formats import Conversation
from truetune.data.messages import REASONING, Message, refuse
from truetune.data.template import Rendering, Span
from truetune.errors import UserError

UNROLLED = "unrolled: one document per answer, since the template rewrites earlier turns"
CONTINUED = "answers put behind the generation prompt, which the rendered turn does not contain"
MARKED = "answers found by the generation marks of the template"

Render = Callable[[list[Message], bool], Rendering]


class Answer(NamedTuple):
    """What is learned of one turn: its characters in the text, what ends its turn included, and its weight."""

    start: int
    end: int
    weight: float


class View(NamedTuple):
    """A text to be learned from: the first ``shown`` messages as rendered, and the answers in it."""

    text: str
    answers: tuple[Answer, ...]
    shown: int


class Turns:
    """The conversation of one row, rendered by ``render(messages, with the generation prompt)``.

    stops: the texts of the tokens that end generation. notes: what had to be done to render it, for the report.
    """

    def __init__(self, chat: Conversation, row: int, render: Render, stops: frozenset[str]) -> None:
        self.chat, self.row, self._render, self._stops = chat, row, render, stops
        self.notes: set[str] = set()

    def views(self) -> list[View]:
        """The texts with the answers that are to be learned. Raises UserError, naming row and turn."""
        messages, learned = self.chat.messages, self.chat.learned
        full = self._render(messages, False)
        found = {i: self._answer(i, full if i == len(messages) - 1 else None) for i in learned}
        self._require_context(full.text)
        if all(full.text.startswith(text) for text, _ in found.values()):
            return [View(full.text, tuple(answer for _, answer in found.values()), len(messages))]
        self.notes.add(UNROLLED)
        return [View(text, (answer,), i + 1) for i, (text, answer) in found.items()]

    def everything(self) -> View:
        """The full rendering as one answer, up to what ends its last assistant turn and beyond."""
        weights = {self.chat.weight(i) for i in self.chat.learned}
        turns = [i for i, m in enumerate(self.chat.messages) if m["role"] == "assistant"]
        if len(weights) > 1 or len(self.chat.learned) < sum(i >= self.chat.context for i in turns):
            refuse(self.row, "its turns have weights, but every token is learned", "set data.targets=assistant")
        text = self._render(self.chat.messages, False).text
        self._require_context(text)
        for i in self.chat.learned:
            self._require_shown(i, text)
        return View(text, (Answer(0, len(text), weights.pop()),), len(self.chat.messages))

    def _answer(self, turn: int, whole: Rendering | None) -> tuple[str, Answer]:
        """The text that ends with the turn, and the answer in it."""
        before = self.chat.messages[:turn]
        whole = whole or self._render(self.chat.messages[: turn + 1], False)
        prompt = self._render(before, True) if before else None
        marks = None if whole.marks is None else whole.marks[len((prompt and prompt.marks) or ()) :]
        text = whole.text
        if prompt and text.startswith(prompt.text):
            start = len(prompt.text)
        elif (probed := self._probed(turn, text)) is not None:
            start = probed
        elif marks:
            start, prompt = marks[0][0], None
            self.notes.add(MARKED)
        else:
            refuse(
                self.row,
                f"the chat template renders turn {turn} differently by its content, so its answer cannot be told apart",
                "use a template with {% generation %} marks",
            )
        if marks is not None:
            self._require_agreement(turn, text, start, marks)
        if prompt and not text.startswith(prompt.text):
            self._require_closed(turn, prompt.text, text, start)
            text, start = prompt.text + text[start:], len(prompt.text)
            self.notes.add(CONTINUED)
        self._require_shown(turn, text[start:])
        return text, Answer(start, len(text), self.chat.weight(turn))

    def _probed(self, turn: int, whole: str) -> int | None:
        """Where renderings with two other contents first differ; None if ``whole`` begins in another way."""
        before = self.chat.messages[:turn]
        a, b = (self._render([*before, {"role": "assistant", "content": c}], False).text for c in ("A", "b"))
        start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        return start if start is not None and whole.startswith(a[:start]) else None

    def _require_agreement(self, turn: int, whole: str, start: int, marks: list[Span]) -> None:
        """The marks of the turn contain its answer, but for spaces and what stops it."""
        if not marks:
            refuse(self.row, f"the template's generation marks leave out turn {turn}", "correct the template")
        before, after = whole[start : marks[0][0]].strip(), whole[marks[-1][1] :].strip()
        if before or after not in ("", *self._stops):
            fault = f"the template's generation mark of turn {turn} leaves out {before or after!r}"
            refuse(self.row, fault, "correct the template")

    def _require_closed(self, turn: int, prompt: str, whole: str, start: int) -> None:
        """What the generation prompt has beyond the rendered turn opens no tag that the answer leaves open."""
        same = next((i for i, (x, y) in enumerate(zip(prompt, whole, strict=False)) if x != y), len(prompt))
        extra, answer = prompt[min(same, start) :], whole[start:]
        for tag in set(re.findall(r"<(\w+)>", extra)):
            close = f"</{tag}>"
            if extra.count(f"<{tag}>") > extra.count(close) and close not in answer:
                refuse(
                    self.row,
                    f"the generation prompt opens <{tag}>, and the chat template shows turn {turn} without {close}",
                    "use a template whose generation prompt opens nothing, or whose turns show what it opens",
                )

    def _require_shown(self, turn: int, text: str) -> None:
        """The template shows all that the assistant said in the turn: content, reasoning and calls."""
        message, squeezed = self.chat.messages[turn], _squeezed(text)
        said = {key: [message[key]] for key in ("content", *REASONING) if message.get(key)}
        for name, parts in (said | {"tool_calls": called(message)}).items():
            if not _all_shown(parts, squeezed):
                what = f"turn {turn}" if name == "content" else f"{name} of turn {turn}"
                refuse(self.row, f"the chat template does not show all of {what}", "remove what it leaves out")

    def _require_context(self, text: str) -> None:
        """Nothing that was said to the assistant is missing from the rendering."""
        squeezed, end = _squeezed(text), 0
        for i, message in enumerate(self.chat.messages):
            content = _squeezed(str(message.get("content", "")))
            begin = squeezed.find(content, end)
            if begin >= 0:
                end = begin + len(content)
            elif message["role"] != "assistant":  # escaped, or left out
                other = [*self.chat.messages[:i], message | {"content": "A"}, *self.chat.messages[i + 1 :]]
                if self._render(other, False).text == text:
                    fault = f"the chat template does not show turn {i} ({message['role']})"
                    refuse(self.row, fault, "remove it, or use another template")


def called(message: Message) -> list[Any]:
    """Every name and value of the message's tool calls."""
    functions = (call["function"] for call in message.get("tool_calls", ()))
    return [leaf for f in functions for leaf in (f["name"], *_leaves(_object(f["arguments"])))]


def spelled(messages: list[Message], empty: bool, objects: bool) -> list[Message]:
    """The messages with calls as a template may want them: ``empty`` content or none, arguments as objects or JSON."""
    found = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = message | {"tool_calls": [_with_arguments(call, objects) for call in calls]}
            if not (message["content"] or empty):
                del message["content"]
        found.append(message)
    return found


SPELLINGS = ((False, True), (True, True), (False, False), (True, False))


def spelling(chat: Conversation, render: Callable[[list[Message]], str]) -> tuple[bool, bool]:
    """The first of ``SPELLINGS`` in which the template shows the first turn that calls tools.

    Templates differ in whether they want arguments as an object or as JSON, and no content as "" or as no key; OpenAI's
    rows have JSON and null. Where none is shown, the turn will be refused.
    """
    first = next((i for i, m in enumerate(chat.messages) if m.get("tool_calls")), None)
    if first is None:
        return SPELLINGS[0]
    message, turns = chat.messages[first], chat.messages[: first + 1]
    for empty, objects in SPELLINGS:
        try:
            text = _squeezed(render(spelled(turns, empty, objects)))
        except UserError:
            continue
        if _all_shown(called(message), text):
            return empty, objects
    return SPELLINGS[1]


def _with_arguments(call: Message, objects: bool) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if objects:
        arguments = _object(arguments)
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in (key, *_leaves(part))]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _all_shown(values: list[Any], squeezed: str) -> bool:
    return all(any(_squeezed(written) in squeezed for written in _spellings(value)) for value in values)


def _spellings(value: Any) -> set[str]:
    """How a template may write a value: as Python does, or as JSON does."""
    written = [json.dumps(value, ensure_ascii=ascii_) for ascii_ in (False, True)]
    return {str(value), *(w[1:-1] if isinstance(value, str) else w for w in written)}


def _squeezed(text: str) -> str:
    """Without spaces: templates may strip content."""
    return "".join(text.split())
