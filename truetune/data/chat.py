"""From an example to documents: the chat template rendered, tokenised, and the targets marked.

Where the answers stand in the text is found in ``data.turns``. The text of a document is tokenised exactly once, so
the tokens are those of ``apply_chat_template``. An answer ends with the token that stops generation, so that stopping
is learned; whitespace that the template writes after it is no target. A token that straddles the start of an answer
is a target if it carries a visible character of it: otherwise the answer's first word would never be learned, nor
anything of a one-word answer.

Left out: slow tokenizers, which do not say which characters a token stands for; training on other roles.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from truetune.data import template
from truetune.data.batch import Document
from truetune.data.formats import Conversation, Example, Preference, Text
from truetune.data.messages import REASONING, ROLES, Message, place, refuse
from truetune.data.template import Rendering, Span
from truetune.data.turns import Answer, Turns, View, spelled, spelling
from truetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Targets = Literal["assistant", "last", "all"]
TooLong = Literal["truncate", "drop", "split", "error"]

DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\\n' if add_generation_prompt else '' }}"
)
"""For tokenizers without a chat template: ``Role:``, a new line, the content; eos ends what is learned."""

EMPTY, NO_TARGETS, CUT_AWAY = "empty", "no targets", "targets beyond max_length"
WEIGHTLESS, TOO_LONG = "weight 0", "longer than max_length"
REASONS = (EMPTY, NO_TARGETS, CUT_AWAY, WEIGHTLESS, TOO_LONG)
"""Why a row is no document."""

KINDS = ("template", *ROLES, "prompt", "text")
"""Whose content a token carries; "template" is the rest."""
_CODE = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example as tokens.

    documents:       none if the row is dropped, for the reason in ``dropped``; several if it is unrolled or split.
    length:          tokens of its longest document before anything was cut.
    cut:             positions (int64), in the uncut documents, of the targets that the limit took away.
    tokens_by_role:  tokens of the documents by the role whose content they carry; "template" for the rest.
    targets_by_role: the same for their targets; the stop token counts with its answer.
    notes:           what had to be done to render it, or what the template added.
    kinds:           int8 [L] per document: the place in ``KINDS`` of every token.
    """

    documents: tuple[Document, ...]
    dropped: str | None
    length: int
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    tokens_by_role: Counter[str] = field(default_factory=Counter)
    targets_by_role: Counter[str] = field(default_factory=Counter)
    notes: frozenset[str] = frozenset()
    kinds: tuple[np.ndarray, ...] = ()


class Draft(NamedTuple):
    """A document of any length, and for every token (int8 [L]) the code of the role whose content it carries."""

    document: Document
    kinds: np.ndarray


class Written(NamedTuple):
    """An example as the texts to be learned from, none if all of it weighs nothing.

    of: what was written: a conversation, or bare text. notes: what is to be told of it.
    """

    row: int
    of: Conversation | Text
    views: list[View]
    notes: Collection[str] = ()


class Renderer:
    """Turns examples into documents of at most ``max_length`` tokens.

    ``stop_ids`` are the tokens that end generation. ``targets``: every assistant turn, only the last, or every token
    after the first. ``too_long``: what becomes of a document above ``max_length``; "error" leaves it out, and whoever
    has all rows refuses them (``dataset.tokenize``). ``template`` is the chat template in use, the tokenizer's own or
    ``DEFAULT_TEMPLATE``; save it with the model, as ``template_digest`` (SHA-256) is what a later user compares.
    Raises UserError for a tokenizer that cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        max_length: int,
        targets: Targets = "assistant",
        too_long: TooLong = "truncate",
    ):
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
        self.max_length, self.targets, self.too_long = max_length, targets, too_long
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
        self._stops = frozenset(str(tokenizer.decode([i])).strip() for i in stop_ids)
        self._added: str | None = None

    def as_chat(self, example: Example) -> Conversation | None:
        """The conversation that the example is rendered as; None if it is bare text from BOS to EOS."""
        if isinstance(example, Conversation):
            return example
        if isinstance(example, Preference) or example.prompt is None or not self._has_template:
            return None
        turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        return Conversation(turns, weights=None if example.weight == 1 else (example.weight,) * 2)

    def chosen(self, example: Example) -> Example:
        """The example with no more to learn than ``targets`` says."""
        if self.targets != "last" or not isinstance(example, Conversation):
            return example
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        return replace(example, context=max([example.context, *turns]))

    def documents(self, example: Example, row: int = 0) -> Rendered:
        """The example as documents. Raises UserError, naming the row, if it cannot be rendered rightly."""
        return next(self.rendered([(row, example)]))

    def rendered(self, examples: Iterable[tuple[int, Example]]) -> Iterator[Rendered]:
        """What becomes of examples, each with the number of its row; all of them are tokenised at once.

        Raises UserError, as ``documents`` and ``examples`` do, when the others before it have been told.
        """
        written, fault = [], None
        try:
            for row, example in examples:
                written.append(self._written(example, row))
        except UserError as found:
            fault = found
        tokens = self._tokenize([view.text for one in written for view in one.views])
        for one in written:
            yield self._finish(one, [self._draft(one, view, *next(tokens)) for view in one.views])
        if fault:
            raise fault

    def _written(self, example: Example, row: int) -> Written:
        """The example as text."""
        if isinstance(example, Preference):
            fault = "it is a preference, of which next-token training would learn the better answer alone"
            refuse(row, fault, "name the better answer completion to train on it")
        chat = self.as_chat(self.chosen(example))
        if self.tokenizer.eos_token_id is None and not (chat and self._has_template):
            raise UserError(
                "the tokenizer has neither a chat template nor an eos token, so nothing would teach the "
                "model to stop; set one of them in tokenizer_config.json"
            )
        if isinstance(example, Text) and chat is None:
            return Written(row, example, [View((example.prompt or "") + example.completion, (), 0)])
        assert chat is not None
        if not chat.learned:
            return Written(row, chat, [])
        return Written(row, chat, *template.bounded(place(row), partial(self._views, chat, row)))

    def _views(self, chat: Conversation, row: int) -> tuple[list[View], set[str]]:
        """The texts of a conversation with the answers in them, and what is to be told of them."""

        def plainly(messages: list[Message]) -> str:
            return self._render(messages, row, chat.tools).text

        empty, objects = spelling(chat, plainly)
        turns = Turns(
            chat,
            row,
            lambda messages, prompt: self._render(spelled(messages, empty, objects), row, chat.tools, prompt),
            self._stops,
        )
        views = [turns.everything()] if self.targets == "all" else turns.views()
        if chat.tools and self._render(spelled(chat.messages, empty, objects), row, None).text == views[-1].text:
            refuse(row, "it declares tools, which the chat template does not show", "remove them")
        if chat.messages[0]["role"] not in ("system", "developer") and not chat.tools and (added := self.added(row)):
            turns.notes.add(f"the chat template adds: {added}")
        return views, turns.notes

    def added(self, row: int = 0) -> str:
        """What the template puts before a conversation that has no system turn, such as a default system prompt."""
        if self._added is None:
            asked = [{"role": "user", "content": word} for word in ("first question", "second question")]
            try:
                texts = [self._render(asked[:1], row, None).text]
                texts.append(
                    self._render([asked[0], {"role": "assistant", "content": "an answer"}, asked[1]], row, None).text
                )
            except UserError:  # it wants other turns than these, and the rows will show which
                texts = ["", ""]
            for token in self.tokenizer.get_added_vocab():
                texts = [text.replace(token, "") for text in texts]
            first = texts[0].partition(asked[0]["content"])[0]
            later = texts[1].partition("an answer")[2].partition(asked[1]["content"])[0]
            while first and later and first[-1] == later[-1]:
                first, later = first[:-1], later[:-1]
            self._added = first.strip() if any(map(str.isalnum, first)) else ""
        return self._added

    def _render(
        self, messages: list[Message], row: int, tools: list[Message] | None, prompt: bool = False
    ) -> Rendering:
        return template.render(self.tokenizer, messages, place(row), self.template, prompt, tools)

    def _draft(self, written: Written, view: View, ids: list[int], offsets: np.ndarray) -> Draft:
        """A text as a document of any length."""
        if isinstance(written.of, Text):
            return self._text(written.of, written.row, ids, offsets)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            refuse(written.row, "it begins with two BOS tokens", "remove the one in its text or in the template")
        weights = np.zeros(len(ids), dtype=np.float32)
        ends = []
        for answer in view.answers:
            first, last = self._cover(view.text, ids, offsets, answer)
            if first <= last:
                weights[first : (len(ids) if self.targets == "all" else last + 1)] = answer.weight
                ends.append(last)
        kinds = _kinds(written.of.messages[: view.shown], view.text, offsets)
        if self.targets != "all":
            kinds[weights > 0] = _CODE["assistant"]
        return _weighed(ids, weights, ends, kinds, written.row)

    def _text(self, example: Text, row: int, ids: list[int], offsets: np.ndarray) -> Draft:
        prompt = example.prompt or ""
        begin = 0 if example.prompt is None else _first(prompt + example.completion, offsets, len(prompt))
        eos = [self.tokenizer.eos_token_id]
        before = self._bos if ids[:1] != self._bos else []
        after = eos if ids[-1:] != eos else []
        kinds = np.full(len(before) + len(ids) + len(after), _CODE["text"], dtype=np.int8)
        kinds[: len(before) + begin] = _CODE["prompt"]
        kinds[: len(before)] = _CODE["template"]
        learned = (kinds == _CODE["text"]) | (self.targets == "all")
        weights = np.where(learned, example.weight, 0).astype(np.float32)
        return _weighed([*before, *ids, *after], weights, [len(kinds) - 1], kinds, row)

    def _finish(self, written: Written, drafts: list[Draft]) -> Rendered:
        """Bring the drafts to their length, count, and drop what has nothing to learn."""
        if not drafts:
            return Rendered((), WEIGHTLESS, 0)
        if isinstance(written.of, Text) and not written.views[0].text.strip():
            return Rendered((), EMPTY, len(drafts[0].document))
        documents: list[Document] = []
        kinds: list[np.ndarray] = []
        cut = []
        for draft in drafts:
            lost = draft.document.targets.copy()
            for start, stop in self._pieces(len(draft.document)):
                part = draft.document.part(start, stop)
                if part.target_count:
                    documents.append(part)
                    kinds.append(draft.kinds[start:stop])
                    lost[start:stop] &= ~part.targets
            cut.append(np.flatnonzero(lost))
        dropped = None
        if not documents:
            long = CUT_AWAY if self.too_long == "truncate" else TOO_LONG
            dropped = long if any(draft.document.target_count for draft in drafts) else NO_TARGETS
        return Rendered(
            tuple(documents),
            dropped,
            length=max(len(draft.document) for draft in drafts),
            cut=np.concatenate(cut),
            tokens_by_role=_tally(kinds),
            targets_by_role=_tally([found[part.targets] for found, part in zip(kinds, documents, strict=True)]),
            notes=frozenset(written.notes),
            kinds=tuple(kinds),
        )

    def _pieces(self, length: int) -> list[Span]:
        """What becomes of a document of ``length`` tokens. Pieces share one token: the last of one is the first of
        the next, as context, so that every target but the first token is in exactly one of them as a target."""
        limit = self.max_length
        if length <= limit:
            return [(0, length)]
        if self.too_long == "truncate":
            return [(0, limit)]
        if self.too_long == "split":
            return [(start, min(start + limit, length)) for start in range(0, length - 1, limit - 1)]
        return []

    def _tokenize(self, texts: list[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Token ids of each, and the characters [L, 2] that each stands for."""
        if not texts:
            return
        tokens = self.tokenizer(
            texts,
            add_special_tokens=False,  # a template writes its own
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, spans in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            yield ids, np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(ids)).reshape(-1, 2)

    def _cover(self, text: str, ids: list[int], offsets: np.ndarray, answer: Answer) -> Span:
        """First and last target of an answer: up to the stop token if the turn ends in one."""
        first = _first(text, offsets, answer.start)
        last = int(np.count_nonzero(offsets[:, 0] < answer.end)) - 1
        for end in range(last, first - 1, -1):
            if ids[end] in self.stop_ids:
                return first, end
            if text[slice(*offsets[end])].strip():
                break
        return first, last


def _weighed(ids: list[int], weights: np.ndarray, ends: list[int], kinds: np.ndarray, row: int) -> Draft:
    """A draft whose targets are the tokens of a weight above 0. The first token is never a target."""
    weights[:1] = 0
    targets = weights > 0
    plain = bool((weights[targets] == 1).all())
    return Draft(Document(np.array(ids, dtype=np.int32), targets, row, tuple(ends), None if plain else weights), kinds)


def _first(text: str, offsets: np.ndarray, start: int) -> int:
    """The first token that belongs to what starts at character ``start``; their number if none does."""
    begins, ends = offsets.T
    found = np.flatnonzero(ends > start)  # not begins: some tokenizers leave a token's space out of its offsets
    if not len(found):
        return len(offsets)
    first = int(found[0])
    straddles = begins[first] < start
    return first + bool(straddles and not text[start : ends[first]].strip())


def _kinds(messages: list[Message], text: str, offsets: np.ndarray) -> np.ndarray:
    """For every token the code of the role whose content it carries."""
    kinds = np.full(len(offsets), _CODE["template"], dtype=np.int8)
    end = 0
    for message in messages:
        for part in (*(message.get(key, "") for key in REASONING), message.get("content", "")):
            content = part.strip()
            begin = text.find(content, end)
            if content and begin >= 0:
                end = begin + len(content)
                kinds[(offsets[:, 1] > begin) & (offsets[:, 0] < end)] = _CODE[message["role"]]
    return kinds


def _tally(parts: list[np.ndarray]) -> Counter[str]:
    counts = np.bincount(np.concatenate(parts)) if parts else ()
    return Counter({KINDS[code]: int(n) for code, n in enumerate(counts) if n})
