"""A frozen linear layer in 4 bits with a LoRA adapter: the weight is made from them, and forgotten, in each product.

    W_i ~ c[q_i] m_b,   m_b = max |W| of the block b of 64 weights, row by row, that has i
    q_i = the one of 16 levels c that is nearest to W_i / m_b

NormalFloat: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, eq. 4 and appendix E. The levels are quantiles of a normal
distribution, 0 one of them. Four bits and a scale in fp32 for 64 make 0.5625 bytes a weight. ``bitsandbytes`` packs and
unpacks; the reference is written from the paper. Left out: the paper's quantisation of the scales, its paged optimizer.

Shape suffixes: N blocks, k weights of a block, and those of ``lora_linear``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.kernels.lora_linear import Layer, Product, Ways, lora_linears, one_by_one, product, through
from truetune.kernels.op import Op, compute_dtype

BLOCK = 64
"""Weights that share a scale."""


class Packed(NamedTuple):
    """Two weights a byte in ``codes``, and a scale in fp32 for every block of them; their shape [O, I]."""

    codes: Tensor
    scale_N: Tensor
    shape: tuple[int, ...]


def available() -> bool:
    """Whether the library is installed."""
    return find_spec("bitsandbytes") is not None


@cache
def levels() -> Tensor:
    """c [16] in fp32, ascending: as many quantiles of a normal distribution, from -1 to 1, one of them 0."""
    first = 1 - (1 / 32 + 1 / 30) / 2
    below, above = (torch.special.ndtri(torch.linspace(first, 0.5, n, dtype=torch.float64))[:-1] for n in (8, 9))
    values = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (values / values[-1]).float()


def rounded(weight_OI: Tensor) -> Tensor:
    """What is left of the weight [O, I], in fp32: each the nearest level of its block."""
    blocks_Nk = _blocks(weight_OI.float())
    scale_N1 = blocks_Nk.abs().amax(1, keepdim=True)
    known = levels().to(weight_OI.device)
    places_Nk = torch.bucketize(blocks_Nk / scale_N1.clamp(min=torch.finfo().tiny), (known[1:] + known[:-1]) / 2)
    return _of_blocks(known[places_Nk] * scale_N1, weight_OI.shape)


def _blocks(weight_OI: Tensor) -> Tensor:
    flat = weight_OI.flatten()
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _of_blocks(blocks_Nk: Tensor, shape: Sequence[int]) -> Tensor:
    return blocks_Nk.flatten()[: math.prod(shape)].view(shape)


def pack(weight_OI: Tensor) -> Packed:
    """The weight [O, I] quantised, on its device."""
    codes, state = _library().quantize_4bit(_blocks(weight_OI), blocksize=BLOCK, quant_type="nf4")
    return Packed(codes, state.absmax, tuple(weight_OI.shape))


def unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] again."""
    library = _library()
    # As blocks, since on CPUs with AVX-512 it takes wrong scales for some rows that end within one.
    shape = (len(packed.scale_N), BLOCK)
    state = library.QuantState(packed.scale_N, shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return _of_blocks(library.dequantize_4bit(packed.codes, state), packed.shape)


@cache
def _library() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


@Op
def nf4_lora_linears(x: Tensor, layers: Sequence[Layer], packed: Sequence[Packed]) -> tuple[Tensor, ...]:
    """As ``lora_linears``, over the weights in 4 bits.

    packed: ``pack`` of each weight, which the reference does not read. Raises ValueError as ``lora_linear`` does.
    """
    dtype = compute_dtype(x)
    weights = [rounded(layer.weight.to(x.device)).to(dtype) for layer in layers]
    return lora_linears.reference(
        x.to(dtype), [layer._replace(weight=weight) for layer, weight in zip(layers, weights, strict=True)]
    )


@nf4_lora_linears.on("cpu", "cuda")
def _unpacked(x: Tensor, layers: Sequence[Layer], packed: Sequence[Packed]) -> tuple[Tensor, ...]:
    ahead, back = zip(*map(_products, packed), strict=True)
    return through(Ways(ahead, one_by_one(back), holds=True), x, layers)


def _products(packed: Packed) -> tuple[Product, Product]:
    def ahead(x_TI: Tensor, _: None, bias_O: Tensor | None, low_TR: Tensor, up_OR: Tensor) -> Tensor:
        return product(x_TI, unpack(packed, x_TI.dtype), bias_O, low_TR, up_OR)

    def back(dy_TO: Tensor, _: None, __: Tensor | None, low_TR: Tensor, up_IR: Tensor) -> Tensor:
        return product(dy_TO, unpack(packed, dy_TO.dtype).T, None, low_TR, up_IR)

    return ahead, back
