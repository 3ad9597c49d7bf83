"""A tokenizer as llama.cpp reads it: tokens, types, merges or scores, and which of its splitters cuts the text.

Two kinds are written. Byte-level BPE ("gpt2") cuts the text by a pattern before it merges; llama.cpp has the patterns
built in and the file names one. Which one is found by trying: the tokenizer's own cutter must cut a long text of many
kinds of characters exactly as a known one does. SentencePiece-like BPE ("llama") merges by the score of the result;
the scores are the ranks of the merges, provided that these say all that scores would say.

Left out: the normalisation to NFC that some tokenizers begin with, which llama.cpp does not do; it makes no
difference to text that is in NFC, as nearly all text is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gguf import TokenType
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import PreTrainedTokenizerBase

from truetune.errors import UserError

_SPACE = "\u2581"


def _cut_by(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _words(digits: str) -> str:
    """Contractions, words, ``digits``, punctuation, line ends and spaces: the pattern of several families."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PLAIN = ByteLevel(add_prefix_space=False)
SPLITTERS: dict[str, tuple[PreTokenizer, bool]] = {
    "gpt-2": (_PLAIN, False),
    "smollm": (Sequence([Digits(individual_digits=True), _PLAIN]), False),
    "qwen2": (_cut_by(_words(r"\p{N}")), False),
    "llama-bpe": (_cut_by(_words(r"\p{N}{1,3}")), True),
    "dbrx": (_cut_by(_words(r"\p{N}{1,3}")), False),
}
"""``tokenizer.ggml.pre`` -> how it cuts, and whether a piece that is a token is left whole (``ignore_merges``)."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What of a tokenizer goes into the file; ``ids`` are its special tokens by llama.cpp's names for them."""

    model: str
    tokens: list[str]
    types: list[TokenType]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, turn_end: int | None, begins: bool) -> Vocabulary:
    """The vocabulary of a model with ``size`` rows in its embeddings.

    turn_end: the token that ends an answer; begins: whether what the model was trained on begins with BOS.
    Raises UserError, with the reason, for a tokenizer that llama.cpp would not follow exactly.
    """
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    _require_plain_merging(model)
    tokens, types = _tokens(tokenizer, size)
    bos, eos = _added_around(tokenizer)
    named = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    ids = {kind: token for kind, token in (named | {"eot": turn_end}).items() if token is not None}
    common: dict[str, Any] = {"tokens": tokens, "types": types, "ids": ids, "add_bos": bos and begins, "add_eos": eos}
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        prefix = _space_prefix(parts)
        _mark_bytes(tokens, types)
        scores = _scores(tokens, types, merges)
        return Vocabulary("llama", scores=scores, space_prefix=prefix, **common)
    if (parts["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        _refuse(f"it changes the text first ({parts['normalizer']['type']}), which llama.cpp does not")
    pre = _splitter(tokenizer, bool(model.get("ignore_merges")))
    return Vocabulary("gpt2", pre=pre, merges=[" ".join(merge) for merge in merges], **common)


def _refuse(reason: str) -> NoReturn:
    raise UserError(
        f"llama.cpp can't tokenise as this tokenizer does: {reason}; leave out the GGUF export, and use the merged "
        "model"
    )


def _require_plain_merging(model: dict[str, Any]) -> None:
    if model["type"] != "BPE":
        _refuse(f"it is of the kind {model['type']}, and only BPE is written")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            _refuse(f"it has a {option}")


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of every row of the embeddings; rows beyond the vocabulary are unused."""
    known = {token: text for text, token in tokenizer.get_vocab().items()}
    if beyond := [token for token in known if token >= size]:
        _refuse(f"it has {len(beyond)} tokens for which the model has no embedding, {known[beyond[0]]!r} first")
    tokens = [known.get(token, f"[PAD{token}]") for token in range(size)]
    types = [TokenType.NORMAL if token in known else TokenType.UNUSED for token in range(size)]
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.lstrip or added.rstrip or added.single_word:
            _refuse(f"the token {added.content!r} takes the spaces beside it, or stands for whole words only")
        tokens[token] = added.content
        types[token] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if len(set(tokens)) < size:
        _refuse("two of its tokens have the same text")
    return tokens, types


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around plain text."""
    inner, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for bos in (False, True):
        for eos in (False, True):
            if whole == [*[tokenizer.bos_token_id] * bos, *inner, *[tokenizer.eos_token_id] * eos]:
                return bos, eos
    _refuse("it adds more to a text than BOS and EOS")


# Byte-level BPE.


def sample_text() -> str:
    """Words, numbers, spaces and signs of many scripts in random order; the same on every call."""
    draw = random.Random(0)
    parts = ["'s 'LL 'd I'm don't WE'RE 'x", "123 4567 89.5 1st ٣٤٥ Ⅷ ½ x86", "a\n\nb\r\n\r\n c\t\td   e \n  f  "]
    alphabet = [
        *"abzAZéßñДжλم漢字あ한ไท",
        "0",
        "12",
        "345",
        "6789",
        "٣",
        "Ⅷ",
        "½",
        *" \n\t\r\u00a0\u3000",
        "  ",
        "\n\n",
    ]
    alphabet += [
        *".,!?'\"()[]{}<>|/\\@#$%^&*_-+=~`…—。、€",
        "'s",
        "'T",
        "'re",
        "'LL",
        "e\u0301",
        "\u0947",
        "😀",
        "👩\u200d💻",
    ]
    return "".join(parts) + "".join(draw.choice(alphabet) for _ in range(8000))


def _splitter(tokenizer: PreTrainedTokenizerBase, ignore_merges: bool) -> str:
    own = tokenizer.backend_tokenizer.pre_tokenizer
    text = sample_text()
    cut = own.pre_tokenize_str(text) if own else [(text, (0, len(text)))]
    for name, (known, whole) in SPLITTERS.items():
        if whole == ignore_merges and known.pre_tokenize_str(text) == cut:
            return name
    _refuse(f"it cuts text into words as none of {', '.join(SPLITTERS)} does")


# SentencePiece-like BPE.


def _space_prefix(parts: dict[str, Any]) -> bool:
    """Whether text gets a space in front. Raises UserError unless spaces become ``▁`` and nothing else happens."""
    before, cutter = parts["normalizer"] or {}, parts["pre_tokenizer"] or {}
    steps = before["normalizers"] if before.get("type") == "Sequence" else [before]
    told = [(step.get("type"), step.get("prepend") or step.get("content")) for step in steps]
    replaced = [step.get("pattern") for step in steps][-1] == {"String": " "}
    never_cuts = not cutter or (cutter["type"] == "Split" and cutter["pattern"] == {"String": " "})
    if replaced and never_cuts and told in ([("Replace", _SPACE)], [("Prepend", _SPACE), ("Replace", _SPACE)]):
        return len(told) == 2
    _refuse("it treats spaces in another way than a SentencePiece model")


def _mark_bytes(tokens: list[str], types: list[TokenType]) -> None:
    numbers = {text: number for number, text in enumerate(tokens)}
    for byte in range(256):
        number = numbers.get(f"<0x{byte:02X}>")
        if number is None:
            _refuse(f"it has no token for the byte {byte}")
        types[number] = TokenType.BYTE


def _scores(tokens: list[str], types: list[TokenType], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the rank of what merges into each token; 0 for those that nothing merges into.

    Scores know only the result of a merge. So all pairs that make a token must be merges, next to each other.
    """
    ranks: dict[str, int] = {}
    last = ""
    for merge in merges:
        made = "".join(merge)
        if made != last and made in ranks:
            _refuse(f"its merges into {made!r} have different ranks")
        ranks.setdefault(made, len(ranks) + 1)
        last = made
    known, allowed = set(tokens), set(merges)
    for text, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL and (pair := next((p for p in _pairs(text, known) if p not in allowed), None)):
            _refuse(f"it does not merge {pair[0]!r} and {pair[1]!r}, although it has the token {text!r}")
    return [-float(ranks.get(text, 0)) for text in tokens]


def _pairs(text: str, known: set[str]) -> Iterator[tuple[str, str]]:
    return ((text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in known and text[i:] in known)
