"""The function that turns queries and keys is replaced only where it is the usual one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as usual

from truetune.kernels.native.build import kernels
from truetune.models.rotary import _equal, forward_with_rotary

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

CPU = torch.device("cpu")


def inputs(width: int, dtype: torch.dtype, tokens: int = 37, size: int = 24) -> list[Tensor]:
    """Queries, keys and tables whose halves differ."""
    heads = [torch.randn(1, n, tokens, size).to(dtype).requires_grad_() for n in (3, 1)]
    return [*heads, *(torch.randn(1, tokens, width) for _ in range(2))]


def outcome(turn: Any, given: list[Tensor]) -> list[Tensor]:
    turned = turn(*given)
    readouts = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in turned]
    total = sum((x.to(r) * r.to(x.dtype)).sum() for x, r in zip(turned, readouts, strict=True))
    return [*(x.detach() for x in turned), *torch.autograd.grad(total, given[:2])]


@pytest.mark.parametrize(("theirs", "width"), [(usual, 24), (partial, 24), (partial, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_turns_as_theirs_does(theirs: Any, width: int, dtype: torch.dtype, no_worse: Any) -> None:
    torch.manual_seed(0)
    given = inputs(width, dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    ours = _equal(theirs)
    assert ours is not None
    names = ("q", "k", "dq", "dk")
    found = zip(names, outcome(ours, given), outcome(theirs, given), outcome(theirs, exact), strict=True)
    for name, mine, plain, truth in found:
        no_worse(name, mine, plain, truth, dtype)


@pytest.mark.parametrize(
    "other",
    [
        interleaved,
        lambda q, k, cos, sin: usual(q, k, cos, -sin),
        lambda q, k, cos, sin: usual(q, k, cos[..., : cos.shape[-1] // 2].repeat(1, 1, 2), sin),
        lambda q, k, cos, sin: (usual(q, k, cos, sin)[0], k),
        lambda q, k, cos, sin: torch.cat(usual(q, k, cos, sin), 1),
        None,
    ],
)
def test_another_function_stays(other: Any) -> None:
    assert _equal(other) is None


def test_what_the_kernel_does_not_take_goes_to_theirs() -> None:
    called = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        called.append(len(args) + len(kwargs))
        return usual(*args, **kwargs)

    ours = _equal(noted)
    assert ours is not None
    called.clear()
    q, k, cos, sin = (x.detach() for x in inputs(24, torch.float32))
    ours(q, k, cos, sin)
    assert not called
    ours(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    ours(q.double(), k.double(), cos, sin)
    ours(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin)
    assert called == [5, 4, 4]


def test_only_layers_that_turn() -> None:
    assert forward_with_rotary(LlamaAttention, CPU) is not None
    assert forward_with_rotary(nn.Linear, CPU) is None

    class Wrapped(LlamaAttention):
        @functools.wraps(LlamaAttention.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert forward_with_rotary(Wrapped, CPU) is None


def test_the_authors_module_is_untouched() -> None:
    model = tiny("llama")
    forward_with_rotary(LlamaAttention, CPU)
    assert LlamaAttention.forward.__globals__["apply_rotary_pos_emb"] is usual
    assert type(model.model.layers[0].self_attn) is LlamaAttention
