"""A brute-force reference of what is learned of a conversation, written without looking at the code it checks.

Every prefix of the messages is rendered by transformers' own ``apply_chat_template``, with and without the generation
prompt; each text is tokenised whole; then token by token it is asked whether the token carries characters of a
trained answer, from where the prompt ends to the token that stops it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, Any]
PLAIN = {"role": "assistant", "content": "§"}
Expected = list[tuple[list[int], list[bool]]]

DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKERS = re.compile(r"<[|\uff5c][^<>{}\n]{1,40}[|\uff5c]>|<[|/]?[a-z_]{1,24}[|]?>|\[/?g?[A-Z_]{2,24}\]")
"""What looks like a control token in the source of a template."""


def text_to_train_on() -> list[str]:
    """English, code, and characters of two to four bytes."""
    import argparse
    import textwrap

    sources = [Path(m.__file__).read_text(encoding="utf-8")[:30_000] for m in (argparse, textwrap)]
    return [
        *sources,
        "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. ☕🙂 naïve café 北京 0123456789 " * 20,
    ]


@cache
def trained(kind: str) -> str:
    """tokenizer.json of a small tokenizer of one of ``KINDS``."""
    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(text_to_train_on(), trainer)
    return str(tokenizer.to_str())


def _bytes() -> tuple[Tokenizer, Any]:
    """As GPT-2: bytes, words with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)


def _split_bytes() -> tuple[Tokenizer, Any]:
    """As Llama 3 and Qwen: a regular expression that keeps digits and line ends together, then bytes."""
    tokenizer, trainer = _bytes()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer, trainer


def _sentencepiece() -> tuple[Tokenizer, Any]:
    """As Llama 2: a space put before the text, no words, bytes for what is in no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    return tokenizer, trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, limit_alphabet=80, max_token_length=12, show_progress=False
    )


def _unigram() -> tuple[Tokenizer, Any]:
    """As T5 and XLNet: the most likely pieces, words with a mark for the space before them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, Any]:
    """As BERT: spaces are in no token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=700, special_tokens=["<unk>"], show_progress=False)


KINDS: dict[str, Callable[[], tuple[Tokenizer, Any]]] = {
    "bytes": _bytes,
    "bytes, split": _split_bytes,
    "sentencepiece": _sentencepiece,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}


def tokenizer_for(template: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the control tokens that the template writes."""
    inner = Tokenizer.from_str(trained(kind))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    markers = sorted(set(MARKERS.findall(template)))
    made.add_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    made.chat_template = template
    return made


def reference(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    stops: frozenset[int],
    tools: list[Message] | None = None,
) -> Expected:
    """(tokens, targets) of each document that the conversation should become."""
    full = _render(tokenizer, messages, tools)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], tools, add_generation_prompt=True)
        whole = _render(tokenizer, messages[: i + 1], tools)
        if whole.startswith(prompt):
            answers.append((whole, len(prompt)))
        else:  # what the model would continue with what the template makes of the answer
            begin = (
                whole.rindex(message["content"].strip())
                if message["content"]
                else _render(tokenizer, [*messages[:i], PLAIN], tools).index("§")
            )
            answers.append((prompt + whole[begin:], len(prompt)))
    if all(full.startswith(text) for text, _ in answers):
        return [_targets(tokenizer, full, [(start, len(text)) for text, start in answers], stops)]
    return [_targets(tokenizer, text, [(start, len(text))], stops) for text, start in answers]


def marked(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    stops: frozenset[int],
    tools: list[Message] | None = None,
) -> Expected:
    """The same by what transformers finds that the template marks as generated."""
    (text,), (spans,) = render_jinja_template(
        [list(messages)],
        tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [_targets(tokenizer, text, spans, stops)]


def stops_of(tokenizer: Any, messages: Sequence[Message], tools: list[Message] | None) -> frozenset[int]:
    """The control tokens that the assistant's turns end in; eos where there is none."""
    found = set()
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            text = _render(tokenizer, messages[: i + 1], tools).rstrip()
            last = tokenizer(text, add_special_tokens=False)["input_ids"][-1]
            found |= {last} & set(tokenizer.added_tokens_decoder)
    return frozenset(found or {tokenizer.eos_token_id})


def _render(tokenizer: Any, messages: Sequence[Message], tools: list[Message] | None, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))


def _targets(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], stops: frozenset[int]
) -> tuple[list[int], list[bool]]:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = found["input_ids"], found["offset_mapping"]
    wanted = [False] * len(ids)
    for start, end in spans:
        inside = [k for k, (begin, stop) in enumerate(places) if start <= begin and stop <= end and ids[k] in stops]
        if inside and not text[places[inside[-1]][1] : end].strip():
            end = places[inside[-1]][1]
        for k, (begin, stop) in enumerate(places):
            carried = [c for c in range(begin, stop) if start <= c < end]
            visible = any(not text[c].isspace() for c in carried)
            wanted[k] |= bool(carried) and (begin >= start or visible)
    wanted[0] = False
    return ids, wanted
