"""The file holds the trained weights, each within its type's bound, and is refused where it does not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from folders import CHATML
from tiny import wrap
from vocabularies import GGUF_FAMILIES, byte_level, sentence_like, write_folder

import truetune
from truetune.errors import UserError
from truetune.models.export import Export, live_logits
from truetune.models.gguf import write
from truetune.models.gguf.architecture import ARCHITECTURES, Spelling
from truetune.models.gguf.write import PRECISIONS, export_gguf, require_writable
from truetune.models.load import Loaded, load
from truetune.models.wrap import CausalLM

PROBE = [[5, 300, 17, 4, 220, 9, 33], [40, 41, 42]]


class Trained(NamedTuple):
    model: CausalLM
    loaded: Loaded

    def export(self, folder: Path, precision: str = "f32") -> Export:
        return export_gguf(self.model, self.loaded, folder, PROBE, precision)


def trained(folder: Path, family: str = "llama", words: Any = None, **changes: Any) -> Trained:
    """A model whose adapters are far from zero."""
    loaded = load(str(write_folder(folder, family, words or byte_level(), **changes)))
    model = wrap(loaded.model, lora=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(torch.randn_like(p) * 0.1)
    return Trained(model, loaded)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("llama"))


def tensors(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.gguf")
    found = gguf.GGUFReader(file).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]).copy() for t in found}


def keys(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.gguf")
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_architecture_is_written_and_read_back(family: str, tmp_path: Path) -> None:
    made = trained(tmp_path / "base", family)
    require_writable(load(str(tmp_path / "base")))
    (tmp_path / "out").mkdir()
    export = made.export(tmp_path / "out")
    assert export.kind == "gguf-f32" and export.passed and export.difference < 1e-5 and export.note is None
    base = live_logits(CausalLM(load(str(tmp_path / "base")).model, *_parts(made.model)), PROBE)
    assert float((live_logits(made.model, PROBE) - base).abs().max()) > 100 * export.bound  # what was learned
    found, name = keys(tmp_path / "out"), ARCHITECTURES[made.loaded.model.config.model_type].name
    assert found["general.architecture"] == gguf.MODEL_ARCH_NAMES[name]
    held = tensors(tmp_path / "out")
    assert {t.partition(".")[0] for t in held} <= {"token_embd", "output", "output_norm", "blk"}
    assert ("output.weight" in held) == (not made.loaded.model.config.tie_word_embeddings)


def _parts(model: CausalLM) -> tuple[Any, Any, Any]:
    return model.tail, model.route, model.dtype


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_type_keeps_its_bound(precision: str, llama: Trained, tmp_path: Path) -> None:
    export = llama.export(tmp_path, precision)
    assert export.passed and (export.difference > 1e-5) == (precision != "f32")
    held, kind = tensors(tmp_path), PRECISIONS[precision]
    weight = held["blk.0.ffn_down.weight"]
    whole = write.merged_copy(llama.model.model, llama.model.route.published)
    truth = whole.state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
    rows_of_blocks = truth.shape[1] % 32 == 0
    expected = kind if rows_of_blocks or precision != "q8_0" else PRECISIONS["f16"]
    assert (np.abs(weight - truth) <= expected.error(truth)).all()
    assert precision == "f32" or np.abs(weight - truth).max() > 0
    assert keys(tmp_path)["general.file_type"] == kind.file_type
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / f"model-{precision}.gguf").tensors}
    assert types["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert types["blk.0.ffn_up.weight"] == kind.type  # 32 columns


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0"])
def test_bounds_are_of_the_size_of_the_errors(precision: str) -> None:
    """Twice the stated rounding would be seen: the bound is at most 1.2 times the largest error met."""
    kind = PRECISIONS[precision]
    weight = np.random.default_rng(0).standard_normal((4096, 32), dtype=np.float32) ** 3
    error = np.abs(gguf.dequantize(gguf.quantize(weight, kind.type), kind.type).reshape(weight.shape) - weight)
    share = error / kind.error(weight)
    assert 1 / 1.2 < share.max() <= 1


def test_what_the_file_says_of_the_model(tmp_path: Path) -> None:
    words = byte_level(bos=True, template="{{ bos_token }}" + CHATML)
    made = trained(tmp_path / "base", "gemma2", words, rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    (tmp_path / "out").mkdir()
    made.export(tmp_path / "out", "q8_0")
    found, n = keys(tmp_path / "out"), "gemma2"
    expected = {
        f"{n}.context_length": 2048,
        f"{n}.embedding_length": 32,
        f"{n}.block_count": 3,
        f"{n}.feed_forward_length": 48,
        f"{n}.attention.head_count": 4,
        f"{n}.attention.head_count_kv": 2,
        f"{n}.attention.key_length": 8,
        f"{n}.attention.value_length": 8,
        f"{n}.rope.dimension_count": 8,
        f"{n}.rope.freq_base": 5e4,
        f"{n}.attention.sliding_window": 9,
        f"{n}.attn_logit_softcapping": 50.0,
        f"{n}.final_logit_softcapping": 30.0,
        f"{n}.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        f"{n}.vocab_size": len(words) + 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.eos_token_id": words.eos_token_id,
        "tokenizer.chat_template": words.chat_template,
        "truetune.chat_template.sha256": hashlib.sha256(words.chat_template.encode()).hexdigest(),
        "truetune.base.sha256": made.loaded.digest,
        "truetune.version": truetune.__version__,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["tokenizer.ggml.tokens"][: len(words)] == words.convert_ids_to_tokens(range(len(words)))


def test_norms_of_gemma_are_stored_with_their_one(tmp_path: Path) -> None:
    made = trained(tmp_path, "gemma")
    made.export(tmp_path)
    norm = made.loaded.model.state_dict()["model.norm.weight"].numpy()
    assert np.allclose(tensors(tmp_path)["output_norm.weight"], norm + 1, atol=1e-6)


def test_rows_of_queries_are_reordered_in_pairs() -> None:
    rows = np.arange(12, dtype=np.float32)[:, None]  # two heads of six: halves 0 1 2 and 3 4 5
    spelling = Spelling("x", pairs=2, offset=0.0)
    assert spelling.spelled(rows)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert (spelling.read(spelling.spelled(rows)) == rows).all()


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 512},
        ),
    ],
)
def test_scaled_rope_is_said(rope: dict[str, Any], says: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, rope_parameters={"rope_theta": 1e4} | rope)
    made.export(tmp_path)
    found = keys(tmp_path)
    assert {key: found[f"llama.{key}"] for key in says} == says


def test_factors_of_rope_are_a_tensor(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    made = trained(tmp_path, rope_parameters=rope)
    made.export(tmp_path)
    factors = tensors(tmp_path)["rope_freqs.weight"]
    assert factors.shape == (4,) and factors[0] == 1 and factors[-1] == pytest.approx(8.0)
    with pytest.raises(UserError, match="reads no factors of RoPE"):
        trained(tmp_path / "qwen2", "qwen2", rope_parameters=rope).export(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "computes silu where this model has gelu"),
        ("mistral", {"sliding_window": 64}, "has no windows in the attention of this architecture"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "divides queries by the root of 8, and this model by that of 32"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "has windows in all but every 6th layer"),
        ("qwen3", {"attention_bias": True}, r"does not read model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", {"head_dim": 16}, "knows no heads of 16"),
        ("llama", {"rope_parameters": LONGROPE}, "RoPE by longrope"),
    ],
)
def test_what_the_graph_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    loaded = load(str(write_folder(tmp_path, family, byte_level(), **changes)))
    with pytest.raises(UserError, match=f"llama.cpp .*{says}.*, so a GGUF file would compute something else; use the"):
        require_writable(loaded)
        trained(tmp_path / "again", family, **changes).export(tmp_path)


def test_a_model_of_another_type_is_refused(llama: Trained) -> None:
    config = type(llama.loaded.model.config)()
    config.model_type = "gpt2"
    with pytest.raises(
        UserError, match=r"is written for models of type llama, mistral, .*, and this one is gpt2; leave"
    ):
        write.architecture_of(config)


def break_weight(patch: pytest.MonkeyPatch) -> None:
    real = gguf.quantize

    def broken(weight: np.ndarray, kind: Any) -> np.ndarray:
        weight = weight.copy()
        weight.flat[0] += 1e-3
        return real(weight, kind)

    patch.setattr(gguf, "quantize", broken)


def swap_tensors(patch: pytest.MonkeyPatch) -> None:
    real = gguf.GGUFWriter.add_tensor_info

    def add(self: Any, name: str, *rest: Any, **options: Any) -> None:
        other = {"blk.0.attn_k.weight": "blk.0.attn_v.weight", "blk.0.attn_v.weight": "blk.0.attn_k.weight"}
        real(self, other.get(name, name), *rest, **options)

    patch.setattr(gguf.GGUFWriter, "add_tensor_info", add)


def change_key(patch: pytest.MonkeyPatch) -> None:
    real = gguf.GGUFWriter.write_header_to_file

    def header(self: Any) -> None:
        tokens = self.kv_data[0]["tokenizer.ggml.tokens"]
        self.kv_data[0]["tokenizer.ggml.tokens"] = gguf.GGUFValue([*tokens.value[:-1], "wrong"], tokens.type)
        real(self)

    patch.setattr(gguf.GGUFWriter, "write_header_to_file", header)


def lose_tensor(patch: pytest.MonkeyPatch) -> None:
    real = gguf.GGUFReader.__init__

    def read(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.tensors.pop()

    patch.setattr(gguf.GGUFReader, "__init__", read)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (break_weight, r"a weight of token_embd.weight"),
        (swap_tensors, r"a weight of blk.0.attn_[kv].weight"),
        (change_key, r"the key tokenizer.ggml.tokens"),
        (lose_tensor, r"the tensor \S+"),
    ],
)
def test_a_file_that_is_not_the_model_is_refused(
    spoil: Callable[[pytest.MonkeyPatch], None],
    says: str,
    llama: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    with pytest.raises(UserError, match=rf"does not read back as it was written \({says}\); please report it"):
        llama.export(tmp_path)


def test_weights_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = trained(tmp_path)
    with torch.no_grad():
        made.loaded.model.get_input_embeddings().weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"token_embd.weight has weights beyond the range of f16; write bf16 or f32"):
        made.export(tmp_path, "f16")


def test_the_modelfile_names_the_file_the_template_and_the_stops(llama: Trained, tmp_path: Path) -> None:
    llama.export(tmp_path, "bf16")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[1] == "FROM ./model-bf16.gguf" and (tmp_path / "model-bf16.gguf").is_file()
    assert lines[2].startswith('TEMPLATE """{{ $last := "" }}{{ range') and lines[2].endswith('{{ end }}"""')
    assert lines[3:] == ['PARAMETER stop "</s>"']


def test_where_ollama_cannot_follow_the_template_it_is_said(tmp_path: Path) -> None:
    made = trained(tmp_path, words=sentence_like(template="{{ strftime_now('%Y') }}" + CHATML))
    note = made.export(tmp_path).note
    assert note and note.startswith("the Modelfile has no TEMPLATE, so Ollama guesses one: the chat template can't")
    text = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in text.replace(note, "") and f"# Note: {note}\n" in text
