"""Prefixes that documents share are computed once, and nothing is learned that the documents alone would not teach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCABULARY
from folders import chats, facts, invoke, keys, records, write_rows
from tiny import random_documents, tiny, tiny_trainer, wrap

from truetune.assembly import why_unshared
from truetune.checks.preflight import shared_prefix
from truetune.data.batch import IGNORE, Batch, Document
from truetune.data.prefixes import packed_by_prefix
from truetune.kernels.attention import packed_attention
from truetune.models import route as routes
from truetune.models.router import Router
from truetune.objectives.next_token import NextToken
from truetune.promises import rows as promised
from truetune.training.gradient import accumulate

DROPOUT = {"resid_pdrop": 0.1}


def tree(weigh: bool = False, seed: int = 0) -> list[Document]:
    """A tree three deep, a document that is a whole prefix of others, the same twice, two that share too little, and
    strangers; with targets of their own on what they share, and weights that add up exactly."""
    generator = np.random.default_rng(seed)

    def some(n: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, n).astype(np.int32)

    root, left, right = some(21), some(9), some(7)
    leaves = [[root, left, some(6)], [root, left, some(11)], [root, right, some(3)], [root, right, some(8)]]
    leaves += [[root, left], [root, some(5)], leaves[1], [root[:12], some(4)], [some(14)], [some(40)]]
    documents = []
    for row, parts in enumerate(leaves):
        tokens = np.concatenate(parts)
        targets = generator.random(len(tokens)) < 0.4
        targets[0], targets[-1] = False, True
        weights = generator.integers(1, 9, len(tokens)).astype(np.float32) / 8
        documents.append(Document(tokens, targets, row, weights=weights if weigh and row % 3 else None))
    return documents


def packed(documents: list[Document], capacity: int = 10_000) -> list[Batch]:
    packs = packed_by_prefix(documents, capacity)
    assert packs is not None and sorted(i for pack in packs for i in pack) == list(range(len(documents)))
    return [Batch.of([documents[i] for i in pack], shares=True) for pack in packs]


def learned(model, batches):
    model.zero_grad()
    loss = float(accumulate(model, NextToken(), batches))
    return loss, torch.cat([p.grad.flatten() for p in model.trainable().values()])


def distance(model, documents: list[Document], batches: list[Batch]) -> tuple[float, float]:
    """Of loss and gradient of the batches, from those of the documents one by one; relative."""
    truth, gradient = learned(model, [Batch.of([d]) for d in documents])
    loss, ours = learned(model, batches)
    return abs(loss / truth - 1), float((ours - gradient).norm() / gradient.norm())


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_loss_and_gradient_are_those_of_the_documents_alone(family, lora, weigh):
    """In float64; the window of mistral is shorter than the prefix."""
    model = wrap(tiny(family), lora)
    for p in model.trainable().values():  # LoRA's B, which begins at 0, would hide A
        p.data += 0.05 * torch.randn_like(p)
    model.model.double()
    documents = tree(weigh)
    (batch,) = packed(documents)
    assert batch.shared and len(batch.tokens) < 0.5 * batch.token_count == 0.5 * sum(map(len, documents))
    assert max(distance(model, documents, [batch])) < 1e-10
    assert max(distance(model, documents, packed(documents, 80))) < 1e-10


@pytest.mark.parametrize("off", ["", "native_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_with_each_kernel(family, dtype, off, monkeypatch):
    monkeypatch.setenv("TRUETUNE_OFF", off)
    model = wrap(tiny(family), True, dtype)
    documents = tree()
    bound = 1e-5 if dtype == torch.float32 else 0.03
    assert max(distance(model, documents, packed(documents))) < bound


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_what_attention_must_not_forget_is_seen(family, monkeypatch):
    """The same without the shared keys, with positions that restart, and with weights lost, is far outside."""
    model = wrap(tiny(family))
    documents = tree()
    (batch,) = packed(documents)
    assert max(distance(model, documents, [batch])) < 1e-5
    for broken in (
        replace(batch, shared=None),
        replace(batch, positions=torch.cat([torch.arange(n) for n in batch.lengths])),
        replace(batch, weights=None),
    ):
        assert max(distance(model, documents, [broken])) > 1e-3


def test_a_batch_counts_what_its_documents_hold():
    documents = tree()
    (batch,) = packed(documents)
    wanted = np.sort(np.concatenate([d.tokens[d.targets] for d in documents]))
    assert batch.targets.sort().values.tolist() == wanted.tolist()
    assert NextToken().count(batch) == len(wanted) > int((batch.labels != IGNORE).sum())
    assert batch.token_count == sum(map(len, documents)) and sum(batch.lengths) == len(batch.tokens)
    assert len(batch.lengths) == len(documents) and 0 in batch.lengths  # one is there twice
    ends = np.cumsum(batch.shared.lengths)[:-1]
    whole = [batch.tokens[rows].tolist() for rows in np.split(batch.shared.rows, ends)]
    assert sorted(whole) == sorted(d.tokens.tolist() for d in documents)
    places = [batch.positions[rows].tolist() for rows in np.split(batch.shared.rows, ends)]
    assert places == [list(range(n)) for n in batch.shared.lengths]


def test_a_step_learns_and_counts_the_same(monkeypatch):
    """One step of a trainer with and without: the same record, but for what was computed."""
    documents = [replace(d, row=i) for i, d in enumerate(tree(True) + random_documents(3))]
    whole = sum(map(len, documents))
    steps = []
    for shares in (False, True):
        model = wrap(tiny("llama"), True)
        trainer = tiny_trainer(model, documents, tokens_per_step=whole, tokens_per_micro_batch=120, shares=shares)
        assert all(len(b.tokens) <= 120 for b in trainer.batches(0))
        steps.append(next(r for r in trainer.steps() if r.kind == "step"))
        faults: list[str] = []
        assert promised._labels(trainer, faults) == (1, sum(d.target_count for d in documents)) and not faults
    apart, shared = steps
    assert shared.loss == pytest.approx(apart.loss, rel=1e-6)
    assert shared.gradient_norm == pytest.approx(apart.gradient_norm, rel=1e-5)
    for name in ("tokens", "targets", "documents"):
        assert getattr(shared, name) == getattr(apart, name)
    assert apart.tokens_once == apart.tokens == whole and apart.targets_once == apart.targets
    assert shared.tokens_once < 0.7 * whole and shared.targets_once < shared.targets
    assert shared.micro_batches < apart.micro_batches
    assert shared.tokens_per_second == pytest.approx(shared.tokens_once / shared.seconds)


# Where it is not done.


def test_what_the_proof_refuses():
    for model, decoder in ((tiny("gpt2", **DROPOUT), "transformer"), (tiny("llama", attention_dropout=0.1), "model")):
        route = routes.choose_route(model, decoder)
        assert route.name == "flat"
        reason = routes.sharing_disproof(model, decoder, route)
        assert reason and reason.startswith("shared beginnings of documents change hidden states")
    for family in ("llama", "mistral", "gemma2", "gpt2"):
        model = tiny(family)
        decoder = "transformer" if family == "gpt2" else "model"
        assert routes.sharing_disproof(model, decoder, routes.choose_route(model, decoder)) is None
    alone = wrap(tiny("falcon alibi"))
    assert why_unshared(alone, None) == "documents run one at a time"


@pytest.mark.parametrize("lost", ["key_lengths", "window"])
def test_the_proof_refuses_broken_attention(lost, monkeypatch):
    """Of documents that are alone nothing is lost, so the route itself stays proven."""

    def broken(q, k, v, lengths, **options):
        every = options["key_lengths"]
        if every and lost == "window":
            options["window"] = None
        elif every:  # each query at the place among the keys that it would have without a prefix
            firsts = np.cumsum(every) - every
            rows = np.concatenate([np.arange(s, s + n) for s, n in zip(firsts, lengths, strict=True)])
            k, v, options["key_lengths"] = k[:, rows], v[:, rows], None
        return packed_attention(q, k, v, lengths, **options)

    model = tiny("mistral")
    route = routes.choose_route(model, "model")
    monkeypatch.setattr(routes, "packed_attention", broken)
    assert routes.disproof(model, "model", route) is None
    assert "shared beginnings of documents change" in (routes.sharing_disproof(model, "model", route) or "")


def test_it_is_left_out_where_documents_must_stay_apart(monkeypatch):
    assert why_unshared(wrap(tiny("llama"), True), None) is None
    assert "dropout" in why_unshared(wrap(tiny("llama"), True, dropout=0.1), None)
    assert "router" in why_unshared(wrap(tiny("mixtral")), Router(2, 0.01))
    monkeypatch.setenv("TRUETUNE_OFF", "shared_prefixes")
    assert "TRUETUNE_OFF" in why_unshared(wrap(tiny("llama"), True), None)


def test_what_shares_no_rows_refuses_a_batch_that_does():
    (batch,) = packed(tree())
    with pytest.raises(ValueError, match="share no rows"):
        wrap(tiny("falcon alibi"))(batch)
    with pytest.raises(ValueError, match="share no rows"):
        NextToken(Router(2, 0.01))(wrap(tiny("mixtral")), batch)


def test_the_preflight_sees_a_prefix_that_is_forgotten(monkeypatch):
    def unseen(q, k, v, lengths, **options):
        if every := options.pop("key_lengths"):
            k, v = (x.split(every, 1) for x in (k, v))
            k, v = (torch.cat([p[:, -n:] for p, n in zip(x, lengths, strict=True)], 1) for x in (k, v))
        return packed_attention(q, k, v, lengths, **options)

    trainer = tiny_trainer(
        wrap(tiny("llama"), True), tree(), tokens_per_step=250, tokens_per_micro_batch=250, shares=True
    )
    assert all(v.passed for v in shared_prefix(trainer.model, trainer))
    monkeypatch.setattr(routes, "packed_attention", unseen)
    assert [v.passed for v in shared_prefix(trainer.model, trainer)] == [False, False]


def test_a_run_shares_by_itself_and_tells_it(my_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with one system prompt, through the command; and the same run with sharing turned off."""
    system = {"role": "system", "content": "You answer in whole sentences, briefly, and never more than you know."}
    data = write_rows(tmp_path / "data.jsonl", [{"messages": [system, *row["messages"]]} for row in chats(40)])
    wide = ("data.max_length=256", "train.tokens_per_step=600", "train.tokens_per_micro_batch=400")
    results, steps = [], []
    for off in ("", "shared_prefixes"):
        monkeypatch.setenv("TRUETUNE_OFF", off)
        folder = tmp_path / f"out{off}"
        assert invoke("train", *keys(my_model, data, folder, *wide, "output.merged=false")).exit_code == 0
        told = facts(folder)
        names = {verdict["name"] for verdict in told["verdicts"] if verdict["passed"]}
        assert ("shared prefixes do not change the gradient" in names) == (not off)
        assert (told["model"]["unshared"] is None) == (not off)
        results.append(told["result"])
        steps.append([r for r in records(folder) if r["kind"] == "step"])
    shared, apart = results
    assert (shared["tokens"], shared["targets"]) == (apart["tokens"], apart["targets"])
    assert apart["tokens_once"] == apart["tokens"] > 1.3 * shared["tokens_once"]
    assert shared["tokens_once"] == sum(s["tokens_once"] for s in steps[0])
    assert shared["tokens_per_second"] == pytest.approx(shared["tokens_once"] / shared["seconds"])
    for ours, theirs in zip(*steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ("shared prefixes once" in (tmp_path / "out/report.html").read_text()) is True
    assert ("shared prefixes once" in (tmp_path / "outshared_prefixes/report.html").read_text()) is False
