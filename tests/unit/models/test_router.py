"""The router loss is the family's own of each document, is part of what is trained, and is reported beside the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import facts, invoke, keys, records, write_model
from tiny import random_documents, tiny, tiny_trainer, wrap

from truetune.checks.preflight import parity, probe_documents
from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.models import router as routers
from truetune.models.router import Router, choose_router, load_balance
from truetune.objectives.next_token import NextToken

BALANCED = pytest.mark.parametrize("family", ["mixtral balanced", "qwen3-moe balanced"])


@BALANCED
def test_it_is_measured(family: str) -> None:
    model = wrap(tiny(family))
    assert choose_router(model) == Router(chosen=2, coefficient=0.1)
    assert choose_router(model, 0.5) == Router(chosen=2, coefficient=0.5)
    assert choose_router(model, 0.0) is None


def test_it_is_off_where_the_config_has_it_off() -> None:
    model = wrap(tiny("mixtral"))
    assert choose_router(model) is None
    assert choose_router(model, 0.5) == Router(chosen=2, coefficient=0.5)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3"])
def test_a_model_without_one_is_refused_by_one_sentence(family: str) -> None:
    model = wrap(tiny(family))
    assert choose_router(model) is None
    with pytest.raises(UserError, match=r"has no router loss; remove train\.router_loss"):
        choose_router(model, 0.0)


def test_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny("mixtral balanced"))
    monkeypatch.setattr(routers, "load_balance", lambda *a: 3 * load_balance(*a))
    with pytest.raises(UserError, match=r"of another kind .*; set train\.router_loss=0 to train without it"):
        choose_router(model)


@BALANCED
def test_it_is_the_familys_own_of_each_document(family: str) -> None:
    model = wrap(tiny(family))
    documents = random_documents(5)
    with torch.no_grad(), model.as_published("eager") as hf:
        theirs = [hf(input_ids=torch.tensor(d.tokens[None].astype("int64"))).aux_loss for d in documents]
    batch = Batch.of(documents)
    ours = load_balance(model.states(batch, router=True).router, batch.lengths, 2)
    assert torch.allclose(ours, torch.stack(theirs), rtol=1e-5)
    router = choose_router(model)
    assert router
    expected = sum(0.1 * float(a) * d.target_count for a, d in zip(theirs, documents, strict=True))
    terms = NextToken(router)(model, batch)
    assert float(terms.router) == pytest.approx(expected, rel=1e-5)
    assert float(terms.total) == pytest.approx(float(terms.losses.sum()) + expected, rel=1e-5)


def test_a_balanced_router_gives_the_number_of_chosen_experts() -> None:
    rows = torch.eye(4).repeat(2, 1) * 1e-3
    assert float(load_balance([rows], (8,), 1)[0]) == pytest.approx(1.0, abs=1e-3)
    assert float(load_balance([torch.tensor([[9.0, 0, 0, 0]] * 8)], (8,), 1)[0]) == pytest.approx(4.0, abs=1e-2)


def test_the_preflight_misses_one_that_is_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(wrap(tiny("mixtral balanced")), random_documents(20))
    documents = probe_documents(trainer)
    verdicts = parity(trainer.model, trainer, documents)
    assert [v.name for v in verdicts if v.passed] == [
        "loss equals plain Hugging Face",
        "router loss equals plain Hugging Face",
    ]
    trainer.objective.router = Router(chosen=1, coefficient=0.1)
    assert [v.name for v in parity(trainer.model, trainer, documents) if not v.passed] == [
        "router loss equals plain Hugging Face"
    ]


def test_weights_weigh_it_in_the_preflight_too() -> None:
    documents = [replace(d, weights=np.where(d.targets, 0.5 + d.row % 3, 0).astype("f4")) for d in random_documents(20)]
    trainer = tiny_trainer(wrap(tiny("mixtral balanced")), documents)
    assert [v.name for v in parity(trainer.model, trainer, probe_documents(trainer)) if not v.passed] == []


def test_a_run_reports_it_beside_the_loss(tmp_path: Path, my_data: Path) -> None:
    model = write_model(tmp_path / "model", "mixtral")
    for folder, more in (("off", []), ("on", ["train.router_loss=0.5"])):
        result = invoke("train", *keys(model, my_data, tmp_path / folder, "train.steps=2", *more))
        assert result.exit_code == 0, result.output
        assert "the experts (" in result.stdout
        assert ("train.router_loss sets one" in result.stdout) == (folder == "off")
        assert facts(tmp_path / folder)["model"]["notes"]
    off, on = ([r for r in records(tmp_path / f) if r["kind"] == "step"] for f in ("off", "on"))
    assert off[0]["router_loss"] is None
    assert on[0]["router_loss"] >= 0.9
    assert on[0]["loss"] == pytest.approx(off[0]["loss"], rel=1e-5)
    assert on[0]["gradient_norm"] != pytest.approx(off[0]["gradient_norm"], rel=1e-3)
