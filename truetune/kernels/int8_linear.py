"""A frozen linear layer in 8 bits with a LoRA adapter: whole numbers are multiplied, forward and for dx.

    W ~ diag(s) Q,  s_o = max_i |W_oi| / 127                  the weight, one scale an output, once
    x ~ T * X,      T_ni = max_{j in group of i} |x_nj| / 127 its input, one scale a token and group of 128, on the fly
    y = ((T * X) Q^T) diag(s) + bias + s (x A^T) B^T          dx = (T' * Y) Q + s (dy B) A,  dy diag(s) ~ T' * Y

Sums within a group are of whole numbers. An outlier, of which activations have some, costs its own group alone.
Symmetric scales by rows: Dettmers et al. 2022, arXiv 2208.07339, without its outlier columns; in 8 bits forward and for
dx alone: SwitchBack, Wortsman et al. 2023, arXiv 2304.13013, without a gradient of the weight. Gradients pass
through the rounding as if there were none; dA and dB are those of ``lora_linear``, from the unquantised x and dy.
A token with what is no number has no number in all its outputs; a group whose largest entry is below 4e-37 counts as 0.

Shape suffixes: T tokens, N outputs and K inputs of a product (forward O and I, backward I and O), G groups, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels.lora_linear import Layer, Product, Ways, one_by_one, through
from truetune.kernels.native.build import instructions, kernels
from truetune.kernels.op import Op

LEVELS = 127
GROUP = 128
"""Inputs that share a scale."""


class Packed(NamedTuple):
    """A weight as the compiled product reads it: Q for y, Q^T for dx, and the scales. Two bytes a weight."""

    ahead: Tensor
    back: Tensor
    scale_O: Tensor


def available(device: torch.device) -> bool:
    """Whether the processor multiplies bytes in one instruction, and there is a library, maybe compiled first."""
    return device.type == "cpu" and "avx512_vnni" in instructions() and kernels() is not None


def pack(weight_OI: Tensor) -> Packed:
    """The weight [O, I] quantised, for the compiled product."""
    values_OI, scale_O = quantize_weight(weight_OI)
    return Packed(kernels().int8_pack(values_OI), kernels().int8_pack(values_OI.T.contiguous()), scale_O)  # type: ignore[union-attr]


def quantize_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Q [O, I] in int8 and its scales [O] in fp32."""
    values_OI, scale_O1 = quantize(weight_OI, group=weight_OI.shape[1])
    return values_OI.to(torch.int8), scale_O1[:, 0]


def quantize(x_TK: Tensor, columns_K: Tensor | None = None, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Whole numbers [T, K] within 127, in float64, and scales [T, G] in fp32; of x, its columns times ``columns_K``."""
    x_TK = x_TK.float() if columns_K is None else x_TK.float() * columns_K
    tokens, width = x_TK.shape
    x_TGk = F.pad(x_TK, (0, -width % group)).view(tokens, -1, group)
    largest_TG = x_TGk.abs().amax(2)
    inverse_TG = torch.full_like(largest_TG, LEVELS) / largest_TG
    known_TG, nothing_TG = largest_TG.isfinite(), inverse_TG.isinf()
    inverse_TG = inverse_TG.where(known_TG & ~nothing_TG, 0)
    values_TGk = (x_TGk * inverse_TG[..., None]).round().where(known_TG[..., None], 0)
    scales_TG = (largest_TG / LEVELS).where(~nothing_TG, 0).where(known_TG, torch.nan)
    return values_TGk.view(tokens, -1)[:, :width].double(), scales_TG


def _quantized(x_TK: Tensor, columns_K: Tensor | None = None) -> Tensor:
    """What is left of x, times ``columns_K``."""
    values_TK, scales_TG = quantize(x_TK, columns_K)
    return values_TK * scales_TG.repeat_interleave(GROUP, 1)[:, : x_TK.shape[1]]


@Op
def int8_lora_linears(x: Tensor, layers: Sequence[Layer], packed: Sequence[Packed]) -> tuple[Tensor, ...]:
    """As ``lora_linears``, the products with the weights in 8 bits, and rounded once.

    packed: ``pack`` of each weight, which the reference does not read. For all but float64. Raises ValueError as
    ``lora_linear`` does.
    """
    ahead, back = zip(*(_reference(layer.weight) for layer in layers), strict=True)
    return through(Ways(ahead, one_by_one(back), holds=True), x, layers)


@int8_lora_linears.on("cpu")
def _compiled(x: Tensor, layers: Sequence[Layer], packed: Sequence[Packed]) -> tuple[Tensor, ...]:
    compiled: Any = kernels()
    quantized: list[Any] = []  # x, once for all layers

    def products(weight: Packed) -> tuple[Product, Product]:
        def ahead(x_TI: Tensor, _: None, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
            if not quantized:
                quantized.append(compiled.int8_quantize(x_TI.contiguous(), None))
            return _product(quantized[0], weight.ahead, weight.scale_O, bias_O, low_TR, up_OR)

        def back(dy_TO: Tensor, _: None, __: Tensor | None, low_TR: Tensor, up_IR: Tensor) -> Tensor:
            dy = compiled.int8_quantize(dy_TO.contiguous(), weight.scale_O)
            return _product(dy, weight.back, None, None, low_TR, up_IR)

        return ahead, back

    ahead, back = zip(*map(products, packed), strict=True)
    outputs = through(Ways(ahead, one_by_one(back), holds=True), x, layers)
    quantized.clear()  # else the graph would keep it
    return outputs


def _reference(weight_OI: Tensor) -> tuple[Product, Product]:
    values_OI, scale_O = (t.double() for t in quantize_weight(weight_OI))

    def ahead(x_TI: Tensor, _: None, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
        y_TO = _quantized(x_TI) @ values_OI.T * scale_O + low_TR.double() @ up_OR.double().T
        return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)

    def back(dy_TO: Tensor, _: None, __: Tensor | None, low_TR: Tensor, up_IR: Tensor) -> Tensor:
        dx_TI = _quantized(dy_TO, scale_O.float()) @ values_OI + low_TR.double() @ up_IR.double().T
        return dx_TI.to(dy_TO.dtype)

    return ahead, back


def _product(
    quantized: Sequence[Tensor],
    weight: Tensor,
    scale_N: Tensor | None,
    bias_N: Tensor | None,
    low_TR: Tensor,
    up_NR: Tensor,
) -> Tensor:
    """Rows quantised by the library times a packed weight, each output times its scale, and what is added."""
    compiled: Any = kernels()
    panels, _, width, _ = weight.shape
    low_words = _words(low_TR)
    up_words = _words(F.pad(up_NR, (0, 0, 0, panels * width - len(up_NR))))
    up_words = up_words.view(panels, width, low_words.shape[1]).transpose(1, 2).contiguous()
    bias_N = None if bias_N is None else bias_N.float()
    pairs = low_TR.dtype == torch.bfloat16
    y_TN: Tensor = compiled.int8_product(*quantized, weight, len(up_NR), scale_N, bias_N, low_words, up_words, pairs)
    return y_TN


def _words(x_NR: Tensor) -> Tensor:
    """Rows as words of 32 bits: of one float, or of two bf16."""
    if not x_NR.shape[1]:
        return x_NR.new_zeros(x_NR.shape, dtype=torch.int32)
    spare = x_NR.shape[1] % 2 if x_NR.dtype == torch.bfloat16 else 0
    return F.pad(x_NR, (0, spare)).contiguous().view(torch.int32)
