"""Small trained tokenizers of several kinds, and chat templates of several habits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<unk>"]
CORPUS = [
    "What does the function return when the list is empty?",
    "Return the number of items in the list, or zero if it is empty.",
    "You are a helpful assistant that answers in one sentence.",
    "Ask again later. Yes, no, and maybe are answers too; user system assistant",
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich 0123456789 naïve café ☕",
] * 4

TEMPLATES = {
    "chatml": (  # with a default system prompt, and a new line after the stop token
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "inst": (  # without a generation prompt, BOS before every user turn
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant are supported') }}{% endif %}{% endfor %}"
    ),
    "empty thought": (  # its generation prompt is no prefix of the turn
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    ),
    "rewrites": (  # the last answer has a mark that it loses when turns follow
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "strips reasoning": (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "no stop": (  # and a space at the end of its generation prompt
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}


@cache
def _trained(kind: str) -> str:
    """tokenizer.json of a trained tokenizer."""
    if kind == "bytes" or kind == "trimmed bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        if kind == "trimmed bytes":  # offsets without spaces
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS)
    elif kind == "prepend":  # the spelling of Llama 2: a space put before every stretch of text
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>")
    elif kind == "wordpiece":  # spaces are in no token
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS)
    else:
        raise KeyError(kind)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """make(kind, template=name or None, adds_bos=False, **special tokens)"""

    def make(kind: str, template: str | None = None, adds_bos: bool = False, **options: Any) -> Any:
        inner = Tokenizer.from_str(_trained(kind))
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
            )
        eos = "<|im_end|>" if template and "<|im_end|>" in TEMPLATES[template] else "</s>"
        named = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>"} | options
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
        tokenizer.chat_template = TEMPLATES[template] if template else None
        return tokenizer

    return make
