"""An Ollama template is measured from renderings, says the same, and is not written where it could not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from folders import CHATML
from templates import ASK, CHATS, FOR, ROLE, TEMPLATES
from vocabularies import byte_level

from truetune.errors import UserError
from truetune.models.gguf.chat import SPACED, begins_with_bos, conversation, measure, turn_end


def interpret(template: str, messages: list[dict[str, Any]]) -> str:
    """The part of Go's template language that is written: range, if, else if, eq, ne, and, strings, two variables."""
    parts = re.findall(r'\{\{ ((?:"(?:\\.|[^"\\])*"|[^"{}])+) \}\}', template)
    assert template == "".join(f"{{{{ {part} }}}}" for part in parts)  # nothing between the actions
    out: list[str] = []
    state: dict[str, Any] = {"$last": None}

    def value(word: str) -> Any:
        return int(word) if word.isdigit() else eval(word) if word[0] == '"' else state[word]

    def true(condition: str) -> bool:
        if condition.startswith("and "):
            return all(true(part) for part in re.findall(r"\((.*?)\)", condition))
        test, left, right = re.findall(r'"(?:\\.|[^"\\])*"|\S+', condition)
        return bool((value(left) == value(right)) == (test == "eq"))

    def block(at: int, live: bool) -> int:
        """Run from ``at`` up to the end or else of this block; where that is."""
        while at < len(parts):
            part = parts[at]
            if part == "end" or part.startswith("else"):
                return at
            if part.startswith("range"):
                end = at
                for state["$i"], message in enumerate(messages):
                    state.update({"$m.Role": message["role"], "$m.Content": message["content"]})
                    end = block(at + 1, live)
                at = end
            elif part.startswith("if "):
                done = False
                while parts[at] != "end":
                    now = live and not done and true(parts[at].removeprefix("else ").removeprefix("if "))
                    done |= now
                    at = block(at + 1, now)
            elif live and (assigned := re.fullmatch(r"(\$\w+) :?= (.+)", part)):
                state[assigned[1]] = value(assigned[2])
            elif live:
                out.append(value(part))
            at += 1
        return at

    block(0, True)
    return "".join(out)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_the_go_template_renders_what_the_models_own_renders(name: str, add_bos: bool) -> None:
    words = byte_level(template=TEMPLATES[name])
    bos = begins_with_bos(words)
    shape = measure(words, add_bos and bos)
    assert bos == ("bos_token" in TEMPLATES[name]) and not shape.strips
    chats = [c for c in CHATS if name != "no instructions" or c[0]["role"] != "system"]
    assert len(chats) >= 4
    for chat in chats:
        truth = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        expected = truth.removeprefix("<s>") if add_bos and bos else truth
        assert interpret(shape.go(), chat) == shape.render(chat) == expected


def test_a_go_template_can_be_read() -> None:
    """As a user sees it in the Modelfile."""
    assert measure(byte_level(template=CHATML), False).go() == (
        '{{ $last := "" }}{{ range $i, $m := .Messages }}'
        '{{ if eq $m.Role "system" }}{{ "<|im_start|>system\\n" }}{{ $m.Content }}{{ "<|im_end|>\\n" }}'
        '{{ else if eq $m.Role "user" }}{{ "<|im_start|>user\\n" }}{{ $m.Content }}{{ "<|im_end|>\\n" }}'
        '{{ else if eq $m.Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ $m.Content }}{{ "<|im_end|>\\n" }}'
        '{{ end }}{{ $last = $m.Role }}{{ end }}{{ if ne $last "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ end }}'
    )


def test_spaces_that_the_template_takes_away_are_told() -> None:
    shape = measure(byte_level(template=CHATML.replace("m.content", "m.content | trim")), False)
    assert shape.strips
    assert interpret(shape.go(), conversation(SPACED, strip=True)) == shape.render(conversation(SPACED, strip=True))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "there is none"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "it writes the date"),
        (CHATML.replace("m.role", "(m.role if loop.index < 4 else 'late')"), "more than the roles of the turns"),
        (CHATML.replace("m.role", "(m.content | length | string)"), "more than the roles of the turns"),
        (FOR + "{% if m.role == 'user' %}" + ROLE + "{% endif %}" + ASK, "it does not write every turn once"),
        (FOR + "{{ m.content }}" + ROLE + ASK, "it does not write every turn once"),
        (CHATML.replace("m.content", "(m.content | trim if m.role == 'user' else m.content)"), "more than the roles"),
        ("{% if messages | length == 1 %}{{ bos_token }}{% endif %}" + CHATML, "more than the roles of the turns"),
    ],
)
def test_a_template_of_another_shape_is_refused(template: str | None, says: str) -> None:
    with pytest.raises(UserError, match=f"can't be said in Ollama's language: .*{says}.*; apply it with another"):
        measure(byte_level(template=template), False)


def test_bos_that_is_not_always_first_is_refused() -> None:
    template = FOR + "{% if m.role == 'user' %}{{ bos_token }}{% endif %}" + ROLE + ASK
    assert measure(byte_level(template=template), False)
    with pytest.raises(UserError, match="more than the roles of the turns"):
        measure(byte_level(template=template), True)


def test_the_stop_token_that_ends_a_turn_is_found() -> None:
    words = byte_level(template=CHATML)
    end, eos = words.convert_tokens_to_ids("<|im_end|>"), words.eos_token_id
    assert turn_end(words, frozenset({end, eos})) == end
    assert turn_end(words, frozenset({eos})) == eos
    assert turn_end(byte_level(template=None), frozenset({end, eos})) == eos and not begins_with_bos(words)
