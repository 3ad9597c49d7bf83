"""The label mask against brute force: what a model would have to say after each rendered prompt."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from truetune.data.chat import CUT_AWAY, DEFAULT_TEMPLATE, EMPTY, NO_TARGETS, Renderer
from truetune.data.formats import Conversation, Text
from truetune.data.turns import CONTINUED, UNROLLED
from truetune.errors import UserError

KINDS = ["bytes", "trimmed bytes", "metaspace", "prepend", "unigram", "wordpiece"]
WITH_STOP = ["chatml", "inst", "empty thought"]

TWO_ANSWERS = [
    {"role": "user", "content": "What does the list return?"},
    {"role": "assistant", "content": "Yes, the number of items."},
    {"role": "user", "content": "And if empty?"},
    {"role": "assistant", "content": "Zero"},
]


def renderer_of(tokenizer: Any, max_length: int = 4096) -> Renderer:
    return Renderer(tokenizer, frozenset([tokenizer.eos_token_id]), max_length)


def ids_of(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]


def brute_force(tokenizer: Any, messages: list[dict[str, str]], context: int = 0) -> list[bool] | None:
    """Targets found with token ids alone; None where a prompt's tokens are not those of its continuation."""
    whole = ids_of(tokenizer, messages)
    targets = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < context:
            continue
        prompt, turn = ids_of(tokenizer, messages[:i], prompt=True), ids_of(tokenizer, messages[: i + 1])
        if turn[: len(prompt)] != prompt or whole[: len(turn)] != turn:
            return None
        last = max(t for t in range(len(turn)) if turn[t] == tokenizer.eos_token_id)
        targets[len(prompt) : last + 1] = [True] * (last + 1 - len(prompt))
    return targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "inst", "no stop"])
def test_tokens_are_those_of_the_chat_template(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, template)
    document = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS), 7).documents[0]
    assert document.tokens.tolist() == ids_of(tokenizer, TWO_ANSWERS)
    assert document.row == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "inst"])
def test_targets_equal_brute_force(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, template)
    document = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS)).documents[0]
    assert document.targets.tolist() == brute_force(tokenizer, TWO_ANSWERS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", WITH_STOP)
def test_targets_are_the_answers_and_their_stop_tokens(make_tokenizer, kind, template):
    tokenizer = make_tokenizer(kind, template)
    documents = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS)).documents
    learned = "".join(tokenizer.decode(d.tokens[d.targets]) for d in documents).replace(" ", "")
    eos = tokenizer.eos_token
    assert learned.replace("##", "") == f"Yes,thenumberofitems.{eos}Zero{eos}"
    assert [d.tokens[e] for d in documents for e in d.ends] == [tokenizer.eos_token_id] * 2
    assert all(d.targets[e] for d in documents for e in d.ends)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.text(st.sampled_from("ab Z\n.<>|☕ö\u200b\tassistant"), max_size=12), min_size=2, max_size=4),
    kind=st.sampled_from(KINDS),
    template=st.sampled_from(["chatml", "inst"]),
)
def test_targets_equal_brute_force_for_any_text(make_tokenizer, contents, kind, template):
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    tokenizer = make_tokenizer(kind, template)
    expected = brute_force(tokenizer, messages)
    assume(expected is not None)
    assume(tokenizer.unk_token_id not in ids_of(tokenizer, messages))  # one may stand for prompt and answer
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert document.tokens.tolist() == ids_of(tokenizer, messages)
    assert document.targets.tolist() == expected


def test_generation_prompt_that_is_no_prefix(make_tokenizer):
    """Its empty thought is in no rendered turn; targets start with the content all the same."""
    tokenizer = make_tokenizer("bytes", "empty thought")
    document = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS[:2])).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Yes, the number of items.<|im_end|>"


def test_conversation_that_starts_with_the_answer(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    messages = [{"role": "assistant", "content": "Ask again later."}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Ask again later.<|im_end|>"


def test_rewriting_template_is_unrolled(make_tokenizer):
    """One document per answer, each as the model would see it at that turn."""
    tokenizer = make_tokenizer("bytes", "rewrites")
    rendered = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS), 3)
    assert rendered.notes == {UNROLLED} and rendered.dropped is None
    assert [tokenizer.decode(d.tokens[d.targets]) for d in rendered.documents] == [
        "<think></think>Yes, the number of items.<|im_end|>",
        "<think></think>Zero<|im_end|>",
    ]
    for document, turns in zip(rendered.documents, (2, 4), strict=True):
        assert document.tokens.tolist() == ids_of(tokenizer, TWO_ANSWERS[:turns])
        assert document.targets.tolist() == brute_force(tokenizer, TWO_ANSWERS[:turns], context=turns - 1)
        assert document.row == 3 and len(document.ends) == 1


def test_generation_prompt_that_no_turn_has_is_what_the_answer_continues(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "empty thought")
    rendered = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS))
    assert rendered.notes == {UNROLLED, CONTINUED}
    for document, turns in zip(rendered.documents, (1, 3), strict=True):
        prompt = ids_of(tokenizer, TWO_ANSWERS[:turns], prompt=True)
        assert document.tokens[: len(prompt)].tolist() == prompt
        assert document.targets.tolist() == [*(i >= len(prompt) for i in range(len(document) - 1)), False]
        assert tokenizer.decode(document.tokens[len(prompt) :]) == TWO_ANSWERS[turns]["content"] + "<|im_end|>\n"


def test_template_that_leaves_out_some_of_an_answer_is_refused(make_tokenizer):
    renderer = renderer_of(make_tokenizer("bytes", "strips reasoning"))
    answer = {"role": "assistant", "content": "<think>Zero?</think>Zero"}
    with pytest.raises(UserError, match=r"row 5 .*does not show all of turn 1"):
        renderer.documents(Conversation([TWO_ANSWERS[0], answer]), 5)
    assert renderer.documents(Conversation(TWO_ANSWERS)).documents[0] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_context_turns_are_not_learned(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind, "chatml")
    document = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS, context=3)).documents[0]
    assert document.targets.tolist() == brute_force(tokenizer, TWO_ANSWERS, context=3)
    assert len(document.ends) == 1


def test_template_without_a_stop_token_trains_the_whole_turn(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "no stop")
    document = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == " Yes, the number of items.\nZero\n"
    assert [tokenizer.decode(document.tokens[e]) for e in document.ends] == ["\n", "\n"]


def test_stop_token_inside_an_answer_does_not_end_it(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": "Yes<|im_end|> and no"}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Yes<|im_end|> and no<|im_end|>"


def test_stop_token_inside_an_answer_that_has_none_at_its_end(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "no stop")
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": "Yes</s> and no"}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == " Yes</s> and no\n"


def test_answer_without_tokens_has_no_end(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": ""}, *TWO_ANSWERS[2:]]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Zero"
    assert document.ends == (len(document) - 1,)


def test_header_that_depends_on_the_content_is_refused(make_tokenizer):
    """Neither the generation prompt nor other contents tell where such an answer starts."""
    tokenizer = make_tokenizer("bytes", "empty thought")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m.role + '\\n'", "m.role + ('\\n' if m.content | length < 2 else ':\\n')"
    )
    with pytest.raises(UserError, match=r"row 2 .*turn 1 differently by its content"):
        renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS[:2]), 2)


@pytest.mark.parametrize("kind", ["bytes", "trimmed bytes"])
def test_token_that_straddles_the_start_of_an_answer_is_a_target(make_tokenizer, kind):
    """The token of " the" is half in "assistant: "; without it the word would not be learned."""
    tokenizer = make_tokenizer(kind, "no stop")
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": "the list"}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == " the list\n"


def test_token_that_straddles_with_nothing_visible_is_no_target(make_tokenizer):
    """A marker that swallows the spaces after it stays what it is: part of the prompt."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|answer|>", rstrip=True, special=True)]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ '<|answer|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
    )
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": "  Zero"}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Zero<|im_end|>"


def test_space_at_the_end_of_a_prompt_is_no_target(make_tokenizer):
    """Even where a tokenizer reports the token of a space as standing for no character."""
    tokenizer = make_tokenizer("trimmed bytes", "no stop")
    tokenizer.chat_template = tokenizer.chat_template.replace(": '", ":\\n  \\n'")
    messages = [TWO_ANSWERS[0], {"role": "assistant", "content": "Zero"}]
    document = renderer_of(tokenizer).documents(Conversation(messages)).documents[0]
    assert tokenizer.decode(document.tokens[document.targets]) == "Zero\n"


def test_pad_token_plays_no_part(make_tokenizer):
    plain = make_tokenizer("bytes", "chatml")
    padded = make_tokenizer("bytes", "chatml", pad_token="<|im_end|>")
    a, b = (renderer_of(t).documents(Conversation(TWO_ANSWERS)).documents[0] for t in (plain, padded))
    assert a.targets.tolist() == b.targets.tolist() and a.tokens.tolist() == b.tokens.tolist()


def test_template_error_names_the_row(make_tokenizer):
    renderer = renderer_of(make_tokenizer("bytes", "inst"))
    messages = [{"role": "system", "content": "Be brief."}, *TWO_ANSWERS]
    with pytest.raises(UserError, match=r"row 12 .*only user and assistant are supported"):
        renderer.documents(Conversation(messages), 12)


def test_double_bos_of_a_chat_is_refused(make_tokenizer):
    renderer = renderer_of(make_tokenizer("bytes", "inst"))
    renderer.tokenizer.chat_template = "<s>" + renderer.tokenizer.chat_template
    renderer = renderer_of(renderer.tokenizer)
    with pytest.raises(UserError, match="two BOS"):
        renderer.documents(Conversation(TWO_ANSWERS))


def test_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"use the model's fast tokenizer"):
        Renderer(SimpleNamespace(is_fast=False), frozenset(), 8)


def test_several_templates_without_a_default_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = {"tool_use": tokenizer.chat_template, "rag": tokenizer.chat_template}
    with pytest.raises(UserError, match="name one of them default"):
        renderer_of(tokenizer)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_text_stands_between_bos_and_eos(make_tokenizer, kind, adds_bos):
    tokenizer = make_tokenizer(kind, "chatml", adds_bos=adds_bos)  # the template is for conversations
    text = "Return the number of items."
    document = renderer_of(tokenizer).documents(Text(None, text)).documents[0]
    assert document.tokens.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert document.targets.tolist() == [False] + [True] * (len(document) - 1)
    assert (document.tokens[0] == tokenizer.bos_token_id) == adds_bos
    assert document.ends == (len(document) - 1,)


def test_bos_and_eos_that_a_text_brings_are_not_doubled(make_tokenizer):
    renderer = renderer_of(make_tokenizer("bytes", adds_bos=True))
    bare = renderer.documents(Text(None, "Ask again later.")).documents[0]
    brought = renderer.documents(Text(None, "<s>Ask again later.</s>")).documents[0]
    assert brought.tokens.tolist() == bare.tokens.tolist()
    assert brought.targets.tolist() == bare.targets.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_without_a_template(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind, adds_bos=True)
    document = renderer_of(tokenizer).documents(Text("What does the list return?", " Yes, zero")).documents[0]
    learned = tokenizer.decode(document.tokens[document.targets]).replace(" ##", "")
    assert "".join(learned.split()) == "Yes,zero</s>"


def test_prompt_and_completion_with_a_template_are_a_chat(make_tokenizer):
    renderer = renderer_of(make_tokenizer("bytes", "chatml"))
    a = renderer.documents(Text(TWO_ANSWERS[0]["content"], TWO_ANSWERS[1]["content"])).documents[0]
    b = renderer.documents(Conversation(TWO_ANSWERS[:2])).documents[0]
    assert a.tokens.tolist() == b.tokens.tolist() and a.targets.tolist() == b.targets.tolist()


@pytest.mark.parametrize("adds_bos", [True, False])
def test_conversation_without_a_template_uses_the_stated_one(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer("bytes", adds_bos=adds_bos)
    renderer = renderer_of(tokenizer)
    document = renderer.documents(Conversation(TWO_ANSWERS[:2])).documents[0]
    shown = "User:\nWhat does the list return?\nAssistant:\nYes, the number of items.</s>\n"
    assert tokenizer.decode(document.tokens) == "<s>" * adds_bos + shown
    assert tokenizer.decode(document.tokens[document.targets]) == "Yes, the number of items.</s>"
    assert renderer.template.endswith(DEFAULT_TEMPLATE)
    assert renderer.template_digest == hashlib.sha256(renderer.template.encode()).hexdigest()
    tokenizer.chat_template = renderer.template  # what is saved renders the same
    assert ids_of(tokenizer, TWO_ANSWERS[:2]) == document.tokens.tolist()


def test_without_template_and_eos_nothing_is_rendered(make_tokenizer):
    renderer = Renderer(make_tokenizer("bytes", eos_token=None), frozenset(), 64)
    for example in (Text(None, "Ask"), Text("Ask", "Yes"), Conversation(TWO_ANSWERS)):
        with pytest.raises(UserError, match="neither a chat template nor an eos token"):
            renderer.documents(example)


@pytest.mark.parametrize("text", ["", " \n "])
def test_blank_text_is_dropped(make_tokenizer, text):
    rendered = renderer_of(make_tokenizer("bytes", adds_bos=True)).documents(Text(None, text))
    assert not rendered.documents and rendered.dropped == EMPTY


def test_lone_first_token_is_no_target(make_tokenizer):
    """Nothing comes before it, so it cannot be predicted."""
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rendered = renderer_of(tokenizer).documents(Conversation([{"role": "assistant", "content": "<s>"}]))
    assert not rendered.documents and rendered.dropped == NO_TARGETS


def test_truncation_cuts_the_end_and_says_what_it_cut(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    whole = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS))
    limit = whole.documents[0].ends[0] + 2
    cut = renderer_of(tokenizer, limit).documents(Conversation(TWO_ANSWERS))
    assert cut.length == len(whole.documents[0]) > limit == len(cut.documents[0])
    assert cut.documents[0].tokens.tolist() == whole.documents[0].tokens[:limit].tolist()
    assert cut.documents[0].targets.tolist() == whole.documents[0].targets[:limit].tolist()
    assert cut.documents[0].ends == whole.documents[0].ends[:1]
    assert cut.cut.tolist() == [i for i in range(limit, whole.length) if whole.documents[0].targets[i]]
    through = renderer_of(tokenizer, limit - 1).documents(Conversation(TWO_ANSWERS)).documents[0]
    assert through.ends == whole.documents[0].ends[:1]
    short = renderer_of(tokenizer, limit - 2).documents(Conversation(TWO_ANSWERS)).documents[0]
    assert short.ends == ()  # the stop token itself was cut


def test_row_without_targets_after_truncation_is_dropped(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    whole = renderer_of(tokenizer).documents(Conversation(TWO_ANSWERS)).documents[0]
    rendered = renderer_of(tokenizer, 10).documents(Conversation(TWO_ANSWERS))
    assert not rendered.documents and rendered.dropped == CUT_AWAY
    assert len(rendered.cut) == whole.target_count


def test_tokens_are_told_by_role(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    messages = [{"role": "system", "content": "You are a helpful assistant."}, *TWO_ANSWERS]
    rendered = renderer_of(tokenizer).documents(Conversation(messages, context=3))

    def count(*contents: str) -> int:
        return sum(len(tokenizer(c)["input_ids"]) for c in contents)

    assert rendered.tokens_by_role["system"] == count(messages[0]["content"])
    assert rendered.tokens_by_role["user"] == count(messages[1]["content"], messages[3]["content"])
    assert rendered.targets_by_role == {"assistant": count("Zero") + 1}
    assert rendered.tokens_by_role["assistant"] == count("Yes, the number of items.", "Zero") + 1
    assert sum(rendered.tokens_by_role.values()) == len(rendered.documents[0])
