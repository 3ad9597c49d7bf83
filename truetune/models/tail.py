"""What lies between the hidden state and the logits, measured instead of assumed.

A model's head may carry a bias, scale its logits or cap them. A known grid is put in place of the head's
output; what the model then returns as logits is a function of that grid, and is recognised as
``softcap * tanh(scale * x / softcap)`` (softcap may be infinite) or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.errors import UserError


@dataclass(frozen=True, slots=True)
class Tail:
    """Names of the decoder and of the head inside the model, and what happens to the head's output."""

    decoder: str
    head: str
    scale: float
    softcap: float | None


def measure_tail(model: PreTrainedModel) -> Tail:
    """Find decoder and head of ``model`` and what it does to the head's output, by two small forwards.

    Raises UserError for a model without an output layer, or with a tail of another shape.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(
            f"{type(model).__name__} has no output layer over the vocabulary, so it is no causal language "
            "model; choose a model that is one"
        )
    names = {module: name for name, module in model.named_modules()}
    training = model.training
    model.eval()
    try:
        decoder = _find_decoder(model, head)
        scale, softcap = _measure(model, head)
    finally:
        model.train(training)
    return Tail(names[decoder], names[head], scale, softcap)


def _probe(model: PreTrainedModel) -> dict[str, Any]:
    return {"input_ids": torch.arange(1, 9, device=model.device)[None], "use_cache": False}


@torch.no_grad()
def _find_decoder(model: PreTrainedModel, head: nn.Module) -> nn.Module:
    """The outermost submodule whose ``last_hidden_state`` is what the head reads."""
    outputs: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if isinstance(state, Tensor):
            outputs[module] = state

    hooks = [m.register_forward_hook(keep) for m in model.modules() if m is not model]
    hooks.append(head.register_forward_pre_hook(lambda _, args: read.append(args[0])))
    try:
        model(**_probe(model))
    finally:
        for hook in hooks:
            hook.remove()
    for module in model.modules():
        if module in outputs and read and torch.equal(outputs[module].to(read[-1].dtype), read[-1]):
            return module
    raise UserError(
        f"{type(model).__name__} changes the hidden state between its decoder and its output layer in a way "
        "that can't be followed; choose another model"
    )


@torch.no_grad()
def _measure(model: PreTrainedModel, head: nn.Module) -> tuple[float, float | None]:
    magnitudes = torch.logspace(-3, 6, 10, dtype=torch.float32, device=model.device)
    values = torch.cat([-magnitudes, torch.zeros(1, device=model.device), magnitudes])

    def put_grid(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        repeats = -(-output.numel() // len(values))
        return values.repeat(repeats)[: output.numel()].view(output.shape)

    hook = head.register_forward_hook(put_grid)
    try:
        logits = model(**_probe(model)).logits.float()
    finally:
        hook.remove()
    grid = values.repeat(-(-logits.numel() // len(values)))[: logits.numel()].view(logits.shape)
    got = {float(x): float(logits.flatten()[i]) for i, x in enumerate(values.tolist())}
    small, large = float(magnitudes[0]), float(magnitudes[-1])
    scale, softcap = got[small] / small, None
    expected = scale * grid
    if abs(got[large]) < 0.5 * abs(scale) * large:
        softcap = got[large]
        expected = softcap * torch.tanh(scale * grid / softcap) if softcap else expected
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-6):
        raise UserError(
            f"{type(model).__name__} does something to its logits that is neither a scale nor a soft cap; "
            "choose another model"
        )
    return _round(scale), None if softcap is None else _round(softcap)


def _round(value: float) -> float:
    """The figure without the noise of fp32: six significant digits."""
    return float(f"{value:.6g}")
