"""The load-balancing loss of a mixture of experts, measured instead of assumed.

Switch Transformer (Fedus et al., arXiv:2101.03961, equations 4 to 6), for k experts per token: with f_e the share of
rows (tokens of all layers) that chose expert e, which has no gradient, and P_e its mean probability,

    balance = E * sum_e f_e P_e        (k when all experts are used alike)

Here it is taken over each document, as the family's own forward does when it is given that document. So neither the
split of a step nor the neighbours in a pack change it. Over a whole batch, as others take it, it would leave the
documents more freedom to prefer experts of their own.
Shape suffixes: T tokens of the batch, E experts, N documents.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.devices import to_device
from truetune.errors import UserError
from truetune.models.wrap import CausalLM

ENOUGH = 1e4
"""A logit that leaves every other token no probability, whatever scale or cap follows."""


@dataclass(frozen=True, slots=True)
class Router:
    """chosen: experts per token; coefficient: weight of the load-balancing loss beside the cross-entropy."""

    chosen: int
    coefficient: float


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model's own forward can add a load-balancing loss."""
    return "output_router_logits" in inspect.signature(model.forward).parameters


def choose_router(model: CausalLM, coefficient: float | None = None) -> Router | None:
    """The router loss of a run, or None without one.

    coefficient: its weight, None for what the model's own config does.
    Raises UserError where the model has none, or one of another kind.
    """
    hf = model.hf
    asked = bool(getattr(hf.config, "output_router_logits", False)) if coefficient is None else coefficient > 0
    measured = None
    if has_router_loss(hf) and (asked or coefficient is not None):
        with model.as_published() as published, model.autocast():
            measured = _measured(published)
    if measured is None and coefficient is not None:
        raise UserError(f"{type(hf).__name__} has no router loss; remove train.router_loss")
    if not asked or measured is None:
        return None
    return measured if coefficient is None else Router(measured.chosen, coefficient)


@torch.no_grad()
def _measured(model: PreTrainedModel) -> Router | None:
    """What the model's own forward adds to a cross-entropy that is made zero, and for which number of experts."""
    tokens = torch.arange(1, 17, device=model.device)[None]
    head: Any = model.get_output_embeddings()

    def foresee(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        logits = torch.zeros_like(output)
        logits[0, :-1].scatter_(1, tokens[0, 1:, None], ENOUGH)
        return logits

    hook = head.register_forward_hook(foresee)
    try:
        out = model(input_ids=tokens, labels=tokens, use_cache=False, output_router_logits=True)
    finally:
        hook.remove()
    balance, added = getattr(out, "aux_loss", None), float(out.loss)
    if not isinstance(balance, Tensor):
        return None
    layers = [layer.reshape(-1, layer.shape[-1]) for layer in out.router_logits]
    for chosen in range(1, layers[0].shape[-1] + 1):
        if math.isclose(load_balance(layers, (tokens.shape[1],), chosen)[0], balance, rel_tol=1e-2):
            return Router(chosen, float(f"{added / float(balance):.4g}"))
    raise UserError(
        f"{type(model).__name__} has a router loss of another kind than the load balancing of Switch Transformer; set "
        "train.router_loss=0 to train without it, or choose another model"
    )


def load_balance(logits: Sequence[Tensor], lengths: Sequence[int], chosen: int) -> Tensor:
    """``balance`` of each document [N], in fp32 or above, from the router's logits [T, E] of each layer."""
    dtype, device, experts = logits[0].dtype, logits[0].device, logits[0].shape[-1]
    dtype = torch.promote_types(dtype, torch.float32)
    rows_N = to_device(torch.tensor(lengths), device)
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), rows_N, output_size=sum(lengths))
    share_NE = torch.zeros(len(lengths), experts, dtype=dtype, device=device)
    probability_NE = torch.zeros_like(share_NE)
    for layer_TE in logits:
        probability_TE = layer_TE.to(dtype).softmax(-1)
        picked_TE = torch.zeros_like(probability_TE).scatter(1, probability_TE.topk(chosen).indices, 1.0)
        share_NE = share_NE.index_add(0, document_T, picked_TE)
        probability_NE = probability_NE.index_add(0, document_T, probability_TE)
    rows_N1 = (len(logits) * rows_N)[:, None]
    return experts * (share_NE / rows_N1 * probability_NE / rows_N1).sum(-1)
