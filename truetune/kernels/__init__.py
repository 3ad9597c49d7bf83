"""Tensors in, tensors out: each operation has a reference in plain torch and, per device, a faster equal."""

from truetune.kernels.attention import packed_attention
from truetune.kernels.int8_linear import int8_lora_linears
from truetune.kernels.linear_cross_entropy import LossTerms, linear_cross_entropy
from truetune.kernels.lora_linear import lora_linear
from truetune.kernels.op import Op

__all__ = ["LossTerms", "Op", "int8_lora_linears", "linear_cross_entropy", "lora_linear", "packed_attention"]
