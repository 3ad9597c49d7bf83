"""muP's rates: which tensors are slower, what that keeps as it was, and where it means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folders import keys, write_model
from tiny import random_documents, tiny, wrap

from truetune.assembly import assemble
from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.objectives.next_token import NextToken
from truetune.optim import adamw, kinds_of, parameter_groups
from truetune.spelling import read
from truetune.training.gradient import accumulate


def test_hidden_matrices_and_the_head_are_slower(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    more = keys(my_model, my_data, tmp_path / "run", "adapter.method=full", "optimizer.mup_width=4")
    trainer = assemble(read(None, more)).trainer
    kinds = kinds_of(trainer.model.model, trainer.model.head.weight)
    width = trainer.model.head.weight.shape[1]
    peaks = {id(p): group["peak"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, p in trainer.model.trainable().items():
        slow = kinds[name] in ("matrices", "head")
        assert peaks[id(p)] == pytest.approx(1e-2 * 4 / width if slow else 1e-2), name
    assert {g["name"] for g in trainer.optimizer.param_groups} == {"weights", "weights_no_decay", "weights_wide"}


def moved(width: int, mup: bool) -> float:
    """Mean change of the hidden states, before the last norm, by one step of AdamW; initial weights are muP's."""
    hf = tiny("llama", hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 8, head_dim=8)
    model = wrap(hf)
    kinds = kinds_of(model.model, model.head.weight)
    with torch.no_grad():
        for name, p in model.trainable().items():
            scale = {"matrices": p.shape[-1] ** -0.5, "head": 1 / width, "embeddings": 1.0, "vectors": 0.0}[kinds[name]]
            p.normal_(float(kinds[name] == "vectors"), scale)
    wide = {name for name, kind in kinds.items() if kind in ("matrices", "head") and mup}
    rate = 1e-2
    optimizer = adamw(parameter_groups(model.trainable().items(), rate, wide=wide, times=width / 32), rate)
    batch = Batch.of(random_documents(4), model.device)
    seen: list[torch.Tensor] = []
    hook = hf.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    for _ in range(2):
        accumulate(model, NextToken(None), [batch])
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    return float((seen[1] - seen[0]).abs().mean())


def test_what_a_step_moves_does_not_hang_on_the_width() -> None:
    with_mup, without = (moved(256, mup) / moved(32, mup) for mup in (True, False))
    assert 0.6 < with_mup < 1.5
    assert without > 2


@pytest.mark.parametrize(
    ("family", "wrong", "sentence"),
    [
        ("llama", ("optimizer.mup_width=4",), "mup_width means nothing with adapter.method=lora"),
        (
            "llama",
            ("adapter.method=full", "optimizer.mup_width=4", "optimizer.name=muon"),
            'optimizer "muon"',
        ),
        ("gpt2", ("adapter.method=full", "optimizer.mup_width=4"), "is for models whose head has a weight of its own"),
    ],
)
def test_where_it_means_nothing_it_is_refused(
    family: str, wrong: tuple[str, ...], sentence: str, my_data: Path, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", family)
    with pytest.raises(UserError, match=sentence):
        assemble(read(None, keys(model, my_data, tmp_path / "run", *wrong)))
