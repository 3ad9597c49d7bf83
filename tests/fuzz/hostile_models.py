"""Model folders whose files lie: tokenizers, configs, weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folders import chats
from fuzzing import JUNK, NUMBERS, WORDS, Target, damaged, json_files, mutants, spelled
from hypothesis import strategies as st

from truetune.data import formats
from truetune.data.chat import Renderer
from truetune.models.load import load

KINDS = {
    "model": ["BPE", "WordPiece", "WordLevel", "Unigram", "", "None"],
    "pre_tokenizer": ["Split", "Whitespace", "Metaspace", "Sequence", "Digits", "x"],
    "decoder": ["WordPiece", "BPEDecoder", "Fuse", "CTC", "x"],
    "post_processor": ["BertProcessing", "ByteLevel", "x"],
}
PATTERNS = ["(", "(a|a)*b", "", "\\p{L}+", "(?<=a)b", "[", "x" * 3000]


@st.composite
def tokenizers(draw: Any, original: dict[str, Any]) -> bytes:
    """A tokenizer.json with a fault where tokenizers have them."""
    made = json.loads(json.dumps(original))
    model = made["model"]
    match draw(st.sampled_from(["ids", "merges", "kind", "added", "split", "specials", "any", "any"])):
        case "ids":
            token = draw(st.sampled_from(list(model["vocab"])))
            model["vocab"][token] = draw(NUMBERS | st.sampled_from([0, 1, 286, 10**6, 2**31, 2**32 - 1]))
        case "merges":
            merge = draw(
                st.sampled_from([["a", "b"], ["no", "such"], "a b", "ab", ["a"], [], None, ["a", "b", "c"]]) | JUNK
            )
            model["merges"] = draw(st.sampled_from([[merge], [*model["merges"], merge], [merge] * 1000, merge]))
        case "kind":
            part = draw(st.sampled_from(list(KINDS)))
            made[part] = (made[part] or {}) | {"type": draw(st.sampled_from(KINDS[part]))}
        case "added":
            token = dict(made["added_tokens"][0])
            token["id"] = draw(st.sampled_from([0, 5, 287, 10**6, 2**32 - 1, 2**32, -1]) | NUMBERS)
            token["content"] = draw(st.sampled_from(["<|endoftext|>", "", " ", "a", "What"]) | WORDS)
            made["added_tokens"] += [token] * draw(st.integers(1, 3))
        case "split":
            kind = draw(st.sampled_from(["Regex", "String"]))
            pattern = {kind: draw(st.sampled_from(PATTERNS))}
            made["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        case "specials":
            made["added_tokens"] = draw(st.sampled_from([[], None, made["added_tokens"][:1]]))
    if draw(st.booleans()):
        made = draw(mutants(made, 2))
    return spelled(made)


SPECIALS = [
    "<|im_end|>",
    "no such token",
    "",
    None,
    7,
    {"content": "x"},
    {"__type": "AddedToken", "content": "<|im_end|>"},
    [],
]
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "eos_token": st.sampled_from(SPECIALS),
        "bos_token": st.sampled_from(SPECIALS),
        "pad_token": st.sampled_from(SPECIALS),
        "tokenizer_class": st.sampled_from(
            ["PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer", "X", "", None, 3]
        ),
        "chat_template": st.sampled_from(
            ["", "{{", "{{ 1/0 }}", "\ud800", None, 3, [], {}, [{"name": "a", "template": "b"}]]
        ),
        "model_max_length": NUMBERS,
        "added_tokens_decoder": st.sampled_from(
            [{}, {"x": {}}, {"0": {"content": "y"}}, {"-1": {"content": "y"}}, [], 3]
        ),
        "extra_special_tokens": JUNK,
        "auto_map": st.just({"AutoTokenizer": ["a.B", None]}),
    },
)
SIZES = st.sampled_from([-1, 0, 1, 3, 7, 31, 64, 10**4, 10**6, 10**9, 10**12, 2**63, 10**30, 0.5, "32", None, [], True])
NAMES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings"]  # fmt: skip
MORE = {
    "model_type": st.sampled_from(
        ["gpt2", "bert", "t5", "mistral", "mamba", "mixtral", "llava", "no-such", "", None, 3]
    ),
    "dtype": st.sampled_from(["float16", "int8", "float99", "", None, 3]),
    "quantization_config": st.sampled_from([{}, {"quant_method": "gptq"}, {"quant_method": "x"}, 3, []]),
    "eos_token_id": st.sampled_from([None, -1, 10**9, [], [1, 2], "x", {"a": 1}, 1.5, [[1]], True]),
    "hidden_act": st.sampled_from(["silu", "nope", None, 3]),
    "rope_parameters": JUNK | st.sampled_from([{"rope_type": "yarn"}, {"rope_theta": -1, "rope_type": "default"}]),
    "tie_word_embeddings": st.booleans(),
    "architectures": JUNK,
    "auto_map": st.just({"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}),
}
CONFIG_CHANGES = st.dictionaries(st.sampled_from(NAMES), SIZES, max_size=2), st.fixed_dictionaries({}, optional=MORE)
TYPES = ["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F64", "X", "", None, 3]


@st.composite
def weights(draw: Any, data: bytes) -> bytes:
    """A safetensors file: 8 bytes of the header's length, the header as JSON, the tensors."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    original = {name: entry for name, entry in header.items() if name != "__metadata__"}
    names = list(original)
    for _ in range(draw(st.integers(0, 2))):
        name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        entry = dict(original[name])
        match draw(st.sampled_from(["offsets", "shape", "dtype", "swap", "rename", "drop", "any"])):
            case "offsets":
                begin, end = entry["data_offsets"]
                lies = [
                    [end, begin],
                    [0, end],
                    [begin, end + 4],
                    [begin, 2**63],
                    [-4, end],
                    [begin, begin],
                    [2**64, 2**64 + 4],
                    [],
                ]
                entry["data_offsets"] = draw(st.sampled_from(lies))
            case "shape":
                entry["shape"] = draw(
                    st.sampled_from([[], [1], [0], [2**62, 4], [-1], [2**64], entry["shape"][::-1], None, [1] * 900])
                )
            case "dtype":
                entry["dtype"] = draw(st.sampled_from(TYPES))
            case "swap":
                entry["data_offsets"] = original[other]["data_offsets"]
            case "any":
                entry = draw(mutants(entry))
            case "rename":
                name = draw(st.sampled_from([f"{name}.x", "", "\x1b[2J"]) | WORDS)
            case "drop":
                header.pop(name, None)
                continue
        header[name] = entry
        if draw(st.integers(0, 5)) == 0:
            header["__metadata__"] = draw(JUNK)
    text = spelled(header)
    if draw(st.integers(0, 5)) == 0:
        text = text[:-1] + b", " + spelled({names[0]: original[names[0]]})[1:]
    stated = draw(st.sampled_from([len(text)] * 6 + [0, 1, len(text) - 1, len(text) + 9, 10**8, 2**40, 2**64 - 1]))
    whole = stated.to_bytes(8, "little") + text + body
    match draw(st.integers(0, 9)):
        case 0:
            whole += bytes(64)
        case 1:
            whole = whole[: draw(st.integers(0, len(whole)))]
        case 2:
            whole = draw(damaged(whole))
    return whole


def targets(model: Path, folder: Path, shares: tuple[float, float, float]) -> list[Target]:
    place = folder / "model"
    shutil.copytree(model, place)
    kept = {file.name: file.read_bytes() for file in place.iterdir()}
    row = formats.read("messages", chats(1)[0], 0)

    def act(changes: dict[str, bytes]) -> None:
        for name, data in (kept | changes).items():
            (place / name).unlink(missing_ok=True)  # an old file may still be mapped
            (place / name).write_bytes(data)
        loaded = load(str(place))
        Renderer(loaded.tokenizer, loaded.stop_ids, 64).documents(row)

    def of(name: str, data: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[str, bytes]]:
        return data.map(lambda found: {name: found})

    def original(name: str) -> Any:
        return json.loads(kept[name])

    def updated(name: str) -> Callable[[dict[str, Any]], bytes]:
        return lambda changes: spelled(original(name) | changes)

    words = original("tokenizer.json")
    words_config = CONFIGS.map(updated("tokenizer_config.json")) | json_files(original("tokenizer_config.json"))
    config = st.tuples(*CONFIG_CHANGES).map(lambda both: updated("config.json")(both[0] | both[1]))
    return [
        Target(
            "tokenizers",
            of("tokenizer.json", tokenizers(words) | tokenizers(words) | json_files(words))
            | of("tokenizer_config.json", words_config),
            act,
            shares[0],
        ),
        Target(
            "configs",
            of("config.json", config | config | json_files(original("config.json")))
            | of("generation_config.json", json_files(original("generation_config.json"))),
            act,
            shares[1],
        ),
        Target("weights", of("model.safetensors", weights(kept["model.safetensors"])), act, shares[2]),
    ]
