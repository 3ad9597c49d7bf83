"""Packed equals alone: neighbours of other content, length, order and number change nothing of mine."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny import QUICK, random_documents, tiny, wrap

from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.models import route as routes
from truetune.objectives.next_token import NextToken


def mine_in(model, pack, index):
    """Loss and gradient of one document of the pack, the others having no targets."""
    pack = [d if i == index else replace(d, targets=np.zeros_like(d.targets)) for i, d in enumerate(pack)]
    model.zero_grad()
    terms = NextToken()(model, Batch.of(pack))
    terms.total.backward()
    return terms.losses, torch.cat([p.grad.flatten() for p in model.trainable().values() if p.grad is not None])


@pytest.mark.parametrize("family", QUICK)
def test_neighbours_change_nothing(family):
    model = wrap(tiny(family))
    me, a, b, long = *random_documents(3, seed=5, longest=30), random_documents(1, seed=6, longest=90)[0]
    loss, gradient = mine_in(model, [me], 0)
    for pack, index in (([me, a], 0), ([a, me], 1), ([b, long, me, a], 2), ([long, me], 1)):
        other, moved = mine_in(model, pack, index)
        assert torch.allclose(other, loss, rtol=1e-5, atol=1e-6)
        assert (moved - gradient).norm() <= 2e-5 * gradient.norm()


@pytest.mark.parametrize("family", QUICK)
def test_the_pack_is_each_document_under_the_published_model(family):
    model = wrap(tiny(family))
    documents = random_documents(6, seed=7, longest=60)
    batch = Batch.of(documents)
    with torch.no_grad():
        ours = model(batch)
        with model.as_published("eager") as hf:
            decoder = hf.get_submodule(model.tail.decoder)
            alone = [
                decoder(input_ids=t[None], use_cache=False).last_hidden_state[0]
                for t in batch.tokens.split(batch.lengths)
            ]
    assert torch.allclose(ours, torch.cat(alone), rtol=1e-4, atol=1e-5)


def leaky(decoder, batch):
    """The pack as one document: what naive packing does."""
    out = decoder(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=torch.ones_like(batch.tokens[None]),
        use_cache=False,
    )
    return routes.States(out.last_hidden_state[0])


def running_positions(decoder, batch):
    positions = torch.arange(len(batch.tokens))
    return routes._flat(decoder, replace(batch, positions=positions))


def no_window(decoder, batch):
    for module in decoder.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = None
    if hasattr(decoder, "config"):
        decoder.config.sliding_window = None
    return routes._flat(decoder, batch)


def no_soft_cap(decoder, batch):
    """Attention without the soft cap of its scores."""
    real = routes.packed_attention
    with patch.object(routes, "packed_attention", lambda *a, **options: real(*a, **options | {"softcap": None})):
        return routes._flat(decoder, batch)


BROKEN = [
    ("gpt2", running_positions),
    ("phi3 longrope", routes._flat),
    ("llama", leaky),
    ("mistral", no_window),
    ("gemma2", no_soft_cap),
]


@pytest.mark.parametrize(("family", "broken"), BROKEN, ids=lambda part: getattr(part, "__name__", part))
def test_the_proof_refuses_a_broken_route(family, broken):
    model = tiny(family)
    if family == "gemma2":
        model.config.attn_logit_softcapping = 0.5  # as published it caps nothing that a small model computes
    decoder = "transformer" if family == "gpt2" else "model"
    attention = "eager" if broken is leaky else routes.ATTENTION
    wrong = routes.Route("broken", broken, attention, "sdpa")
    right = routes.choose_route(model, decoder)
    assert "packed documents change" in (routes.disproof(model, decoder, wrong) or "")
    assert routes.disproof(model, decoder, right) is None


def test_a_scaling_that_follows_the_longest_document_packs_only_below_it():
    model = tiny("phi3 longrope")
    begins = model.config.original_max_position_embeddings
    assert routes.choose_route(model, "model").name == "alone"
    assert routes.choose_route(model, "model", begins + 1).name == "alone"
    assert routes.choose_route(model, "model", begins).name == "flat"


def test_a_scaling_that_lasts_from_call_to_call_is_refused_where_it_begins():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny("llama", rope_parameters=rope)
    with pytest.raises(UserError, match=r"not even one document at a time .*; set data.max_length to 128, or choose"):
        routes.choose_route(model, "model", 200)
    assert routes.choose_route(model, "model", 128).name == "flat"


def test_the_route_is_chosen_by_proof():
    assert wrap(tiny("llama")).route.name == "flat"
    alone = wrap(tiny("falcon alibi")).route
    assert alone.name == "alone"
    assert alone.reason
