"""litgpt's GPT, LoRA and chunked cross-entropy in the inner loop of its finetune scripts, a document at a time.

For comparison with the others its adapters and their AdamW state are in fp32 under autocast, where its scripts' default
has them in bf16; the head stays tied where the model's is, and a step's loss is the mean over its targets, where its
scripts take the mean of its documents' means. Models must have the layers of a gated, grouped-query decoder under their
usual names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from protocol import IGNORE, Side
from safetensors.torch import load_file

PARTS = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
JOINED = [f"self_attn.{part}_proj" for part in "qkv"]


def config_of(folder: Path, weights: Mapping[str, torch.Tensor], longest: int) -> dict[str, Any]:
    """What litgpt calls the entries of a model's config. Raises KeyError for a model of another kind."""
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "name": "compared",
        "block_size": longest,
        "vocab_size": theirs["vocab_size"],
        "padded_vocab_size": theirs["vocab_size"],
        "n_layer": theirs["num_hidden_layers"],
        "n_head": theirs["num_attention_heads"],
        "n_query_groups": theirs["num_key_value_heads"],
        "head_size": theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"],
        "n_embd": theirs["hidden_size"],
        "intermediate_size": theirs["intermediate_size"],
        "norm_eps": theirs["rms_norm_eps"],
        "rope_base": int(theirs["rope_parameters"]["rope_theta"]),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "attn_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }


def renamed(weights: Mapping[str, torch.Tensor], layers: int, biased: bool) -> dict[str, torch.Tensor]:
    embedding = weights["model.embed_tokens.weight"]
    found = {
        "transformer.wte.weight": embedding,
        "lm_head.weight": weights.get("lm_head.weight", embedding),
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    for i in range(layers):
        old, new = f"model.layers.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias")[: 1 + biased]:
            found[f"{new}attn.qkv.{kind}"] = torch.cat([weights[f"{old}{part}.{kind}"] for part in JOINED])
        for here, there in {**PARTS, **NORMS}.items():
            found[f"{new}{here}.weight"] = weights[f"{old}{there}.weight"]
    return found


def adapters(tensors: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """PEFT's factors under litgpt's names, which joins those of queries, keys and values."""
    found = {}
    for i in range(layers):
        for factor in ("lora_A", "lora_B"):
            old = f"base_model.model.model.layers.{i}." + "{}." + f"{factor}.weight"
            new = f"transformer.h.{i}." + "{}." + factor
            found[new.format("attn.qkv")] = torch.cat([tensors[old.format(part)] for part in JOINED])
            found |= {new.format(here): tensors[old.format(there)] for here, there in PARTS.items()}
    return found


def build(side: Side) -> Any:
    """litgpt's model with the weights, and with the adapter where there is one."""
    folder, adapter = Path(side.job["model"]), side.job["adapter"]
    weights = load_file(folder / "model.safetensors")
    described = config_of(folder, weights, side.job["longest"])
    layers = described["n_layer"]
    state = renamed(weights, layers, described["attn_bias"])
    if adapter:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

        lora = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
        described |= {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
        described |= {"lora_r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": 0.0}
        state |= adapters(load_file(Path(adapter) / "adapter_model.safetensors"), layers)
    else:
        from litgpt.model import GPT, Config
    model = GPT(Config(**described)).to(side.stored)
    if adapter:
        mark_only_lora_as_trainable(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    model.load_state_dict(state)
    if "lm_head.weight" not in weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model.train()


def main() -> None:
    side = Side()
    from litgpt.utils import chunked_cross_entropy

    model = build(side)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=side.job["rate"], weight_decay=0.0, fused=True)
    side.ready(parameters, ("torch", "litgpt"))
    for rows in side.steps:
        side.begin()
        counts = [int((row.labels[1:] != IGNORE).sum()) for row in rows]
        total = 0.0
        for row, count in zip(rows, counts, strict=True):
            ids, labels = (torch.from_numpy(part)[None] for part in row)
            with torch.autocast("cpu", torch.bfloat16, enabled=side.autocast):
                logits = model(ids, lm_head_chunk_size=128)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, labels[..., 1:]) * count / sum(counts)
            loss.backward()
            total += loss.item()
        if side.job["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(parameters, side.job["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        side.done(total, sum(len(row.ids) for row in rows), sum(counts))
    side.finish()


if __name__ == "__main__":
    main()
