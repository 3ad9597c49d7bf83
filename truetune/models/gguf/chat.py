"""A chat template for Ollama, whose templates are Go programs: measured from the model's own, not translated.

The model's template (Jinja) renders a few conversations of words that occur nowhere else, which shows what stands
between them. If every text between two turns depends on their roles alone, those texts are the whole template, and it
can be said in Go. Whether this is so is tried on further conversations, every one of which must come out the same.
Tools, images and thoughts are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from truetune.data.messages import Message
from truetune.data.template import bounded, render
from truetune.errors import UserError

ROLES = ("system", "user", "assistant")
_FIRST, _OWN, _ANSWER, _SECOND = "qfirstq", "qownq", "qanswerq", "qsecondq"
TRIALS: tuple[tuple[str, ...], ...] = (
    ("u", "What is it?"),
    ("s", "Be brief.", "u", "What\nis it?"),
    ("u", "One", "a", "Two", "u", "Three"),
    ("s", "You are {{ kind }}.", "u", 'A "quoted" word', "a", "It's <b>bold</b> & {% true %}", "u", "漢字 é 😀"),
    ("u", "1", "a", "2", "u", "3", "a", "4", "u", "5", "a", "6", "u", "7"),
    ("s", "S\n\nT", "u", "1", "a", "    code\n    more\n\nend", "u", "3", "a", "", "u", "5"),
)
"""Conversations that end with a question: roles by their first letter, each with what is said."""
SPACED = ("s", " s\n", "u", "\n u  ", "a", " a \n", "u", " u ")


@dataclass(frozen=True, slots=True)
class Shape:
    """A chat template that depends on roles alone.

    bare: what begins a conversation without a system turn; before, after: what stands around a turn's content, by
    role; prompt: what asks for an answer. strips: the model's own template takes the spaces around a content away.
    """

    bare: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str
    strips: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """What the Go template renders of ``messages``, which end with a question."""
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        bare = "" if messages[0]["role"] == "system" else self.bare
        return bare + "".join(turns) + (self.prompt if messages[-1]["role"] != "assistant" else "")

    def go(self) -> str:
        """The template in Go: https://pkg.go.dev/text/template, with Ollama's ``.Messages``."""
        branches = [
            f'if eq $m.Role "{role}" }}}}{_literal(self.before[role])}{{{{ $m.Content }}}}{_literal(self.after[role])}'
            for role in ROLES
            if role in self.before
        ]
        turns = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        first = 'and (eq $i 0) (ne $m.Role "system")' if "system" in self.before else "eq $i 0"
        bare = f"{{{{ if {first} }}}}{_literal(self.bare)}{{{{ end }}}}" if self.bare else ""
        every = f"{{{{ range $i, $m := .Messages }}}}{bare}{turns}{{{{ $last = $m.Role }}}}{{{{ end }}}}"
        prompt = f'{{{{ if ne $last "assistant" }}}}{_literal(self.prompt)}{{{{ end }}}}'
        return f'{{{{ $last := "" }}}}{every}{prompt}'


def _literal(text: str) -> str:
    """A Go string: JSON's escapes are among Go's."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def conversation(words: Sequence[str], strip: bool = False) -> list[Message]:
    names = {role[0]: role for role in ROLES}
    pairs = zip(words[::2], words[1::2], strict=True)
    return [{"role": names[r], "content": text.strip() if strip else text} for r, text in pairs]


def measure(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> Shape:
    """The shape of the tokenizer's chat template, less the BOS that is added anyway if ``add_bos``.

    Raises UserError, with the reason, where the template is of no such shape.
    """
    if not tokenizer.chat_template:
        _refuse("there is none")
    if "strftime_now" in tokenizer.get_chat_template():
        _refuse("it writes the date")
    shape = _from_joints(tokenizer)
    bos = str(tokenizer.bos_token) if add_bos else ""
    shape = _without(bos, shape)
    skipped = 0 if "system" in shape.before else 2

    def differ(words: Sequence[str], strip: bool = False) -> bool:
        truth = _rendered(tokenizer, conversation(words))
        return truth.removeprefix(bos) != shape.render(conversation(words, strip)) or not truth.startswith(bos)

    spaced = SPACED[skipped:]
    strips = differ(spaced) and not differ(spaced, strip=True)
    trials = [words for words in TRIALS if not skipped or words[0] != "s"]
    if any(differ(words, strips) for words in (spaced, *trials)):
        _refuse("what it writes depends on more than the roles of the turns")
    return replace(shape, strips=strips)


def _refuse(reason: str) -> NoReturn:
    raise UserError(f"the chat template can't be said in Ollama's language: {reason}; apply it with another program")


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = True) -> str:
    where = "a trial conversation"
    template = tokenizer.get_chat_template()
    return bounded(where, lambda: render(tokenizer, messages, where, template, prompt)).text


def _joints(tokenizer: PreTrainedTokenizerBase, *words: str) -> list[str]:
    """What stands before, between and after the ``words`` of a conversation."""
    text = _rendered(tokenizer, conversation(words))
    found = []
    for word in words[1::2]:
        before, met, text = text.partition(word)
        if not met or word in text:
            _refuse("it does not write every turn once, in order")
        found.append(before)
    return [*found, text]


def _end(tokenizer: PreTrainedTokenizerBase, *words: str) -> str:
    """What stands after the last of the ``words`` where no answer is asked for."""
    return _rendered(tokenizer, conversation(words), prompt=False).rpartition(words[-1])[2]


def _from_joints(tokenizer: PreTrainedTokenizerBase) -> Shape:
    first, to_answer, to_user, to_prompt = _joints(tokenizer, "u", _FIRST, "a", _ANSWER, "u", _SECOND)
    joints = [first, to_user]
    before_system: str | None
    from_system: str | None
    try:
        before_system, from_system, _ = _joints(tokenizer, "s", _OWN, "u", _FIRST)
        joints.append(from_system)
    except UserError:  # it may well have no place for instructions
        before_system = from_system = None
    # Where a text between two turns is cut into the end of one and the beginning of the next is free, so long as both
    # are the same beside any turn; the best cut is where a conversation that stops there ends.
    closed, asked = (_end(tokenizer, *words) for words in (("u", _FIRST, "a", _ANSWER), ("u", _FIRST)))
    user = to_user.removeprefix(closed)
    if not all(joint.endswith(user) for joint in joints):
        user = _begin([joint[::-1] for joint in joints])[::-1]
    ends = _begin([to_answer, to_prompt])
    ends = asked if ends.startswith(asked) else ends
    before = {"user": user, "assistant": to_answer.removeprefix(ends)}
    after = {"user": ends, "assistant": to_user.removesuffix(user)}
    if before_system is not None and from_system is not None:
        before["system"], after["system"] = before_system, from_system.removesuffix(user)
    return Shape(first.removesuffix(user), before, after, to_prompt.removeprefix(ends))


def _begin(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    return "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, zip(*texts, strict=False)))


def _without(bos: str, shape: Shape) -> Shape:
    before = {role: text.removeprefix(bos) if role == "system" else text for role, text in shape.before.items()}
    return replace(shape, bare=shape.bare.removeprefix(bos), before=before)


def turn_end(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> int | None:
    """The stop token that the chat template writes after an answer; without one EOS."""
    if tokenizer.chat_template:
        after = _end(tokenizer, "u", _FIRST, "a", _ANSWER)
        ends = (token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in stop_ids)
        return next(ends, tokenizer.eos_token_id)
    return tokenizer.eos_token_id


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes BOS first; True where there is no template to leave it out."""
    if not tokenizer.chat_template or tokenizer.bos_token is None:
        return True
    return _rendered(tokenizer, conversation(("u", _FIRST))).startswith(tokenizer.bos_token)
