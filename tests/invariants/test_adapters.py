"""Every way to adapt: starts as the base, computes as PEFT does, in loss and gradient, and leaves what it should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import random_documents, tiny, wrap

from truetune.checks.preflight import GRADIENT_BOUND, distance
from truetune.errors import UserError
from truetune.models.export import live_logits
from truetune.objectives.next_token import NextToken
from truetune.promises.gradients import measure, plain

SHORT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"targets": ".*"}),
    ("qwen2", {"targets": ".*", "init": "pissa", "rslora": True}),
    ("gemma2", {"targets": ["lm_head", "q_proj"]}),
    ("qwen2", {"also": ["embeddings", "norms"], "dora": True}),
    ("gpt2", {"also": ["norms", "wpe"], "init": "pissa"}),
]
LATTICE: list[tuple[str, dict[str, Any]]] = [
    (family, {"targets": targets, "also": also} | start)
    for family in ("llama", "qwen2", "gemma2", "mistral")
    for targets in ("all-linear", ".*", ".*(q|v)_proj")
    for also in ([], ["norms"], ["embeddings"])
    for start in ({}, {"init": "pissa"}, {"dora": True})
    if not (targets == ".*" and (start == {"dora": True} or (also == ["embeddings"] and family in ("qwen2", "gemma2"))))
]
CASES = [*SHORT, *(pytest.param(*case, marks=pytest.mark.proof) for case in LATTICE)]
DOCUMENTS = random_documents(3)
PROBE = [d.tokens.tolist() for d in DOCUMENTS]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_it_starts_as_the_base_and_computes_as_peft_does(family: str, options: dict[str, Any], bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = tiny(family).to(dtype)
    untouched = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = wrap(copy.deepcopy(base), True, dtype, **options).eval()
    with torch.no_grad():
        truth = torch.cat([copy.deepcopy(base).float()(input_ids=torch.tensor([ids])).logits[0] for ids in PROBE])
    assert (live_logits(model, PROBE) - truth).abs().max() < 1e-5  # the start is exact, in a bf16 base too
    with torch.no_grad():
        for p in model.trainable().values():
            assert p.dtype == torch.float32
            p.add_(torch.randn_like(p) * 0.05)
    assert (live_logits(model, PROBE) - truth).abs().max() > 0.1
    ours, theirs = measure(model, NextToken(), [DOCUMENTS]), plain(model, DOCUMENTS)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2 if bf16 else 1e-5)
    assert distance(ours[1], theirs[1]) < (GRADIENT_BOUND[dtype] if bf16 else 1e-5)
    assert all(g is not None and g.any() for g in ours[1])
    kept = {n.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p
            for n, p in model.model.named_parameters() if not p.requires_grad}  # fmt: skip
    for name, p in untouched.items():
        assert torch.equal(kept[name].to(p.dtype), p), name


def test_embeddings_and_a_tied_head_are_trained_as_one() -> None:
    model = wrap(tiny("qwen2"), True, also="head")
    assert model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight
    assert sum("modules_to_save" in n for n in model.trainable()) == 1
    with pytest.raises(UserError, match="as the one tensor that they are; drop them"):
        wrap(tiny("gpt2"), True, also="embeddings")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"also": "nroms"}, "adapter.also names 'nroms', which is no module with weights here; use embeddings"),
        ({"also": "(x"}, "is no regular expression .*; correct it"),
        ({"also": ["mlp", "down_proj"]}, "which is within .*; name one of them"),
        ({"also": ["q_proj"], "targets": ["q_proj"]}, "adapter.targets and adapter.also both name .*q_proj; choose"),
        ({"also": ["embeddings"], "targets": ["lm_head"]}, "both name lm_head"),
        ({"dora": True, "targets": ".*"}, "adapter.dora can't adapt the output layer lm_head; leave it out"),
        ({"init": "pissa", "rank": 17}, "needs weights of that rank; set adapter.rank=16"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        wrap(tiny("qwen2"), True, **options)


def test_all_linear_leaves_out_what_is_trained_in_full() -> None:
    trained = wrap(tiny("llama"), True, also=["down_proj"]).trainable()
    assert {n.rpartition("down_proj.")[2] for n in trained if "down_proj" in n} == {"modules_to_save.default.weight"}
