"""Which models llama.cpp computes, and how their configs and weights are spelled in a GGUF file.

llama.cpp has one graph for each architecture, chosen by its name in the file, and computes what that graph says,
whatever else the model's config asks for. So this is a table of names, and whatever a graph lacks is refused here.
The keys and tensor names are those of the ``gguf`` package; the graphs were read in llama.cpp's ``src/models``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from truetune.errors import UserError


@dataclass(frozen=True, slots=True)
class Architecture:
    """One graph of llama.cpp, by what sets it apart.

    biases: linear layers that may have one; interleaved: RoPE turns neighbouring pairs of dimensions, not halves;
    norm_offset: what it expects to have been added to the weights of norms; rope_factors: it reads one factor for
    each pair of dimensions; window_every: every how many layers attention has no window (0: no layer has one).
    """

    name: gguf.MODEL_ARCH
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    interleaved: bool = False
    norm_offset: float = 0.0
    rope_factors: bool = False
    window_every: int = 0


_GELU = "gelu_pytorch_tanh"
_LLAMA = Architecture(
    gguf.MODEL_ARCH.LLAMA,
    biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    interleaved=True,
    rope_factors=True,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3),
    "gemma": Architecture(gguf.MODEL_ARCH.GEMMA, _GELU, norm_offset=1.0),
    "gemma2": Architecture(gguf.MODEL_ARCH.GEMMA2, _GELU, norm_offset=1.0, window_every=2),
    "gemma3_text": Architecture(gguf.MODEL_ARCH.GEMMA3, _GELU, norm_offset=1.0, window_every=6),
}
"""config.model_type -> the graph of llama.cpp that computes it."""

ROPE_FACTORS = "rope_freqs.weight"
_WIDE = {gguf.MODEL_ARCH.GEMMA2: 46, gguf.MODEL_ARCH.GEMMA3: 62}
"""Layers with which llama.cpp scales queries by their share of the hidden size instead of by the size of a head."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The graph that computes exactly what ``config`` says. Raises UserError where there is none."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"a GGUF file is written for models of type {', '.join(ARCHITECTURES)}, and this one is {config.model_type}"
            "; leave out the GGUF export, and use the merged model"
        )
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != found.activation:
        _refuse(f"computes {found.activation} where this model has {activation}")
    head = head_size(config)
    if found.name == gguf.MODEL_ARCH.QWEN2 and head * config.num_attention_heads != config.hidden_size:
        _refuse(f"knows no heads of {head} with {config.num_attention_heads} heads for {config.hidden_size} dimensions")
    if getattr(config, "use_bidirectional_attention", False):
        _refuse("looks back only, and this model looks both ways")
    _require_windows(config, found)
    _require_scale(config, found, head)
    return found


def head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse(what: str) -> NoReturn:
    raise UserError(f"llama.cpp {what}, so a GGUF file would compute something else; use the merged model instead")


def _require_windows(config: PreTrainedConfig, architecture: Architecture) -> None:
    window = getattr(config, "sliding_window", None)
    every, layers = architecture.window_every, config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    has = [kind == "sliding_attention" for kind in types]
    if every:
        if has != [bool((layer + 1) % every) for layer in range(layers)]:
            _refuse(f"has windows in all but every {every}th layer, and this model in others")
    elif any(has) and window < config.max_position_embeddings:
        _refuse("has no windows in the attention of this architecture, and this model has")


def _require_scale(config: PreTrainedConfig, architecture: Architecture, head: int) -> None:
    scalar = getattr(config, "query_pre_attn_scalar", head)
    if _WIDE.get(architecture.name) == config.num_hidden_layers:
        head = config.hidden_size // config.num_attention_heads
    if scalar != head:
        _refuse(f"divides queries by the root of {head}, and this model by that of {scalar}")


def describe(writer: gguf.GGUFWriter, config: PreTrainedConfig, architecture: Architecture) -> None:
    """Add what llama.cpp must know of the shape of the model."""
    head = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture.window_every:
        writer.add_sliding_window(config.sliding_window)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    _describe_rope(writer, config)


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """RoPE by the kind of layer it is for; most models have one for all."""
    given: dict[str, Any] = config.rope_parameters
    return given if "full_attention" in given else {"full_attention": given}


def _describe_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    ropes = _ropes(config)
    full, sliding = ropes["full_attention"], ropes.get("sliding_attention")
    for rope in ropes.values():
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            _refuse("turns whole heads, and this model a part of each")
    writer.add_rope_freq_base(full["rope_theta"])
    if sliding:
        if sliding["rope_type"] != "default":
            _refuse("scales no RoPE in layers with a window, and this model does")
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    kind = full["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    elif kind == "yarn":
        _describe_yarn(writer, full, config)
    elif kind not in ("default", "llama3"):
        _refuse(f"does not scale RoPE by {kind} in the way of this model")


def _describe_yarn(writer: gguf.GGUFWriter, rope: dict[str, Any], config: PreTrainedConfig) -> None:
    if unknown := {k for k in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(k) is not None}:
        _refuse(f"derives {min(unknown)} of yarn itself, and this model sets it")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one weight of the model stands in the file: under which name, and with its rows in which order."""

    name: str
    pairs: int
    offset: float

    def spelled(self, weight: np.ndarray) -> np.ndarray:
        """Of the model -> of the file. pairs: heads whose two halves are interleaved, 0 for none."""
        if self.pairs:
            halves = weight.reshape(self.pairs, 2, -1, *weight.shape[1:])
            return halves.swapaxes(1, 2).reshape(weight.shape)
        return weight + np.float32(self.offset) if self.offset else weight

    def read(self, weight: np.ndarray) -> np.ndarray:
        """Of the file -> of the model."""
        if self.pairs:
            pairs = weight.reshape(self.pairs, -1, 2, *weight.shape[1:])
            return pairs.swapaxes(1, 2).reshape(weight.shape)
        return weight - np.float32(self.offset) if self.offset else weight


def spellings(model: PreTrainedModel, architecture: Architecture) -> dict[str, Spelling]:
    """Every weight of ``model``, by its name, in the order of the file; a head tied to the embeddings has none.

    Raises UserError for a weight that the graph does not read.
    """
    config = model.config
    names = gguf.get_tensor_name_map(architecture.name, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name in stored_names(model):
        module, _, kind = name.rpartition(".")
        layer = module.rpartition(".")[2]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None or (kind == "bias" and layer not in architecture.biases):
            _refuse(f"does not read {name} in a model of type {config.model_type}")
        pairs = heads.get(layer, 0) if architecture.interleaved else 0
        offset = architecture.norm_offset if layer.endswith("norm") else 0.0
        found[name] = Spelling(target, pairs, offset)
    return found


def stored_names(model: PreTrainedModel) -> Iterator[str]:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embeddings is not None and head is not None and head.weight is embeddings.weight
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    return (name for name in model.state_dict() if not (tied and name == f"{head_name}.weight"))


def rope_factors(config: PreTrainedConfig, architecture: Architecture) -> np.ndarray | None:
    """By how much each frequency of RoPE [head / 2] is divided, where that is no single number."""
    rope = _ropes(config)["full_attention"]
    if rope["rope_type"] != "llama3":
        return None
    if not architecture.rope_factors:
        _refuse("reads no factors of RoPE in this architecture, and this model has them")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    half = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    return (rope["rope_theta"] ** -half / scaled).numpy()
