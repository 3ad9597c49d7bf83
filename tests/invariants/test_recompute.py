"""Layers computed again in the backward pass: the same gradients bit for bit, from less that is kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import equal, facts, invoke, keep_jobs, keys, records, weights
from tiny import random_documents, tiny, wrap
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.models import recompute
from truetune.models.swap import subclass
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken

LAYERS = 4
WAYS = pytest.mark.parametrize(
    ("lora", "options"), [(False, {}), (True, {}), (True, {"dropout": 0.3})], ids=["full", "lora", "dropout"]
)


def deep(family: str) -> Any:
    if family == "gemma2":  # its kinds of layers alternate, which a list of them says
        return tiny(family, num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 2)
    return tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": LAYERS})


def gradients(model: CausalLM, batch: Batch) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    terms = NextToken()(model, batch)
    terms.total.backward()
    found = {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}
    return found | {"loss": terms.total.detach()}


def count_calls(model: CausalLM) -> list[int]:
    """Numbers of layers as their feed-forward parts are called."""
    calls: list[int] = []
    for i, layer in enumerate(recompute.stack(model.hf.get_submodule(model.tail.decoder))):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    return calls


def kept_by(model: CausalLM, batch: Batch) -> int:
    """Bytes of distinct storages that the graph of a batch holds, and the inputs that recomputed layers hold."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    alive: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return alive[-1]

    layers = recompute.stack(model.hf.get_submodule(model.tail.decoder))

    def enter(_: nn.Module, args: Any) -> None:
        hold(args[0])

    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t), model.autocast():
        model.hidden(batch)
    for hook in hooks:
        hook.remove()
    return sum(held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@WAYS
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon alibi"])
def test_gradients_are_the_same_bit_for_bit(
    family: str, lora: bool, options: dict[str, float], dtype: torch.dtype
) -> None:
    model = wrap(deep(family), lora, dtype, **options)
    batch = Batch.of(random_documents(5, seed=3))
    truth = gradients(model, batch)
    budget = model.keep_within(1 << 40)
    calls = count_calls(model)
    documents = 1 if model.route.attention else len(batch.lengths)
    for count, need in enumerate(budget.needs(batch.lengths)):
        budget.limit = need
        calls.clear()
        found = gradients(model, batch)
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth)
        assert len({i for i in range(LAYERS) if calls.count(i) == 2 * documents} - {LAYERS - 1}) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@WAYS
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon alibi"])
def test_what_is_kept_is_within_the_budget_and_near_it(
    family: str, lora: bool, options: dict[str, float], dtype: torch.dtype
) -> None:
    model = wrap(deep(family), lora, dtype, **options)
    batch = Batch.of(random_documents(9, seed=4, longest=120))
    everything = kept_by(model, batch)
    model.eval()
    budget = model.keep_within(1 << 40)
    assert not model.training
    needs = budget.needs(batch.lengths)
    behind = 2 * 4 * 32 * len(batch.tokens)  # what the last norm keeps
    spare = 0 if model.route.attention else 0.15 * everything  # weights that autocast casts once for all documents
    assert everything - behind <= needs[0] <= everything + spare
    kept = []
    for need in needs:
        budget.limit = need
        kept.append(kept_by(model, batch))
        assert kept[-1] <= need + behind
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.5 * everything


def test_no_more_layers_than_the_budget_asks_for() -> None:
    model = wrap(deep("llama"), lora=True)
    budget = model.keep_within(1 << 40)
    short, long = (8,), (8, 90, 90, 90)
    needs = budget.needs(long)
    assert needs == sorted(needs, reverse=True) and len(needs) == LAYERS
    budget.limit = needs[1]
    assert (budget.recomputed(long), budget.recomputed(short)) == (1, 0)
    budget.limit -= 1
    assert budget.recomputed(long) == 2
    budget.limit = 1
    assert budget.recomputed(long) == LAYERS - 1  # as near as can be


def test_a_layer_computed_again_needs_room_of_its_own() -> None:
    """Coefficients of n alone: three layers that make 10, 60 and 10 bytes a token and are called with 1."""
    own, handed = torch.zeros(3, 3).numpy(), torch.zeros(3, 3).numpy()
    own[1], handed[1] = (10, 60, 10), (1, 1, 1)
    budget = recompute.Budget(nn.ModuleList(nn.Identity() for _ in range(3)), 0, own, handed, by_document=False)
    assert budget.needs([2]) == [2 * 83, 2 * 73, 2 * 62]


@pytest.mark.parametrize("by_document", [False, True])
def test_what_grows_with_the_square_is_of_each_document(by_document: bool) -> None:
    own, handed = torch.zeros(3, 1).numpy(), torch.zeros(3, 1).numpy()
    own[:, 0] = 100, 10, 1
    budget = recompute.Budget(nn.ModuleList([nn.Identity()]), 0, own, handed, by_document)
    assert budget.needs([3, 4]) == [100 * (1 + by_document) + 70 + 25]


def test_scores_that_attention_keeps_are_measured() -> None:
    """A model whose documents run alone through eager attention keeps scores, whose size is the length squared."""
    plain = deep("falcon alibi")
    plain.set_attn_implementation("eager")
    model = wrap(plain)
    batch = Batch.of(random_documents(2, seed=4, longest=120))
    everything = kept_by(model, batch)
    need = model.keep_within(1 << 40).needs(batch.lengths)[0]
    scores = sum(4 * 4 * n * n for n in batch.lengths)  # of a layer: 4 heads, fp32
    assert LAYERS * scores > everything / 4
    assert 0.95 * everything < need < 1.15 * everything


def test_a_class_made_twice_is_its_authors() -> None:
    once = subclass(nn.Identity, lambda self, x: x + 1)
    assert subclass(once, lambda self, x: x + 2).plain is nn.Identity  # type: ignore[attr-defined]


def test_layers_come_as_they_were_published() -> None:
    model = wrap(deep("llama"))
    batch = Batch.of(random_documents(3))
    truth = gradients(model, batch)
    model.keep_within(1)
    layers = recompute.stack(model.hf.get_submodule(model.tail.decoder))
    calls = count_calls(model)
    with model.as_published() as hf:
        assert {type(layer).__module__ for layer in layers} == {"transformers.models.llama.modeling_llama"}
        hf(batch.tokens[None]).logits.sum().backward()
    assert calls == list(range(LAYERS))
    calls.clear()
    with torch.no_grad():
        model.hidden(batch)
    assert calls == list(range(LAYERS))
    assert all(torch.equal(g, truth[name]) for name, g in gradients(model, batch).items())


def test_a_model_whose_layers_differ_the_second_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(deep("llama"))
    plain = LlamaMLP.forward

    def other(self: LlamaMLP, x: Tensor) -> Tensor:
        backward = torch._C._current_graph_task_id() != -1
        return plain(self, x * (1.1 if backward else 1.0))

    monkeypatch.setattr(LlamaMLP, "forward", other)
    with pytest.raises(UserError, match=r"^train.activation_memory means nothing for LlamaForCausalLM.*; remove it$"):
        model.keep_within(1)


@pytest.mark.parametrize("method", [(), ("adapter.dropout=0.2",), ("adapter.method=full",)])
def test_a_run_within_a_budget_is_the_same_run(
    method: tuple[str, ...], my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = keep_jobs(monkeypatch)
    for name, more in (("all", ()), ("few", ("train.activation_memory=0.00001",))):
        result = invoke("train", *keys(my_model, my_data, tmp_path / name, *method, *more))
        assert result.exit_code == 0, result.output
    losses = [[r["loss"] for r in records(tmp_path / n) if r["kind"] == "step"] for n in ("all", "few")]
    assert losses[0] == losses[1] and equal(*map(weights, jobs))
    assert facts(tmp_path / "all")["model"]["backward"] is None
    told = facts(tmp_path / "few")["model"]["backward"]
    assert told["recomputed"] == told["layers"] - 1 and told["tokens"] == 128
    assert "layers are computed again in the backward pass of a micro-batch of up to 128 tokens" in result.output


def test_the_budget_that_would_do_is_named(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    def notes(folder: str, memory: str) -> tuple[dict[str, int], str]:
        few = keys(my_model, my_data, tmp_path / folder, f"train.activation_memory={memory}", "train.steps=1")
        result = invoke("train", *few, "evaluation.samples=0", "output.merged=false")
        assert result.exit_code == 0, result.output
        return facts(tmp_path / folder)["model"]["backward"], " ".join(result.output.split())

    told, output = notes("short", "0.00001")
    assert told["bytes"] > told["limit"] and "more than train.activation_memory" in output
    enough = re.search(r"layers keep ([\d.e-]+) GiB", output)
    assert enough
    told, output = notes("enough", enough[1])
    assert told["bytes"] <= told["limit"] and "more than" not in output
    told, output = notes("plenty", "8")
    assert told["recomputed"] == 0 and "computed again" not in output


@pytest.mark.parametrize("memory", ["0", "-1"])
def test_no_memory_is_refused(memory: str, my_model: Path, my_data: Path, tmp_path: Path) -> None:
    result = invoke("train", *keys(my_model, my_data, tmp_path / "run", f"train.activation_memory={memory}"))
    assert result.exit_code != 0
    assert f"train.activation_memory={memory}" in " ".join(result.output.split())
    assert "must be greater than 0" in " ".join(result.output.split())
