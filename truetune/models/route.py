"""How documents that share a batch are kept apart: a ladder of routes, chosen by proof.

``flat``   one call for the whole pack; attention is ours and knows the documents.
``alone``  one call per document: slow, and right for every model whose calls do not depend on earlier ones.

The proof that a route is right is made on a small random copy of the model: packed documents must give
the hidden states and the parameter gradients that each document gives alone under the model's own eager
attention. Windows and position limits of the copy are shrunk below the length of its documents, so that a
lost sliding window or a position scaling that leaks from a long neighbour is seen. That documents may share the
rows of what they begin with is proven likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from truetune.data.batch import SHORTEST, Batch, Document
from truetune.devices import to_device
from truetune.errors import UserError
from truetune.kernels.attention import packed_attention
from truetune.kernels.op import is_on
from truetune.kernels.pieces import Ranges, pieces
from truetune.models.last import Reading, narrow
from truetune.models.load import quiet
from truetune.models.recompute import recomputable, set_recomputed
from truetune.models.small import scaling_begins, small_copy

ATTENTION = "truetune"
TOLERANCE = 1e-4  # relative; fp32 noise is 1e-6, the mildest leak seen in a public model 1e-3


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of the pack, handed through the model to every attention layer.

    lengths:     rows of each document that has any of its own.
    ranges:      the rows of all their tokens, shared ones too, where documents share rows; else None.
    key_lengths: tokens of each of these documents, with ``ranges``.
    reading:     the rows whose hidden states are read, where they are not all.
    """

    lengths: tuple[int, ...]
    ranges: Ranges | None = None
    key_lengths: tuple[int, ...] | None = None
    reading: Reading | None = None

    @classmethod
    def of(cls, batch: Batch, read: Tensor | None = None) -> Documents:
        reading = None if read is None or len(read) == len(batch.tokens) else Reading(read, len(batch.tokens))
        if batch.shared is None:
            return cls(batch.lengths, reading=reading)
        ends = np.cumsum(batch.shared.lengths)[:-1]
        own = [(n, rows) for n, rows in zip(batch.lengths, np.split(batch.shared.rows, ends), strict=True) if n]
        rows = np.concatenate([rows for _, rows in own])
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        stops = np.append(starts[1:], len(rows)) - 1
        ranges = tuple(zip(rows[starts].tolist(), (rows[stops] + 1).tolist(), strict=True))
        return cls(tuple(n for n, _ in own), ranges, tuple(len(rows) for _, rows in own), reading)


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
    reading = documents.reading
    queries, keys, values = query.squeeze(0), key.squeeze(0), value.squeeze(0)  # the gradient of [0] is a copy in zeros
    if reading:
        queries, keys, values = reading.of_all(queries, keys, values)
    if documents.ranges:
        keys, values = pieces(keys, documents.ranges), pieces(values, documents.ranges)
    out = packed_attention(
        queries,
        keys,
        values,
        documents.lengths,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
        dropout=dropout,
        key_lengths=documents.key_lengths,
    )
    out = reading.of_rows(out) if reading else out
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


@dataclass(frozen=True, slots=True)
class States:
    """hidden [T, D]: what the head would read; router: of each layer of experts, the router's logits [T, E]."""

    hidden: Tensor
    router: tuple[Tensor, ...] = ()


def _states(output: Any, router: bool) -> States:
    logits = tuple(layer.reshape(-1, layer.shape[-1]) for layer in output.router_logits) if router else ()
    return States(output.last_hidden_state.squeeze(0), logits)


def _asked(router: bool) -> dict[str, bool]:
    return {"output_router_logits": True} if router else {}


def _flat(decoder: nn.Module, batch: Batch, router: bool = False, rows: Tensor | None = None) -> States:
    lengths = torch.tensor((0, *batch.lengths), dtype=torch.int32)
    number = torch.repeat_interleave(torch.arange(len(batch.lengths), dtype=torch.int32), lengths[1:])
    device, longest = batch.tokens.device, max(batch.lengths)
    cumulative, number = (to_device(x, device) for x in (lengths.cumsum(0, dtype=torch.int32), number))
    out = decoder(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        use_cache=False,
        documents=Documents.of(batch, rows),
        # Recurrent layers that know transformers' own spelling isolate by it or refuse; none ignores ours. Where
        # documents share rows it isolates what each adds, so that the proof refuses to share among such layers.
        cu_seq_lens_q=cumulative,
        cu_seq_lens_k=cumulative,
        max_length_q=longest,
        max_length_k=longest,
        seq_idx=number[None],
        **_asked(router),
    )
    return _states(out, router)


def _alone(decoder: nn.Module, batch: Batch, router: bool = False) -> States:
    if batch.shared is not None:
        raise ValueError("documents that run one at a time share no rows; lay them out with shares=False")
    return _joined([_one(decoder, tokens, router) for tokens in batch.tokens.split(batch.lengths)])


def _backwards(decoder: nn.Module, batch: Batch, router: bool = False) -> States:
    """Each document alone, the last one first: what is right, unless a call leaves something behind."""
    states = [_one(decoder, tokens, router) for tokens in reversed(batch.tokens.split(batch.lengths))]
    return _joined(states[::-1])


def _one(decoder: nn.Module, tokens: Tensor, router: bool) -> States:
    return _states(decoder(input_ids=tokens[None], use_cache=False, **_asked(router)), router)


def _joined(states: list[States]) -> States:
    layers = zip(*(s.router for s in states), strict=True)
    return States(torch.cat([s.hidden for s in states]), tuple(torch.cat(layer) for layer in layers))


@dataclass(frozen=True, slots=True)
class Route:
    """name: its place on the ladder; states: (decoder, batch, router) -> States;
    attention: what it needs, or None for the model's own; published: the attention the model was loaded with;
    reason: why not a faster one; longest: tokens of the longest document that it is proven for, None for any;
    whole: why the last layer computes all rows, or None: ``states`` takes the rows that are read, and it computes those
    alone (``models.last``).
    """

    name: str
    states: Callable[..., States]
    attention: str | None
    published: str
    reason: str = ""
    longest: int | None = None
    whole: str | None = "not tried"


def choose_route(model: PreTrainedModel, decoder: str, longest: int | None = None) -> Route:
    """The first route of the ladder that is proven for ``model``; ``decoder`` is the submodule's name.

    longest: tokens that a document may have, None for any number.
    Raises UserError where not even one document at a time is computed rightly.
    """
    published = model.config._attn_implementation or "eager"
    flat = Route("flat", _flat, ATTENTION, published, longest=longest)
    reason = disproof(model, decoder, flat)
    if reason is None:
        off = None if is_on("narrow_last_layer") else "turned off by TRUETUNE_OFF"
        return replace(flat, whole=off or narrow_disproof(model, decoder, flat))
    alone = Route("alone", _alone, None, published, reason, longest, "documents run one at a time")
    fault = disproof(model, decoder, alone)
    if fault is None:
        return alone
    advice, begins = "choose another model", scaling_begins(model.config)
    if begins and (longest is None or longest > begins):
        within = replace(alone, longest=begins)
        advice = advice if disproof(model, decoder, within) else f"set data.max_length to {begins}, or {advice}"
    raise UserError(
        f"{type(model).__name__} can't be trained here, not even one document at a time ({fault}); {advice}"
    )


def disproof(model: PreTrainedModel, decoder: str, route: Route) -> str | None:
    """Why ``route`` is not right for models like ``model``, or None when it is."""
    return _disproof(model, decoder, route, _ragged(), route.states, "packed" if route.attention else "other")


def sharing_disproof(model: PreTrainedModel, decoder: str, route: Route) -> str | None:
    """Why documents that begin alike must not share rows in training, or None where they may."""
    if route.attention is None:
        return "documents run one at a time"
    one, other = np.random.default_rng(0).integers(3, 60, (2, SHORTEST + 19), dtype=np.int32)
    deep, whole = SHORTEST + 7, SHORTEST + 12
    tokens = [one, one[:whole], np.append(one[:deep], other[:3]), np.append(one[: SHORTEST + 1], other), other[:9], one]
    order = (1, 0, 5, 2, 3, 4)  # a whole prefix, the same twice, and three that leave it earlier and earlier
    documents = [Document(tokens[i], np.arange(len(tokens[i])) > 0) for i in order]
    shared = Batch.of(documents, shares=True)
    assert shared.shared is not None and len(set(shared.shared.rows)) < len(shared.shared.rows)
    rows = torch.from_numpy(shared.shared.rows)

    def states(decoder: nn.Module, _batch: Batch, router: bool = False) -> States:
        return States(route.states(decoder.train(), shared, router).hidden[rows])  # as in training, with its dropout

    return _disproof(model, decoder, route, Batch.of(documents), states, "shared beginnings of")


def narrow_disproof(model: PreTrainedModel, decoder: str, route: Route) -> str | None:
    """Why the last layer must not be computed for the rows alone that are read, or None where it may."""
    documents = [Document(np.arange(n, dtype=np.int32) % 57 + 3, np.zeros(n, dtype=bool)) for n in (9, 5, 12, 4)]
    batch = Batch.of(documents)
    rows = torch.tensor([1, 2, 8, 14, 16, 17, 18, 22, 25, 26, 27, 28, 29])  # of one document none, of one all

    def chosen(hidden: Tensor) -> States:
        return States(torch.zeros(len(batch.tokens), hidden.shape[1]).index_copy(0, rows, hidden))

    def truth(decoder: nn.Module, batch: Batch) -> States:
        return chosen(_backwards(decoder, batch).hidden[rows])

    def states(decoder: nn.Module, batch: Batch) -> States:
        narrow(decoder)
        return chosen(route.states(decoder, batch, rows=rows).hidden)

    return _disproof(model, decoder, route, batch, states, "unread rows of", truth)


def recompute_disproof(model: PreTrainedModel, decoder: str, route: Route) -> str | None:
    """Why layers must not be computed again in the backward pass, or None where they may."""

    def states(decoder: nn.Module, batch: Batch, router: bool = False) -> States:
        layers = recomputable(decoder)
        set_recomputed(layers, len(layers) - 1)
        return route.states(decoder, batch, router)

    return _disproof(model, decoder, route, _ragged(), states, "recomputed layers of")


def _ragged() -> Batch:
    lengths = (7, 1, 13, 10, 4)
    tokens = torch.randint(3, 60, (sum(lengths),), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Batch.of([Document(part.numpy(), np.zeros(len(part), dtype=bool)) for part in tokens.split(lengths)])


def _disproof(
    model: PreTrainedModel,
    decoder: str,
    route: Route,
    batch: Batch,
    states: Callable[..., States],
    what: str,
    alone: Callable[..., States] = _backwards,
) -> str | None:
    """How ``states`` of a small copy differ from those of the documents alone, or None."""
    begins = scaling_begins(model.config)
    cross = route.longest is None or begins is None or route.longest > begins
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        try:
            small = small_copy(model, cross=cross)
            small.set_attn_implementation("eager")
            truth = _observe(small, decoder, alone, batch)
            small.set_attn_implementation(route.attention or "eager")
            got = _observe(small, decoder, states, batch)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
            # Any failure to make the proof is a reason to take the slower route, and is shown to the user.
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    # A key's bias has no gradient but rounding noise, so no tensor is measured by less than the rest show.
    floor = 1e-2 * max(float(value.abs().max()) for value in truth.values())
    for name, value in truth.items():
        scale = max(float(value.abs().max()), floor)
        difference = float((got[name] - value).abs().max()) / scale if name in got else float("inf")
        if not difference <= TOLERANCE:
            return f"{what} documents change {name} by {difference:.1e}"
    return None


def _observe(model: PreTrainedModel, decoder: str, states: Callable[..., States], batch: Batch) -> dict[str, Tensor]:
    """Hidden states, and the gradient of every parameter for a fixed random readout of them."""
    model.zero_grad()
    state = states(model.get_submodule(decoder), batch).hidden
    generator = torch.Generator().manual_seed(1)
    (state * torch.randn(state.shape, generator=generator)).sum().backward()
    seen = {"hidden states": state.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            seen[f"the gradient of {name}"] = p.grad.clone()
    return seen
