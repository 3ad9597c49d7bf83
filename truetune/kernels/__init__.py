"""Tensors in, tensors out: each operation has a reference in plain torch and, per device, a faster equal."""

from truetune.kernels.attention import packed_attention
from truetune.kernels.linear_cross_entropy import LossTerms, linear_cross_entropy
from truetune.kernels.lora_linear import lora_linear
from truetune.kernels.op import Op
from truetune.kernels.triton import install

__all__ = ["LossTerms", "Op", "linear_cross_entropy", "lora_linear", "packed_attention"]

install()
