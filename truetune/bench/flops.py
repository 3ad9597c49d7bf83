"""Floating-point operations that a step needs, whoever takes it: the numerator of model FLOPs utilisation (MFU).

Chowdhery et al. 2022 (PaLM), appendix B, made exact for fine-tuning. A product of N weights takes 2N for a token's
output, 2N for the gradient of its input and, only if its weights are trained, 2N for theirs. LoRA's factors are
products that are trained. The head is needed at targets alone. Attention is causal and within a document: token i of it
meets i keys, in two products forward and four backward. Padding, logits of other tokens, gradients of frozen weights
and whatever is computed twice are not needed, nor is a prefix that documents of a step share, but once, nor of the
last layer all but keys and values of tokens that predict no target. Left out, below 1 % here: norms, activations, the
softmax, the optimizer, and that under LoRA the first layer's input needs no gradient. Stacked experts are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from truetune.data.batch import IGNORE, Batch, Document
from truetune.data.prefixes import packed_by_prefix
from truetune.errors import UserError
from truetune.models.load import skeleton


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: ``layers`` of all products of a token but the head's, of the ``head``, of ``low_rank`` factors
    (0 where every weight is trained), and of ``attention`` for each pair of a token and a key, all layers together;
    unread: of products, factors and a pair, those of the last layer that a token without a target does not need."""

    layers: int
    head: int
    low_rank: int
    attention: int
    unread: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, config: PreTrainedConfig, rank: int | None) -> Cost:
        """rank: of LoRA on every product but the head; None trains every weight. Raises UserError for experts."""
        model = skeleton(config)
        head, text = model.get_output_embeddings(), config.get_text_config()
        if any(p.ndim > 2 for p in chain(model.parameters(), model.buffers())):
            raise UserError(
                "the operations that a model of stacked experts or convolutions needs are not counted here; compare "
                "on a dense one"
            )
        products = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys = size * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        depth, attention = text.num_hidden_layers, text.num_attention_heads * 2 * size
        layers = sum(weight.numel() for weight in products)
        low_rank = sum(rank * sum(weight.shape) for weight in products) if rank else 0
        of_keys = 2 * text.hidden_size * keys, 2 * (rank or 0) * (text.hidden_size + keys)  # and of values
        unread = layers // depth - of_keys[0], low_rank // depth - of_keys[1], attention
        return cls(layers, head.weight.numel(), low_rank, depth * attention, unread)

    def step(self, documents: Sequence[Document]) -> int:
        """FLOPs of forward and backward over the documents of one optimizer step."""
        packs = packed_by_prefix(documents, sum(map(len, documents)))
        order = documents if packs is None else [documents[i] for pack in packs for i in pack]
        batch = Batch.of(order, shares=packs is not None)
        seen, read = batch.positions + 1, batch.labels != IGNORE
        tokens, targets, pairs = len(seen), int(read.sum()), int(seen.sum())
        without = tokens - targets, tokens - targets, int(seen[~read].sum())
        idle = [n * amount for n, amount in zip(without, self.unread, strict=True)]
        both = 2 * (self.layers * tokens - idle[0] + self.head * targets)  # output, and gradient of the input
        weights = 0 if self.low_rank else both // 2
        return 2 * (both + weights + 3 * (self.low_rank * tokens - idle[1]) + 3 * (self.attention * pairs - idle[2]))
