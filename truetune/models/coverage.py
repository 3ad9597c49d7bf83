"""What of a model LoRA can reach: the linear layers that PEFT adapts as they are, and the share of the weights in them.

Mixtures of experts keep their experts as stacked parameters and not as linear layers; those are left as they are. PEFT
refuses some layers, and takes the names of some others for the experts of older layouts: it would put adapters of
another rank on the stacked parameters instead. Both are found by trying on a copy without storage.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.models.load import quiet


def adaptable(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of the linear layers ``names`` that PEFT adapts as they are, in their order."""
    if _adapts(model, names):
        return list(names)
    alike = defaultdict(list)
    for name in names:
        alike[name.rsplit(".", 1)[-1]].append(name)
    kept = {name for group in alike.values() if _adapts(model, group) for name in group}
    return [name for name in names if name in kept]


def _adapts(model: PreTrainedModel, names: Sequence[str]) -> bool:
    with quiet():
        with torch.device("meta"):
            skeleton = type(model)(copy.deepcopy(model.config))
        try:
            conv = any(isinstance(skeleton.get_submodule(n), Conv1D) for n in names)
            config = LoraConfig(r=1, target_modules=list(names), fan_in_fan_out=conv, task_type="CAUSAL_LM")
            peft = get_peft_model(skeleton, config)
        except ValueError:  # a layer that PEFT refuses
            return False
    found = {n for n, m in peft.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    return found == set(names)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Parameters of the base model: all, in adapted layers, and in stacks of experts that no adapter reaches."""

    total: int
    adapted: int
    experts: int

    def __str__(self) -> str:
        told = f"the adapter's layers hold {self.adapted / self.total:.0%} of the model's weights"
        return told + (f"; the experts ({self.experts / self.total:.0%}) are not adapted" if self.experts else "")


def coverage(model: PeftModel) -> Coverage:
    """How much of the base model the adapters of ``model`` reach."""
    base = model.get_base_model()
    adapted: set[nn.Parameter] = set()
    adapters: set[nn.Parameter] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            adapted.update(p for p in (layer.weight, layer.bias) if isinstance(p, nn.Parameter))
            adapters.update(set(module.parameters()) - set(layer.parameters()))
    weights = [p for p in base.parameters() if p not in adapters]
    kernels = {p for m in base.modules() if isinstance(m, nn.Conv1d) for p in m.parameters()}
    stacked = [p for p in weights if p.ndim == 3 and p not in kernels]
    total, reached, experts = (sum(p.numel() for p in part) for part in (weights, adapted, stacked))
    return Coverage(total, reached, experts)
