"""How documents that share a batch are kept apart: a ladder of routes, chosen by proof.

``flat``   one call for the whole pack; attention is ours and knows the documents.
``alone``  one call per document: slow, and right for every model.

The proof that a route is right is made on a small random copy of the model: packed documents must give
the hidden states and the parameter gradients that each document gives alone under the model's own eager
attention. Windows and position limits of the copy are shrunk below the length of its documents, so that a
lost sliding window or a position scaling that leaks from a long neighbour is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from truetune.data.batch import Batch
from truetune.kernels.attention import packed_attention

ATTENTION = "truetune"
TOLERANCE = 1e-4  # relative; fp32 noise is 1e-6, the mildest leak seen in a public model 1e-3


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of the pack, handed through the model to every attention layer."""

    lengths: tuple[int, ...]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, d] -> ([1, T, H, d], no weights)."""
    if documents is None:
        raise RuntimeError("packed attention was called without its documents; use CausalLM.as_published")
    out = packed_attention(
        query[0],
        key[0],
        value[0],
        documents.lengths,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
        dropout=dropout,
    )
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


def _flat(decoder: nn.Module, batch: Batch) -> Tensor:
    lengths = torch.tensor((0, *batch.lengths), dtype=torch.int32, device=batch.tokens.device)
    cumulative = lengths.cumsum(0, dtype=torch.int32)
    longest = max(batch.lengths)
    number = torch.repeat_interleave(
        torch.arange(len(batch.lengths), dtype=torch.int32, device=batch.tokens.device), lengths[1:]
    )
    out = decoder(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        use_cache=False,
        documents=Documents(batch.lengths),
        # Recurrent layers that know transformers' own spelling isolate by it or refuse; none ignores ours.
        cu_seq_lens_q=cumulative,
        cu_seq_lens_k=cumulative,
        max_length_q=longest,
        max_length_k=longest,
        seq_idx=number[None],
    )
    return out.last_hidden_state[0]


def _alone(decoder: nn.Module, batch: Batch) -> Tensor:
    states = [
        decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        for tokens in batch.tokens.split(batch.lengths)
    ]
    return torch.cat(states)


@dataclass(frozen=True, slots=True)
class Route:
    """name: its place on the ladder; attention: what it needs, or None for the model's own;
    published: the attention the model was loaded with; reason: why not a faster one."""

    name: str
    hidden: Callable[[nn.Module, Batch], Tensor]
    attention: str | None
    published: str
    reason: str = ""


def choose_route(model: PreTrainedModel, decoder: str) -> Route:
    """The first route of the ladder that is proven for ``model``; ``decoder`` is the submodule's name."""
    published = model.config._attn_implementation or "eager"
    flat = Route("flat", _flat, ATTENTION, published)
    reason = disproof(model, decoder, flat)
    return flat if reason is None else Route("alone", _alone, None, published, reason)


def disproof(model: PreTrainedModel, decoder: str, route: Route) -> str | None:
    """Why ``route`` is not right for models like ``model``, or None when it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small = _shrunken(model)
            lengths = (7, 1, 13, 4)
            tokens = torch.randint(3, 60, (sum(lengths),))
            positions = torch.cat([torch.arange(n) for n in lengths])
            batch = Batch(tokens, tokens, positions, lengths)
            small.set_attn_implementation("eager")
            truth = _observe(small, decoder, _alone, batch)
            small.set_attn_implementation(route.attention or "eager")
            got = _observe(small, decoder, route.hidden, batch)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            # Any failure to make the proof is a reason to take the slower route, and is shown to the user.
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    # A key's bias has no gradient but rounding noise, so no tensor is measured by less than the rest show.
    floor = 1e-2 * max(float(value.abs().max()) for value in truth.values())
    for name, value in truth.items():
        scale = max(float(value.abs().max()), floor)
        difference = float((got[name] - value).abs().max()) / scale if name in got else float("inf")
        if not difference <= TOLERANCE:
            return f"packed documents change {name} by {difference:.1e}"
    return None


def _observe(
    model: PreTrainedModel, decoder: str, hidden: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> dict[str, Tensor]:
    """Hidden states, and the gradient of every parameter for a fixed random readout of them."""
    model.zero_grad()
    state = hidden(model.get_submodule(decoder), batch)
    generator = torch.Generator().manual_seed(1)
    (state * torch.randn(state.shape, generator=generator)).sum().backward()
    seen = {"hidden states": state.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            seen[f"the gradient of {name}"] = p.grad.clone()
    return seen


def _shrunken(model: PreTrainedModel) -> PreTrainedModel:
    """A small random fp32 copy with every kind of layer, windows and limits shorter than the documents."""
    config = copy.deepcopy(model.config)
    layers = config.num_hidden_layers
    keep = _one_of_each(getattr(config, "layer_types", None), layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    config.vocab_size = 64
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    for name, value in list(vars(config).items()):
        if isinstance(value, int) and name in ("sliding_window", "attention_chunk_size"):
            setattr(config, name, 5)
        elif isinstance(value, int) and name.endswith("intermediate_size"):
            setattr(config, name, 64)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        config.max_position_embeddings = 8
        for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
            if "original_max_position_embeddings" in part:
                part["original_max_position_embeddings"] = 8
    config._attn_implementation = "eager"
    small_model = type(model)(config).float().eval()
    with torch.no_grad():
        for p in small_model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return small_model


def _one_of_each(types: list[str] | None, layers: int) -> list[int]:
    """Indices of at least two layers that hold every kind of layer, in order."""
    if not types:
        return list(range(min(2, layers)))
    first = {kind: types.index(kind) for kind in types}
    keep = sorted(first.values())
    return keep if len(keep) > 1 else list(range(min(2, layers)))
