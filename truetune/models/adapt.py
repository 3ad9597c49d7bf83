"""How a model is adapted: LoRA through PEFT, or every weight.

PEFT makes, names, saves and merges the adapters. Where a LoRA layer is plain (one adapter, no dropout, an
ordinary linear base) its product is computed by ``kernels.lora_linear``: the layer's class becomes a
subclass of PEFT's own, so that names, saving, merging and copies stay PEFT's.

LoRA: Hu et al., arXiv:2106.09685. y = W x + (alpha / r) B A x, A random, B zero.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.errors import UserError
from truetune.kernels.lora_linear import lora_linear
from truetune.models.load import quiet


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with base and adapter computed together; anything unusual goes PEFT's way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base, a, b = (cast(nn.Linear, m) for m in (self.base_layer, self.lora_A[name], self.lora_B[name]))
        return lora_linear(x, base.weight, base.bias, a.weight, b.weight, self.scaling[name])


def fuse(model: nn.Module) -> int:
    """Let the plain LoRA layers of ``model`` compute through our kernel; how many they are."""
    fused = 0
    for module in model.modules():
        if type(module) is PeftLoraLinear and _is_plain(module):
            module.__class__ = FusedLoraLinear
            fused += 1
    return fused


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """LoRA layers computed by PEFT itself, for a while: the reference of the checks."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = PeftLoraLinear  # type: ignore[assignment]
    try:
        yield
    finally:
        fuse(model)


def _is_plain(layer: PeftLoraLinear) -> bool:
    names = list(layer.lora_A)
    return (
        len(names) == 1
        and not layer.lora_variant
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and layer.lora_B[names[0]].bias is None
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
    )


def add_lora(
    model: PreTrainedModel, head: str, *, rank: int, alpha: float, dropout: float, targets: str | list[str]
) -> PeftModel:
    """Put LoRA adapters (fp32) into ``model`` in place and freeze the rest.

    targets: "all-linear" (every linear layer that the model calls, but the head), a regular expression
    over full module names, or a list of module names. Raises UserError when they name nothing.
    """
    linears = called_linears(model)
    if targets == "all-linear":
        wanted = [n for n in linears if n != head]
    elif isinstance(targets, str):
        try:
            wanted = [n for n in linears if re.fullmatch(targets, n)]
        except re.error as error:
            raise UserError(f"adapter.targets is no regular expression ({error}); correct it") from error
    else:
        wanted = [n for n in linears if any(n == t or n.endswith("." + t) for t in targets)]
        lost = [t for t in targets if not any(n == t or n.endswith("." + t) for n in linears)]
        if lost:
            raise UserError(f"adapter.targets names {lost[0]!r}, which is no linear layer here; {_known(linears)}")
    if not wanted:
        raise UserError(f"adapter.targets matches no linear layer; {_known(linears)}")
    if head in wanted:
        raise UserError(f"adapter.targets includes the output layer {head!r}; leave it out")
    conv = {isinstance(model.get_submodule(n), Conv1D) for n in wanted}
    if len(conv) > 1:
        raise UserError("adapter.targets mixes Linear and Conv1D layers; name layers of one kind")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with any number
        lora_dropout=dropout,
        target_modules=_shortest(wanted, model),
        fan_in_fan_out=conv.pop(),
        task_type="CAUSAL_LM",
    )
    with quiet():
        peft = get_peft_model(model, config)
    fuse(model)
    return peft


def _known(linears: list[str]) -> str:
    names = sorted({n.rsplit(".", 1)[-1] for n in linears})
    return f"the model has {', '.join(names[:12])}"


@torch.no_grad()
def called_linears(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that a forward calls; a layer whose weight is read directly is not one."""
    called: list[str] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, _o, name=name: called.append(name))
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    training = model.training
    model.eval()
    try:
        model(input_ids=torch.arange(1, 9, device=model.device)[None], use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


def _shortest(wanted: list[str], model: nn.Module) -> list[str]:
    """Last parts of the names where these pick the same modules, as in PEFT's own configs; else the names."""
    short = sorted({n.rsplit(".", 1)[-1] for n in wanted})
    matched = {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in short}
    return short if matched == set(wanted) else sorted(wanted)
