"""How a model is adapted: LoRA and its kin through PEFT, or every weight.

PEFT makes, names, saves and merges the adapters. Where a LoRA layer is plain (no dropout, an ordinary linear base)
its product is computed by ``kernels.lora_linear``: the layer's class becomes a subclass of PEFT's own, so that
names, saving, merging and copies stay PEFT's. DoRA's layers are computed by PEFT itself.

LoRA: Hu et al., arXiv:2106.09685. y = W x + s B A x with s = alpha / r, A random, B zero.
Rank-stabilised: Kalajdzievski, arXiv:2312.03732. s = alpha / sqrt(r).
DoRA: Liu et al., arXiv:2402.09353. y = m (W + s B A) x / |W + s B A|, by rows; m starts at |W|, the norm is held fixed
in the backward.
PiSSA: Meng, Wang & Zhang, arXiv:2404.02948. s B A starts as the r largest singular parts of W, and the rest of W is
frozen. Here W stays as it is and the start is subtracted, s (B A - B0 A0), which is the same function: so nothing is
rounded in a bf16 base, and what is exported is an ordinary adapter of rank 2r over the original weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.errors import UserError
from truetune.kernels import bases
from truetune.kernels.lora_linear import Layer, lora_linear, lora_linears
from truetune.kernels.op import compute_dtype, no_autocast, statistics_dtype
from truetune.models.load import quiet
from truetune.models.targets import adapted_linears, embeddings_name, in_full, is_tied, shortest
from truetune.models.together import Together, of_one_input

START = "start"
"""Name of the frozen adapter that holds where PiSSA began; its scaling is negative."""


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA layer with base and adapter computed together; anything unusual goes PEFT's way.

    packed: the weight in a few bits, where ``models.base`` put it, and ``whole`` where and in what dtype it is computed
    with otherwise; a copy in float64 is computed with the weight itself.
    """

    together: Together | None = None
    packed: bases.Packed | None = None
    whole: tuple[torch.device, torch.dtype]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.adapts:
            return super().forward(x, *args, **kwargs)
        if self.together and all(isinstance(m, FusedLoraLinear) and m.adapts for m in self.together.layers):
            return self.together.output(self, x)
        if self.packed is not None:
            return _compute(x, [self])[0]
        return lora_linear(x, *self.parts)

    @property
    def adapts(self) -> bool:
        return bool(self.active_adapters) and not self.disable_adapters and not self.merged

    @property
    def parts(self) -> Layer:
        base = cast(nn.Linear, self.base_layer)
        return Layer(base.weight, base.bias, *factors(self))


class _WideLinear(nn.Linear):
    """A linear layer whose output is not rounded to the dtype that it multiplies in."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x, self.weight)
        x, weight, bias = (
            None if t is None else t.to(dtype).to(statistics_dtype(dtype)) for t in (x, self.weight, self.bias)
        )
        with no_autocast(x):
            return F.linear(x, weight, bias)


class _PlainLoraLinear(PeftLoraLinear):
    """PEFT's own LoRA layer, but that the base alone is not rounded (``kernels.lora_linear`` says why)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if type(base) is not nn.Linear:
            return super().forward(x, *args, **kwargs)
        base.__class__ = _WideLinear
        try:
            return super().forward(x, *args, **kwargs).to(compute_dtype(x, base.weight))
        finally:
            base.__class__ = nn.Linear


def _compute(x: Tensor, layers: Sequence[FusedLoraLinear]) -> tuple[Tensor, ...]:
    parts, packed = [layer.parts for layer in layers], [layer.packed for layer in layers]
    if None in packed or parts[0].weight.dtype == torch.float64:
        return lora_linears(x, parts)
    return bases.linears(x, parts, cast(Sequence[bases.Packed], packed))


def factors(layer: PeftLoraLinear) -> tuple[Tensor, Tensor, float]:
    """A [R, I], B [O, R] and s, whose product s B A is what the active adapters of ``layer`` add together."""
    names = layer.active_adapters
    parts = [(cast(Tensor, layer.lora_A[n].weight), cast(Tensor, layer.lora_B[n].weight)) for n in names]
    if len(parts) == 1:
        return *parts[0], layer.scaling[names[0]]
    scaled = [b * layer.scaling[n] for n, (_, b) in zip(names, parts, strict=True)]
    return torch.cat([a for a, _ in parts]), torch.cat(scaled, 1), 1.0


def lora_layers(model: nn.Module) -> dict[str, PeftLoraLinear]:
    """The LoRA layers of ``model`` by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PeftLoraLinear)}


def fuse(model: nn.Module) -> int:
    """Let the plain LoRA layers of ``model`` compute through our kernel; how many they are."""
    plain = [m for m in model.modules() if type(m) is PeftLoraLinear and _is_plain(m)]
    for module in plain:
        module.__class__ = FusedLoraLinear
    return len(plain)


@contextlib.contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """LoRA layers computed by PEFT itself, for a while: the reference of the checks."""
    fused: list[nn.Module] = [module for module in model.modules() if type(module) is FusedLoraLinear]
    for module in fused:
        module.__class__ = _PlainLoraLinear
    try:
        yield
    finally:
        for module in fused:
            module.__class__ = FusedLoraLinear


def _is_plain(layer: PeftLoraLinear) -> bool:
    return (
        not layer.lora_variant
        and not layer.fan_in_fan_out
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and all(b.bias is None for b in layer.lora_B.values())
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
    )


def low_rank(layer: PeftLoraLinear) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """x [N, I] -> [N, R] and U [O, R]: ``layer`` adds low(x) U^T to its base, by its active adapters together."""
    names = layer.active_adapters
    a, b = ({n: cast(nn.Linear, factor[n]).weight for n in names} for factor in (layer.lora_A, layer.lora_B))

    def low(x: Tensor) -> Tensor:
        x = x.to(a[names[0]].dtype)
        return torch.cat([layer.lora_A[n](layer.lora_dropout[n](x)) for n in names], -1)

    return low, torch.cat([b[n] * layer.scaling[n] for n in names], 1)


def add_lora(
    model: PreTrainedModel,
    head: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    rslora: bool = False,
    dora: bool = False,
    init: str = "zero",
    also: str | Sequence[str] = (),
) -> PeftModel:
    """Put LoRA adapters (fp32) into ``model`` in place and freeze the rest.

    targets: "all-linear" (every linear layer that the model calls, but the head), a regular expression
    over full module names, or a list of module names. init: "zero" or "pissa". also: modules that are trained in
    full beside, in fp32. Raises UserError for names of nothing, and for what does not go together.
    """
    full = in_full(model, head, also)
    wanted = adapted_linears(model, head, targets, full)
    if dora and head in wanted:
        raise UserError(f"adapter.dora can't adapt the output layer {head}; leave it out of adapter.targets")
    conv = {isinstance(model.get_submodule(n), Conv1D) for n in wanted}
    if len(conv) > 1:
        raise UserError("adapter.targets mixes Linear and Conv1D layers; name layers of one kind")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with any number
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        target_modules=shortest(wanted, model),
        modules_to_save=full or None,
        ensure_weight_tying=is_tied(model) and embeddings_name(model) in full,
        fan_in_fan_out=conv.pop(),
        task_type="CAUSAL_LM",
    )
    peft = insert(model, config)
    if init == "pissa":
        _start_at_principal(peft, config)
        fuse(peft)
    return peft


def insert(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The adapter that ``config`` describes, new, in ``model``; all that is trained is fp32."""
    full, tied, groups = set(config.modules_to_save or ()), is_tied(model), of_one_input(model)
    with quiet():
        peft = get_peft_model(model, config)
    if tied and embeddings_name(model) in full and not is_tied(model):
        raise UserError(
            "PEFT can't train embeddings and head of this model as the one tensor that they are; drop them "
            "from adapter.also"
        )
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.use_dora:
        _measure_lengths(peft)
    with_embeddings = getattr(config, "modules_to_tie", None) or ()
    if surplus := trained_in_full(peft) - full - set(with_embeddings):
        raise UserError(
            f"{min(surplus)} would be trained too, by the likeness of its name; leave it out of adapter.also"
        )
    fuse(peft)
    for names in groups:
        layers = [m for m in map(model.get_submodule, names) if isinstance(m, FusedLoraLinear)]
        if len({layer.weight.dtype for layer in layers}) == 1 < len(layers):
            together = Together(layers, _compute)
            for layer in layers:
                layer.together = together
    return peft


def trained_in_full(model: PeftModel) -> set[str]:
    """Names, in the model without adapters, of the modules that are trained in full beside LoRA."""
    return {n for n, m in model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)}


def _measure_lengths(model: PeftModel) -> None:
    """DoRA's m once more: PEFT takes it before its factors are fp32, and so rounds it in a bf16 base."""
    for layer in lora_layers(model).values():
        for name, magnitude in layer.lora_magnitude_vector.items():
            a, b = (cast(nn.Linear, m[name]).weight for m in (layer.lora_A, layer.lora_B))
            cast(Any, magnitude).update_layer(
                base_layer=layer.base_layer, lora_A=a, lora_B=b, scaling=layer.scaling[name]
            )


@torch.no_grad()
def _start_at_principal(model: PeftModel, config: LoraConfig) -> None:
    """PiSSA: s B A becomes the largest singular parts of each weight, a frozen copy of which is subtracted."""
    with quiet():
        own: dict[str, Any] = {"modules_to_save": None, "ensure_weight_tying": False, "lora_dropout": 0.0}
        model.add_adapter(START, replace(copy.deepcopy(config), **own))
    for layer in lora_layers(model).values():
        weight = cast(nn.Linear, layer.base_layer).weight.float()
        u, s, v = torch.linalg.svd(weight.T if layer.fan_in_fan_out else weight, full_matrices=False)
        rank, scaling = config.r, layer.scaling["default"]
        if rank > len(s):
            raise UserError(
                f"adapter.init=pissa with rank {rank} needs weights of that rank; set adapter.rank={len(s)}"
            )
        root = (s[:rank] / scaling).sqrt()
        for name in ("default", START):
            cast(Tensor, layer.lora_A[name].weight).copy_(root[:, None] * v[:rank])
            cast(Tensor, layer.lora_B[name].weight).copy_(u[:, :rank] * root)
        layer.scaling[START] = -scaling
    cast(LoraModel, model.base_model).set_adapter(["default", START])
    for name, parameter in model.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)
