"""Several adapters of one model as one: their ranks side by side, which is exact.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

PiSSA leaves this way (the trained adapter and its start), and so do adapters that are merged with weights. Left out:
what is no sum of products (DoRA), and modules trained in full.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from truetune.models.adapt import lora_layers
from truetune.models.adapter import WEIGHTS

PREFIX = "base_model.model."


@torch.no_grad()
def joined(model: PeftModel, weights: Mapping[str, float]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors, in PEFT's layout, of the one adapter that adds what ``weights`` of the adapters add.

    weights: by the names of adapters of ``model``; a layer may have any of them. Modules that the first one trains
    in full come along.
    """
    first, *_ = weights
    tensors = get_peft_model_state_dict(model, adapter_name=first, save_embedding_layers=False)
    tensors = {name: t for name, t in tensors.items() if ".lora_" not in name}
    ranks: dict[str, int] = {}
    for name, layer in lora_layers(model).items():
        members = [n for n in weights if n in layer.lora_A]
        if not members:
            continue
        a_RI = torch.cat([cast(Tensor, layer.lora_A[n].weight) for n in members])
        b_OR = torch.cat([cast(Tensor, layer.lora_B[n].weight) * (weights[n] * layer.scaling[n]) for n in members], 1)
        tensors |= {f"{name}.lora_A.weight": a_RI.contiguous(), f"{name}.lora_B.weight": b_OR.contiguous()}
        ranks[name.removeprefix(PREFIX)] = len(a_RI)
    most = max(ranks.values())
    config = cast(LoraConfig, copy.deepcopy(model.peft_config[first]))
    config.r, config.lora_alpha, config.use_rslora = most, most, False  # a scaling of 1: it is in B
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != most}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules, config.inference_mode = sorted(ranks), True
    return config, tensors


def write_joined(model: PeftModel, weights: Mapping[str, float], folder: Path) -> None:
    """Write the one adapter of ``joined`` to ``folder``, in PEFT's layout."""
    config, tensors = joined(model, weights)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
