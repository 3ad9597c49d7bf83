"""From an example to a document: the chat template rendered, tokenised once, and its targets marked.

What is learned is found by rendering the conversation turn by turn with the tokenizer's own template, never
by looking for marker strings. For an assistant turn, let ``whole`` be the rendering that ends with it. The
answer starts where the rendering before it, with the generation prompt, stops: that is the very text which
the model continues when it is used. Where the generation prompt is no prefix of ``whole`` (some templates
end it with an empty thought that they later leave out), the answer starts where two renderings with
different contents first differ. Every ``whole`` has to be a prefix of the full rendering; a template that
rewrites earlier turns is refused, because such an answer is not what the model would be asked to produce,
and so is one that leaves out some of an answer, as templates do that strip reasoning.

An answer ends with the token that stops generation, so that stopping is learned; whitespace that the
template writes after it is no target. The full text is tokenised exactly once, so the tokens are those of
``apply_chat_template``. A token that straddles the start of an answer is a target if it carries a visible
character of it: otherwise the answer's first word would never be learned, nor anything of a one-word answer.

Left out: slow tokenizers, which do not say which characters a token stands for; training on other roles.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from truetune.data import template
from truetune.data.batch import Document
from truetune.data.formats import ROLES, Conversation, Example, Text, place, refuse
from truetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # from the first character to the one after the last

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""For tokenizers without a chat template: ``Role:``, a new line, the content; eos ends what is learned."""

EMPTY, NO_TARGETS, CUT_AWAY = "empty", "no targets", "targets beyond max_length"

_KINDS = ("template", *ROLES, "prompt", "text")  # whose content a token carries; "template" is the rest
_CODE = {kind: code for code, kind in enumerate(_KINDS)}


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as tokens.

    document:        None if the row is dropped, for the reason in ``dropped``.
    length:          tokens before truncation.
    cut:             positions (int64) of the targets that truncation took away.
    tokens_by_role:  tokens of the document by the role whose content they carry; "template" for the rest.
    targets_by_role: the same for its targets; the stop token counts with its answer.
    """

    document: Document | None
    dropped: str | None
    length: int
    cut: np.ndarray
    tokens_by_role: Counter[str]
    targets_by_role: Counter[str]


class Renderer:
    """Turns examples into documents of at most ``max_length`` tokens.

    ``stop_ids`` are the tokens that end generation. ``template`` is the chat template in use, the
    tokenizer's own or ``DEFAULT_TEMPLATE``; save it with the model, as ``template_digest`` (SHA-256) is
    what a later user compares. Raises UserError for a tokenizer that cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], max_length: int):
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} does not say which characters its tokens stand "
                "for; use the model's fast tokenizer (tokenizer.json)"
            )
        if (largest := max(tokenizer.get_vocab().values(), default=0)) > np.iinfo(np.int32).max:
            raise UserError(
                f"the tokenizer numbers a token {largest:,}, beyond any model; get an intact tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_length = max_length
        begun = tokenizer("", add_special_tokens=True)["input_ids"][:1]
        self._bos = begun if begun == [tokenizer.bos_token_id] else []
        self._has_template = bool(tokenizer.chat_template)
        self.template = ("{{ bos_token }}" if self._bos else "") + DEFAULT_TEMPLATE
        if self._has_template:
            try:
                self.template = tokenizer.get_chat_template()
            except ValueError as fault:  # several, and none is called default
                raise UserError(f"no chat template to use: {fault}; name one of them default") from fault
        self.template_digest = hashlib.sha256(self.template.encode("utf-8", "surrogatepass")).hexdigest()

    def as_chat(self, example: Example) -> Conversation | None:
        """The conversation that the example is rendered as; None if it is bare text from BOS to EOS."""
        if isinstance(example, Conversation):
            return example
        if example.prompt is None or not self._has_template:
            return None
        question = {"role": "user", "content": example.prompt}
        return Conversation([question, {"role": "assistant", "content": example.completion}])

    def document(self, example: Example, row: int = 0) -> Rendered:
        """The example as a document. Raises UserError, naming the row, if the template refuses it."""
        chat = self.as_chat(example)
        if self.tokenizer.eos_token_id is None and not (chat and self._has_template):
            raise UserError(
                "the tokenizer has neither a chat template nor an eos token, so nothing would teach the "
                "model to stop; set one of them in tokenizer_config.json"
            )
        return self._conversation(chat, row) if chat else self._text(cast(Text, example), row)

    def _conversation(self, chat: Conversation, row: int) -> Rendered:
        text, answers = template.bounded(place(row), partial(self._text_and_answers, chat, row))
        ids, offsets = self._tokenize(text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            refuse(row, "it begins with two BOS tokens", "remove the one in its text or in the template")
        targets = np.zeros(len(ids), dtype=bool)
        ends = []
        for answer in answers:
            first, last = self._cover(text, ids, offsets, answer)
            if first <= last:
                targets[first : last + 1] = True
                ends.append(last)
        kinds = _kinds(chat, text, offsets)
        kinds[targets] = _CODE["assistant"]
        return self._finish(ids, targets, kinds, ends, row)

    def _text(self, example: Text, row: int) -> Rendered:
        prompt = example.prompt or ""
        text = prompt + example.completion
        ids, offsets = self._tokenize(text)
        if not text.strip():
            return _dropped(EMPTY, len(ids))
        begin = 0 if example.prompt is None else _first(text, offsets, len(prompt))
        eos = [self.tokenizer.eos_token_id]
        before = self._bos if ids[:1] != self._bos else []
        after = eos if ids[-1:] != eos else []
        kinds = np.full(len(before) + len(ids) + len(after), _CODE["text"])
        kinds[: len(before) + begin] = _CODE["prompt"]
        kinds[: len(before)] = _CODE["template"]
        return self._finish([*before, *ids, *after], kinds == _CODE["text"], kinds, [len(kinds) - 1], row)

    def _finish(self, ids: list[int], targets: np.ndarray, kinds: np.ndarray, ends: list[int], row: int) -> Rendered:
        """Truncate, count, and drop what has nothing to learn. The first token is never a target."""
        targets[:1] = False
        if not targets.any():
            return _dropped(NO_TARGETS, len(ids))
        limit = self.max_length
        cut = limit + np.flatnonzero(targets[limit:])
        kept = targets[:limit]
        if not kept.any():
            return _dropped(CUT_AWAY, len(ids), cut)
        complete = tuple(end for end in ends if end < limit)
        document = Document(np.array(ids[:limit], dtype=np.int32), kept, row, complete)
        return Rendered(document, None, len(ids), cut, _tally(kinds[:limit]), _tally(kinds[:limit][kept]))

    def _text_and_answers(self, chat: Conversation, row: int) -> tuple[str, list[Span]]:
        text = self._render(chat.messages, row)
        return text, self._answers(chat, text, row)

    def _render(self, messages: list[Message], row: int, prompt: bool = False) -> str:
        return template.render(self.tokenizer, messages, place(row), self.template, prompt)

    def _answers(self, chat: Conversation, text: str, row: int) -> list[Span]:
        """Where each answer, with what ends its turn, stands in the full rendering."""
        spans = []
        for i, message in enumerate(chat.messages):
            if message["role"] != "assistant" or i < chat.context:
                continue
            turns = chat.messages[: i + 1]
            whole = text if len(turns) == len(chat.messages) else self._render(turns, row)
            start = self._answer_start(turns, whole, row)
            if start is None or not text.startswith(whole):
                refuse(
                    row,
                    f"the chat template renders turn {i} differently by its content or by the turns after it",
                    "give such rows as prompt and completion, one row for every answer",
                )
            if not _has_words(text[start : len(whole)], message["content"]):
                refuse(row, f"the chat template does not show all of turn {i}", "remove what it leaves out")
            spans.append((start, len(whole)))
        return spans

    def _answer_start(self, turns: list[Message], whole: str, row: int) -> int | None:
        """Where the content of the last turn starts in ``whole``; None if no rendering tells."""
        before = turns[:-1]
        if before and whole.startswith(prompt := self._render(before, row, prompt=True)):
            return len(prompt)
        a, b = (self._render([*before, {"role": "assistant", "content": c}], row) for c in ("A", "b"))
        differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        start = next(differ, None)
        return start if start is not None and whole.startswith(a[:start]) else None

    def _tokenize(self, text: str) -> tuple[list[int], np.ndarray]:
        """Token ids, and the characters [L, 2] that each stands for."""
        tokens = self.tokenizer(
            text,
            add_special_tokens=False,  # a template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return tokens["input_ids"], np.array(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2)

    def _cover(self, text: str, ids: list[int], offsets: np.ndarray, answer: Span) -> Span:
        """First and last target of an answer: up to the stop token if the turn ends in one."""
        first = _first(text, offsets, answer[0])
        last = int(np.count_nonzero(offsets[:, 0] < answer[1])) - 1
        for end in range(last, first - 1, -1):
            if ids[end] in self.stop_ids:
                return first, end
            if text[slice(*offsets[end])].strip():
                break
        return first, last


def _has_words(text: str, content: str) -> bool:
    """Whether the content is in the text, spaces apart (templates may strip it)."""
    return "".join(content.split()) in "".join(text.split())


def _first(text: str, offsets: np.ndarray, start: int) -> int:
    """The first token that belongs to what starts at character ``start``; their number if none does."""
    begins, ends = offsets.T
    found = np.flatnonzero(ends > start)  # not begins: some tokenizers leave a token's space out of its offsets
    if not len(found):
        return len(offsets)
    first = int(found[0])
    straddles = begins[first] < start
    return first + bool(straddles and not text[start : ends[first]].strip())


def _kinds(chat: Conversation, text: str, offsets: np.ndarray) -> np.ndarray:
    """For every token the code of the role whose content it carries."""
    kinds = np.full(len(offsets), _CODE["template"])
    end = 0
    for message in chat.messages:
        content = message["content"].strip()
        begin = text.find(content, end)
        if content and begin >= 0:
            end = begin + len(content)
            kinds[(offsets[:, 1] > begin) & (offsets[:, 0] < end)] = _CODE[message["role"]]
    return kinds


def _tally(kinds: np.ndarray) -> Counter[str]:
    return Counter({_KINDS[code]: int(n) for code, n in enumerate(np.bincount(kinds)) if n})


def _dropped(reason: str, length: int, cut: np.ndarray | None = None) -> Rendered:
    nothing = np.zeros(0, dtype=np.int64)
    return Rendered(None, reason, length, nothing if cut is None else cut, Counter(), Counter())
