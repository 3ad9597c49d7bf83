"""Small tokenizers of the kinds that GGUF files hold, and model folders with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from folders import CHATML
from tiny import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from transformers import PreTrainedTokenizerFast

from truetune.models.gguf.vocabulary import sample_text

CORPUS = [
    "What is it? It is what it is: system, user, assistant. You're the 123rd; I'LL wait 4567 days.",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n",
    "abcabc abc bca cab abcab bcab on no noon onon, state estate testate",
    "Größe, été, Жизнь, 漢字, 😀   and   spaces  \n",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPACE = "\u2581"


def _finished(inner: Tokenizer, template: str | None, bos: bool, **options: Any) -> PreTrainedTokenizerFast:
    inner.add_tokens([AddedToken("<own>", normalized=False)])
    if bos:
        number = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.chat_template = template
    return made


def byte_level(
    cutter: PreTokenizer | None = None, whole: bool = False, *, template: str | None = CHATML, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind ``cutter``; ``whole``: pieces that are tokens are not merged."""
    inner = _byte_level(cutter, whole) if cutter else Tokenizer.from_str(_usual())
    return _finished(inner, template, bos)


@cache
def _usual() -> str:
    return str(_byte_level(ByteLevel(add_prefix_space=False), False).to_str())


def _byte_level(cutter: PreTokenizer, whole: bool) -> Tokenizer:
    inner = Tokenizer(models.BPE(ignore_merges=whole))
    inner.pre_tokenizer = cutter
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([*CORPUS * 4, sample_text()], trainer)
    return inner


def sentence_like(prefix: bool = True, *, template: str | None = CHATML, bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE as it comes from SentencePiece: bytes for what is unknown, every pair that makes a token a merge."""
    spaced = [text.replace(" ", SPACE) for text in CORPUS * 4]
    first = Tokenizer(models.BPE())
    first.pre_tokenizer = Split(SPACE, "merged_with_next")
    first.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    words = sorted(first.get_vocab(), key=first.get_vocab().__getitem__)
    numbered = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {text: number for number, text in enumerate(numbered)}
    pairs = [[(word[:i], word[i:]) for i in range(1, len(word))] for word in words]
    merges = [pair for some in pairs for pair in some if pair[0] in vocabulary and pair[1] in vocabulary]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced]) if prefix else replaced
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(SPECIAL)
    return _finished(inner, template, bos)


GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": False},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 3},
    "gemma3": {"head_dim": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 7, "layer_types": None},
}
"""Changes to the config of each family that is written, so that its graph in llama.cpp is all there."""


def write_folder(folder: Path, family: str, words: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A random model of ``family`` with this tokenizer; its embeddings have three rows that no token uses."""
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    changes = {"max_position_embeddings": 2048} | ids | GGUF_FAMILIES[family] | changes
    tiny(family, vocab_size=len(words) + 3, **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
