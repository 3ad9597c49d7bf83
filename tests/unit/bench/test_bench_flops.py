"""The operations that a step needs: known totals of known shapes, and what must not be counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig, PreTrainedConfig

from truetune.bench.flops import Cost
from truetune.bench.workloads import RANK, SHAPES, _random_documents
from truetune.data.batch import Document
from truetune.errors import UserError


def config(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**json.loads(SHAPES[name].read_text()))


@pytest.mark.parametrize(
    ("name", "rank", "documents", "per_token"),
    [
        ("small", RANK, 16, 136e6),
        ("small", None, 16, 190e6),
        ("medium", RANK, 4, 1.80e9),
        ("medium", None, 4, 2.60e9),
    ],
)
def test_known_shapes_need_what_was_counted_by_hand(
    name: str, rank: int | None, documents: int, per_token: float
) -> None:
    chosen = _random_documents(4, documents, 1000)
    tokens = sum(map(len, chosen))
    cost = Cost.of(config(name), rank)
    assert replace(cost, unread=(0, 0, 0)).step(chosen) / tokens == pytest.approx(per_token, rel=0.02)
    assert 0.92 < cost.step(chosen) / tokens / per_token < 0.995


def document(tokens: Sequence[int], targets: int = 0) -> Document:
    """The last ``targets`` tokens are targets."""
    return Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= len(tokens) - targets)


def test_each_part_is_counted_once() -> None:
    cost = Cost(layers=100, head=30, low_rank=0, attention=7)
    one, two, three = document([4]), document([4, 5]), document([4, 5, 6])
    assert cost.step([one]) == 6 * 100 + 6 * 7  # forward, gradients of input and weights; one pair, six products
    assert cost.step([document([4, 5], 1)]) - cost.step([two]) == 6 * 30
    frozen = replace(cost, low_rank=10)
    assert frozen.step([document([4, 5], 1)]) == 2 * (4 * 100 + 6 * 10) + 4 * 30 + 3 * 6 * 7
    assert cost.step([three]) - cost.step([one, one, one]) == 6 * 7 * 3  # three more pairs than three documents alone


def test_of_the_last_layer_a_token_without_a_target_needs_keys_and_values() -> None:
    cost = Cost.of(config("small"), RANK)
    idle = replace(cost, unread=(0, 0, 0)).step([document([4, 5, 6], 1)]) - cost.step([document([4, 5, 6], 1)])
    rest = 2 * 384 * 384 + 3 * 384 * 2304  # queries, output, gate, up and down; 384 = 6 heads of 64
    factors = 2 * 16 * (384 + 384) + 3 * 16 * (384 + 2304)
    unread = 2  # tokens 0 and 2; token 1 predicts the target
    assert idle == unread * (4 * rest + 6 * factors) + 6 * (1 + 3) * 2 * 384


def test_a_shared_prefix_is_needed_once() -> None:
    cost = Cost(layers=100, head=30, low_rank=0, attention=0)
    alike = [document([*range(5, 45), last], 1) for last in (1, 2, 3)]
    assert cost.step(alike) == 6 * (39 + 3 * 2) * 100 + 6 * 3 * 30  # the row before a target is each one's own


def test_stacked_experts_are_refused() -> None:
    experts = AutoConfig.for_model("mixtral", hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=64)
    with pytest.raises(UserError, match="not counted here; compare on a dense one"):
        Cost.of(experts, None)
