"""Which splitter of llama.cpp is a tokenizer's own is found by what it does, and what fits none is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from vocabularies import SPACE, byte_level, sentence_like

from truetune.errors import UserError
from truetune.models.gguf.vocabulary import SPLITTERS, Vocabulary, read_vocabulary, sample_text


def read(words: PreTrainedTokenizerBase, more: int = 3, begins: bool = True) -> Vocabulary:
    return read_vocabulary(words, len(words) + more, words.eos_token_id, begins)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.mark.parametrize("name", SPLITTERS)
def test_a_known_way_to_cut_text_is_recognised_by_what_it_does(name: str) -> None:
    cutter, whole = SPLITTERS[name]
    found = read(byte_level(cutter, whole))
    assert (found.model, found.pre, found.scores) == ("gpt2", name, [])


def test_the_same_cuts_by_other_means_are_recognised() -> None:
    # The pattern of byte-level BPE, spelled out, with two of its alternatives in another order.
    pattern = r"'d|'s|'t|'re|'ve|'m|'ll| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    cutter = Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    assert read(byte_level(cutter)).pre == "gpt-2"


@pytest.mark.parametrize(
    ("cutter", "whole"),
    [
        (ByteLevel(add_prefix_space=True), False),
        (ByteLevel(add_prefix_space=False, use_regex=False), False),
        (SPLITTERS["qwen2"][0], True),
        (Sequence([Split(Regex(r"\p{N}{1,2}"), "isolated"), ByteLevel(add_prefix_space=False)]), False),
        (Sequence([Split(Regex(r"\s?\p{L}+"), "isolated"), ByteLevel(add_prefix_space=False)]), False),
    ],
)
def test_another_way_to_cut_text_is_refused(cutter: Any, whole: bool) -> None:
    with pytest.raises(
        UserError, match=r"it cuts text into words as none of gpt-2, smollm, .* does; leave out the GGUF"
    ):
        read(byte_level(cutter, whole))


def test_the_sample_tells_every_two_splitters_apart() -> None:
    cuts = [(str(cutter.pre_tokenize_str(sample_text())), whole) for cutter, whole in SPLITTERS.values()]
    assert len(set(cuts)) == len(SPLITTERS) and sample_text() == sample_text()


def test_tokens_stand_by_number_with_what_they_are(plain: PreTrainedTokenizerFast) -> None:
    found = read(plain)
    assert len(found.tokens) == len(found.types) == len(plain) + 3 and found.tokens[-1] == f"[PAD{len(plain) + 2}]"
    assert plain.convert_ids_to_tokens(range(len(plain))) == found.tokens[:-3]
    kinds = {text: found.types[number] for number, text in enumerate(found.tokens)}
    assert kinds["<s>"] == kinds["<|im_end|>"] == TokenType.CONTROL and kinds["<own>"] == TokenType.USER_DEFINED
    assert kinds["Ġis"] == TokenType.NORMAL and kinds[found.tokens[-1]] == TokenType.UNUSED
    merges = json.loads(plain.backend_tokenizer.to_str())["model"]["merges"]
    assert found.merges == [m if isinstance(m, str) else " ".join(m) for m in merges] and len(merges) > 300
    number = plain.convert_tokens_to_ids
    assert found.ids == {"bos": number("<s>"), "eos": number("</s>"), "unk": number("<unk>"), "eot": number("</s>")}


@pytest.mark.parametrize(("bos", "begins", "added"), [(True, True, True), (True, False, False), (False, True, False)])
def test_bos_is_added_where_the_model_was_trained_with_it(bos: bool, begins: bool, added: bool) -> None:
    found = read(byte_level(bos=bos), begins=begins)
    assert (found.add_bos, found.add_eos) == (added, False)


def test_scores_are_the_ranks_of_merges() -> None:
    words = sentence_like()
    found = read(words)
    assert (found.model, found.pre, found.merges) == ("llama", "default", []) and len(found.scores) == len(found.tokens)
    score = dict(zip(found.tokens, found.scores, strict=True))
    ranked = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(m) if isinstance(m, list) else m.replace(" ", "") for m in ranked))
    assert [score[text] for text in made] == [-float(i + 1) for i in range(len(made))]
    assert score["<s>"] == score["<0x41>"] == 0
    assert found.types[found.tokens.index("<0x0A>")] == TokenType.BYTE


@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_in_front_is_noticed(prefix: bool) -> None:
    assert read(sentence_like(prefix)).space_prefix is prefix


def changed(words: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    parts = json.loads(words.backend_tokenizer.to_str())
    change(parts)
    inner = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def drop_a_pair(parts: dict[str, Any]) -> None:
    merges = parts["model"]["merges"]
    joined = ["".join(merge) for merge in merges]
    merges.pop(next(i for i, text in enumerate(joined) if joined.count(text) > 1))


def scatter_pairs(parts: dict[str, Any]) -> None:
    merges = parts["model"]["merges"]
    joined = ["".join(merge) for merge in merges]
    merges.append(merges.pop(next(i for i, text in enumerate(joined) if joined.count(text) > 1)))


def lose_a_byte(parts: dict[str, Any]) -> None:
    vocabulary = parts["model"]["vocab"]
    vocabulary["<0xZZ>"] = vocabulary.pop("<0x0A>")


def cut_words(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"] = json.loads(Metaspace().__getstate__())


def lowercase(parts: dict[str, Any]) -> None:
    steps = [normalizers.Lowercase(), normalizers.Replace(" ", SPACE)]
    parts["normalizer"] = json.loads(normalizers.Sequence(steps).__getstate__())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_a_pair, "it does not merge '.*' and '.*', although it has the token"),
        (scatter_pairs, "its merges into '.*' have different ranks"),
        (lose_a_byte, "it has no token for the byte 10"),
        (cut_words, "it treats spaces in another way than a SentencePiece model"),
        (lowercase, "it treats spaces in another way than a SentencePiece model"),
    ],
)
def test_what_scores_would_not_say_is_refused(change: Callable[[dict[str, Any]], None], says: str) -> None:
    with pytest.raises(UserError, match=f"can't tokenise as this tokenizer does: {says}.*; leave out the GGUF export"):
        read(changed(sentence_like(), change))


def add_lowercase(parts: dict[str, Any]) -> None:
    parts["normalizer"] = {"type": "Lowercase"}


def add_dropout(parts: dict[str, Any]) -> None:
    parts["model"]["dropout"] = 0.1


def eat_spaces(parts: dict[str, Any]) -> None:
    parts["added_tokens"][-1]["lstrip"] = True


def wrap_twice(parts: dict[str, Any]) -> None:
    single = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    parts["post_processor"] = json.loads(single.__getstate__())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_lowercase, r"it changes the text first \(Lowercase\)"),
        (add_dropout, "it has a dropout"),
        (eat_spaces, "the token '<own>' takes the spaces beside it"),
        (wrap_twice, "it adds more to a text than BOS and EOS"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(
    plain: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read(changed(plain, change))


def test_nfc_is_let_pass(plain: PreTrainedTokenizerFast) -> None:
    assert read(changed(plain, lambda parts: parts.update(normalizer={"type": "NFC"}))).pre == "gpt-2"


def test_tokens_without_an_embedding_are_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="it has 1 tokens for which the model has no embedding, '<own>' first"):
        read(plain, more=-1)


def test_two_tokens_of_one_text_are_refused() -> None:
    words = byte_level()
    words.add_tokens([AddedToken(f"[PAD{len(words) + 1}]")])
    with pytest.raises(UserError, match="two of its tokens have the same text"):
        read(words)


def test_a_vocabulary_of_another_kind_is_refused(plain: PreTrainedTokenizerFast) -> None:
    def change(parts: dict[str, Any]) -> None:
        vocabulary = [[text, 0.0] for text in sorted(parts["model"]["vocab"], key=parts["model"]["vocab"].__getitem__)]
        parts["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}

    with pytest.raises(UserError, match="it is of the kind Unigram, and only BPE is written"):
        read(changed(plain, change))
