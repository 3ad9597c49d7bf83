"""One face for every causal language model: ``hidden(batch)`` and ``head``, never the logits.

The model inside is the Hugging Face model itself, unchanged but for its attention, which packed routes
replace through transformers' own attention registry, and for LoRA layers, which PEFT puts in place.
Shape suffixes: T tokens of the batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.data.batch import Batch, Document
from truetune.errors import UserError
from truetune.models.adapt import START, low_rank
from truetune.models.base import original_weights
from truetune.models.last import narrow
from truetune.models.recompute import Budget, measured, recomputable
from truetune.models.route import Route, States, recompute_disproof
from truetune.models.swap import swap, swap_linears, unswapped
from truetune.models.tail import Tail


@dataclass(frozen=True, slots=True)
class Head:
    """What lies between hidden state and logits: ``softcap * tanh(scale * (h W^T + low(h) U^T + b) / softcap)``.

    weight [V, D]; bias [V] or None; softcap None where there is none. Measured by ``models.tail``.
    low: [N, D] -> [N, R] and up: U [V, R] are LoRA on the head, or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    low: Callable[[Tensor], Tensor] | None = None
    up: Tensor | None = None


class CausalLM(nn.Module):
    """A causal language model as hidden states of a ragged batch.

    model:  the Hugging Face model, or PEFT's wrapper of it.
    tail:   its decoder, its output layer and what happens after it, as measured.
    route:  how documents that share a batch are kept apart, as proven.
    dtype:  what matrix products are computed in; bfloat16 means autocast, whatever the weights are.
    budget: which layers are computed again in the backward pass, None where all keep what they made.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tail: Tail, route: Route, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.tail = tail
        self.route = route
        self.dtype = dtype
        self.budget: Budget | None = None
        self.train(model.training)
        if not route.whole:
            narrow(self.hf.get_submodule(tail.decoder))
        swap(self.hf, self.autocast)
        if dtype == torch.bfloat16:
            swap_linears(self.hf, tail.head, self.autocast)
        self.hf.set_attn_implementation(route.attention or route.published)

    @property
    def hf(self) -> PreTrainedModel:
        """The Hugging Face model itself, its LoRA layers in place."""
        return cast(PreTrainedModel, self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def head(self) -> Head:
        layer = cast(nn.Linear, self.hf.get_submodule(self.tail.head))
        low, up = low_rank(layer) if isinstance(layer, LoraLinear) else (None, None)
        return Head(layer.weight, layer.bias, self.tail.scale, self.tail.softcap, low, up)

    def hidden(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Hidden states [T, D] that the head would read, each document isolated from its neighbours.

        rows: int64 [N], ascending: only their states, [N, D].
        """
        if rows is None or not len(rows) or self.route.whole:
            hidden = self.states(batch).hidden
            return hidden if rows is None else hidden[rows]
        return self._states(batch, rows=rows).hidden

    def states(self, batch: Batch, router: bool = False) -> States:
        """The same with the logits of the routers, which choose among experts, where they are asked for."""
        return self._states(batch, router=router)

    def _states(self, batch: Batch, **options: Any) -> States:
        if self.budget:
            self.budget.choose(batch.lengths)
        return self.route.states(self.hf.get_submodule(self.tail.decoder), batch, **options)

    def keep_within(self, limit: int) -> Budget:
        """From now on, layers keep ``limit`` bytes for the backward pass of a batch, and the others are computed again.

        Raises UserError for a model whose layers can't be computed again.
        """
        if reason := recompute_disproof(self.hf, self.tail.decoder, self.route):
            raise UserError(
                f"train.activation_memory means nothing for {type(self.hf).__name__}, whose layers can't be computed "
                f"again in the backward pass ({reason}); remove it"
            )
        decoder = self.hf.get_submodule(self.tail.decoder)

        def run(length: int) -> States:
            tokens = np.arange(length, dtype=np.int32) % len(self.head.weight)
            document = Document(tokens, np.zeros(length, dtype=bool))
            return self.route.states(decoder, Batch.of([document], self.device))

        layers, training = recomputable(decoder), self.training
        self.train()  # for the masks of dropout are kept too
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), self.autocast():
            own, handed = measured(decoder, run)
        self.train(training)
        self.budget = Budget(layers, limit, own, handed, by_document=self.route.attention is None)
        return self.budget

    def forward(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        return self.hidden(batch, rows)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that model and loss are computed in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def as_published(self, attention: str | None = None) -> Iterator[PreTrainedModel]:
        """The plain Hugging Face model, in evaluation mode, with its own attention and weights, for a while.

        attention: "eager" for the reference of the checks, None for what the model was loaded with.
        """
        training = self.training
        self.hf.set_attn_implementation(attention or self.route.published)
        self.eval()
        try:
            with unswapped(self.hf), original_weights(self.hf):
                yield self.hf
        finally:
            self.train(training)
            self.hf.set_attn_implementation(self.route.attention or self.route.published)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name; a tied weight once."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, nn.Parameter]:
        """What a checkpoint must hold beside the base: trained parameters, and the frozen start of PiSSA."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad or f".{START}." in n}
