"""Frozen linear layers with LoRA adapters, forward and backward without a full-size temporary.

    y = x W^T + bias + s (x A^T) B^T        dx = dy W + s (dy B) A
    dA = s (dy B)^T x                       dB = s dy^T (x A^T)

LoRA: Hu et al. 2021, arXiv 2106.09685. The two products of size [T, O] and [T, I] that the adapter adds are
added in place, and only x and the small x A^T are saved. Layers that read the same x do so together: one copy of x in
the products' dtype, one product for all A, one sum for dx. Left out: adapter dropout, DoRA, a trained base.

The sum is rounded once. A base product that is already in bf16 lies on its grid, and what a young adapter adds to it,
less than half a step of that, would be rounded away in every token alike.

Shape suffixes: T rows of x, I inputs, O outputs, R rank of the adapter, S ranks of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.kernels.op import Op, compute_dtype, no_autocast, statistics_dtype
from truetune.kernels.product import products

Product = Callable[[Tensor, Any, Tensor | None, Tensor, Tensor], Tensor]
"""(x, W, bias, low, up) -> x W^T + bias + low up^T, all of one dtype."""


class Ways(NamedTuple):
    """How layers of one input are multiplied: ``ahead`` for each its output, ``back`` all of dx.

    back: (dy and W of every layer, s dy B of all [T, S], A of all [S, I], dtype of x) -> dx, in that dtype or that of
    the products. holds: whether both have the weights, and are given None for W.
    """

    ahead: Sequence[Product]
    back: Callable[[Sequence[Tensor], Sequence[Any], Tensor, Tensor, torch.dtype], Tensor]
    holds: bool = False


class Layer(NamedTuple):
    """weight [O, I] and bias [O] are frozen; the adapter is scaling * b a, with a [R, I] and b [O, R]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


@Op
def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """x [..., I] -> [..., O] through a frozen weight and bias and the adapter scaling * B A.

    Computes in autocast's dtype where it is on, else in the dtype of x and weight, which then must be equal;
    the adapter may have another (fp32 over a bf16 base), and its gradients come back in it.
    Raises ValueError if weight or bias requires a gradient, or if the dtypes do not fit.
    """
    _require_frozen(weight_OI, bias_O)
    dtype = compute_dtype(x, weight_OI)
    low = F.linear(x, a_RI.to(dtype))
    added = F.linear(low, (b_OR * scaling).to(dtype))
    y = torch.addmm(added.flatten(0, -2), x.flatten(0, -2), weight_OI.T).view_as(added)
    return y if bias_O is None else y + bias_O.to(dtype)


@lora_linear.on("cpu", "cuda")
def _fused(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    return _together(x, [Layer(weight_OI, bias_O, a_RI, b_OR, scaling)])[0]


@Op
def lora_linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """What ``lora_linear`` gives for each of the layers, whose weights are of one dtype."""
    return tuple(lora_linear.reference(x, *layer) for layer in layers)


@lora_linears.on("cpu", "cuda")
def _together(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    return through(Ways([product] * len(layers), _at_once), x, layers)


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
    """x W^T + low up^T + bias."""
    return products([x_TI, low_TR], [weight_OI, up_OR], bias_O)


def _at_once(
    grads: Sequence[Tensor], weights: Sequence[Tensor], grad_low_TS: Tensor, a_SI: Tensor, dtype: torch.dtype
) -> Tensor:
    return products([*grads, grad_low_TS], [*(weight_OI.T for weight_OI in weights), a_SI.T], dtype=dtype)


def through(ways: Ways, x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The operation, multiplied in these ways."""
    for layer in layers:
        _require_frozen(layer.weight, layer.bias)
    x_TI = x.reshape(-1, x.shape[-1])
    weights, biases, a, b, scalings = zip(*layers, strict=True)
    weights = (None,) * len(layers) if ways.holds else weights
    outputs = _LoRALinears.apply(ways, scalings, x_TI, *weights, *biases, *a, *b)
    # Viewed out here: a view made inside a custom function can't be added to in place, as some models do.
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in outputs)


def _require_frozen(weight_OI: Tensor, bias_O: Tensor | None) -> None:
    if weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad):
        raise ValueError("lora_linear has no gradient for its weight and bias; freeze them first")


class _LoRALinears(torch.autograd.Function):
    """``apply(ways, scalings, x_TI, *weights, *biases, *a, *b)``, the last four of each layer."""

    @staticmethod
    def forward(
        ctx: Any, ways: Ways, scalings: tuple[float, ...], x_TI: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = _by_kind(tensors)
        ctx.ways, ctx.scalings, ctx.dtype = ways, scalings, x_TI.dtype
        ctx.factors = [(f.dtype, f.requires_grad) for f in (*a, *b)]
        dtype = compute_dtype(x_TI, *(weight for weight in weights if weight is not None))
        x_TI = x_TI.to(dtype)
        with no_autocast(x_TI):
            a_SI = torch.cat([f.to(dtype) for f in a])
            ups = [(f * s).to(dtype) for f, s in zip(b, scalings, strict=True)]
            low_TS = products([x_TI], [a_SI])
            lows = low_TS.split([len(f) for f in a], 1)
            outputs = tuple(
                product(x_TI, _to(dtype, weight), _to(dtype, bias), low_TR, up_OR)
                for product, weight, bias, low_TR, up_OR in zip(ways.ahead, weights, biases, lows, ups, strict=True)
            )
        for_a, for_b = (any(f.requires_grad for f in factors) for factors in (a, b))
        ctx.save_for_backward(x_TI if for_a else None, low_TS if for_b else None, a_SI, *weights, *ups)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grads)
        x_TI, low_TS, a_SI, *tensors = ctx.saved_tensors
        weights, ups = tensors[:count], tensors[count:]
        ranks = [up_OR.shape[1] for up_OR in ups]
        for_x, (for_a, for_b) = ctx.needs_input_grad[2], (ctx.factors[:count], ctx.factors[count:])
        grad_x_TI: Tensor | None = None
        grads_a: Sequence[Tensor | None] = [None] * count
        grads_b: Sequence[Tensor | None] = [None] * count
        fine = statistics_dtype(a_SI.dtype)
        with no_autocast(a_SI):
            if for_x or x_TI is not None:
                grad_low_TS = torch.cat([products([g], [up_OR.T]) for g, up_OR in zip(grads, ups, strict=True)], 1)
            if for_x:
                cast = [_to(a_SI.dtype, weight_OI) for weight_OI in weights]
                grad_x_TI = ctx.ways.back(grads, cast, grad_low_TS, a_SI, ctx.dtype).to(ctx.dtype)
            if x_TI is not None:
                grads_a = [
                    g.to(own) if wanted else None
                    for g, (own, wanted) in zip(
                        products([grad_low_TS.T], [x_TI.T], dtype=fine).split(ranks), for_a, strict=True
                    )
                ]
            if low_TS is not None:
                # low^T dy and not dy^T low: oneDNN takes 0.65 of the time for it where O is large.
                grads_b = [
                    products([low_TR.T], [g.T], dtype=fine).T.to(own).contiguous().mul_(scaling) if wanted else None
                    for low_TR, g, scaling, (own, wanted) in zip(
                        low_TS.split(ranks, 1), grads, ctx.scalings, for_b, strict=True
                    )
                ]
        return None, None, grad_x_TI, *[None] * (2 * count), *grads_a, *grads_b


def one_by_one(backs: Sequence[Product]) -> Callable[..., Tensor]:
    """``Ways.back`` of such as hold the weight of one layer each."""

    def back(grads: Sequence[Tensor], _: Sequence[None], grad_low_TS: Tensor, a_SI: Tensor, __: torch.dtype) -> Tensor:
        grad_x_TI = backs[0](grads[0], None, None, grad_low_TS, a_SI.T)
        none_TR, none_IR = grad_low_TS[:, :0], a_SI.T[:, :0]
        for one, grad_TO in zip(backs[1:], grads[1:], strict=True):
            grad_x_TI += one(grad_TO, None, None, none_TR, none_IR)
        return grad_x_TI

    return back


def _to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _by_kind(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """Weights, biases, a and b."""
    count = len(tensors) // 4
    return [tensors[i * count : (i + 1) * count] for i in range(4)]
