"""Tiny random configurations of the public families of causal language models, each with what is peculiar to it.

Sizes are the smallest that keep every mechanism: two layers (more where kinds of layers alternate), grouped-query
attention, windows and position limits shorter than the documents of the tests, routers that choose among experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 97

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_COMMON = _TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = _TOKENS | {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 24,
}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Family:
    """model_type and config of a tiny model; features: what it exercises; route: the one that is proven for it;
    unadapted: last names of linear layers that LoRA leaves out, because they are read and not called, or by PEFT."""

    model_type: str
    config: dict[str, Any]
    features: str
    route: str = "flat"
    unadapted: frozenset[str] = frozenset()


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _COMMON, "grouped-query attention"),
    "llama tied": Family("llama", _COMMON | {"tie_word_embeddings": True}, "tied head"),
    "llama biased": Family("llama", _COMMON | {"attention_bias": True, "mlp_bias": True}, "biases everywhere"),
    "llama scaled": Family(
        "llama",
        _COMMON
        | {
            "rope_parameters": _ROPE
            | {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 24,
            }
        },
        "rotary positions scaled by frequency",
    ),
    "mistral": Family("mistral", _COMMON | {"sliding_window": 9}, "sliding window"),
    "qwen2": Family("qwen2", _COMMON | {"tie_word_embeddings": True}, "tied head, query and key biases"),
    "qwen2 windowed": Family(
        "qwen2",
        _COMMON | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        "windows in some layers",
    ),
    "qwen3": Family("qwen3", _COMMON | {"head_dim": 8}, "norms of queries and keys"),
    "gemma": Family(
        "gemma",
        _COMMON | {"head_dim": 8, "tie_word_embeddings": True},
        "scaled embeddings, norms of one more, tied head",
    ),
    "gemma2": Family(
        "gemma2",
        _COMMON | {"head_dim": 8, "sliding_window": 9},
        "soft caps of scores and logits, alternating windows, tied head, scaled embeddings",
    ),
    "gemma3": Family(
        "gemma3_text",
        _COMMON | {"head_dim": 8, **_WINDOWED},
        "alternating windows with rotary bases of their own, norms of queries and keys, tied head",
    ),
    "phi3": Family("phi3", _COMMON | {"sliding_window": 9}, "fused projections, sliding window"),
    "phi3 longrope": Family(
        "phi3",
        _COMMON | {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 24},
        "rotary factors that change with the longest position",
        route="alone",
    ),
    "gpt2": Family("gpt2", _GPT2, "learned positions, tied head, transposed linears"),
    "gpt-neox": Family(
        "gpt_neox",
        _COMMON | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        "parallel residual, partly rotary heads, fused projections",
    ),
    "gpt-neox tied": Family("gpt_neox", _COMMON | {"tie_word_embeddings": True}, "tied head"),
    "olmo2": Family("olmo2", _COMMON, "norms after the sublayers"),
    "smollm3": Family(
        "smollm3",
        _COMMON | {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
        "layers without positions, tied head",
    ),
    "granite": Family(
        "granite",
        _COMMON
        | {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
        "scales of logits, embeddings, residuals and scores",
    ),
    "cohere": Family("cohere", _COMMON | {"logit_scale": 0.25}, "logit scale, parallel residual, tied head"),
    "cohere2": Family(
        "cohere2", _COMMON | {"logit_scale": 0.25, **_WINDOWED}, "logit scale, alternating windows, tied head"
    ),
    "opt": Family(
        "opt",
        _TOKENS
        | {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
        "learned positions with an offset, tied head",
    ),
    "phi": Family(
        "phi",
        _COMMON | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
        "head bias, partly rotary heads, parallel residual",
    ),
    "mixtral": Family("mixtral", _COMMON | _EXPERTS, "stacked experts"),
    "mixtral balanced": Family(
        "mixtral",
        _COMMON | _EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.1},
        "stacked experts, router loss",
    ),
    "qwen3-moe": Family("qwen3_moe", _COMMON | _QWEN_EXPERTS | {"head_dim": 8}, "stacked experts in all layers"),
    "qwen3-moe balanced": Family(
        "qwen3_moe",
        _COMMON
        | _QWEN_EXPERTS
        | {"head_dim": 8, "mlp_only_layers": [0], "output_router_logits": True, "router_aux_loss_coef": 0.1},
        "stacked experts in some layers, router loss",
        unadapted=frozenset({"gate_proj", "down_proj", "up_proj"}),
    ),
    "gpt-oss": Family(
        "gpt_oss",
        _COMMON | _EXPERTS | {"head_dim": 8, **_WINDOWED},
        "attention sinks, alternating windows, stacked experts with biases",
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        _COMMON
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
        "latent attention, shared and routed experts",
        unadapted=frozenset({"gate_proj", "down_proj", "up_proj"}),
    ),
    "mamba": Family(
        "mamba",
        _TOKENS | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
        "state space, no attention",
        route="alone",
        unadapted=frozenset({"dt_proj", "out_proj"}),
    ),
    "mamba2": Family(
        "mamba2",
        _TOKENS
        | {
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        "state space in chunks, no attention",
        route="alone",
        unadapted=frozenset({"out_proj"}),
    ),
    "jamba": Family(
        "jamba",
        _COMMON
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "state space and attention in turn, experts",
        route="alone",
        unadapted=frozenset({"dt_proj"}),
    ),
    "qwen3-next": Family(
        "qwen3_next",
        _COMMON
        | _QWEN_EXPERTS
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
        },
        "linear attention and gated attention in turn, experts",
        route="alone",
        unadapted=frozenset({"gate_proj", "down_proj", "up_proj"}),
    ),
    "lfm2": Family(
        "lfm2",
        _COMMON | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        "short convolutions and attention in turn",
        route="alone",
    ),
    "falcon": Family(
        "falcon",
        _TOKENS
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "max_position_embeddings": 128,
        },
        "attention that can't be replaced, parallel residual, tied head",
        route="alone",
    ),
    "falcon alibi": Family(
        "falcon",
        _COMMON | {"num_kv_heads": 2, "alibi": True},
        "positions as biases of scores, tied head",
        route="alone",
    ),
    "bloom": Family(
        "bloom",
        _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        "positions as biases of scores, tied head",
        route="alone",
    ),
    "mpt": Family(
        "mpt",
        _TOKENS | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
        "positions as biases of scores, tied head",
        route="alone",
    ),
    "gpt-j": Family(
        "gptj",
        _TOKENS
        | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "head bias, rotary table, parallel residual",
    ),
    "llama4": Family(
        "llama4_text",
        _COMMON
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 9,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
        "attention in chunks, layers without positions, shared and routed experts",
        route="alone",
        unadapted=frozenset({"router"}),
    ),
}
