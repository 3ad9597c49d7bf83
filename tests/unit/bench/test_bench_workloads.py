"""What every side is given: steps that weigh alike, and files that hold what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from truetune.bench import workloads
from truetune.bench.workloads import LONGEST, SHORTEST, _random_documents, prepare
from truetune.errors import UserError


def test_random_documents_are_lognormal_and_every_step_has_its_share_of_each_length() -> None:
    documents = _random_documents(5, 16, 32000)
    lengths = np.array([len(d) for d in documents])
    assert len(documents) == 80 and lengths.min() >= SHORTEST and lengths.max() <= LONGEST
    assert 135 < np.median(lengths) < 147 and 170 < lengths.mean() < 186
    assert 0.45 < sum(d.target_count for d in documents) / lengths.sum() < 0.55
    steps = lengths.reshape(5, 16)
    assert np.ptp(steps.sum(1)) < 0.15 * steps.sum(1).mean()
    assert (np.diff(np.sort(steps, axis=1), axis=1) >= 0).all() and len(np.unique(lengths)) > 60
    borders = np.sort(lengths).reshape(16, 5)  # the sixteen parts: each step has one of each
    for step in np.sort(steps, axis=1):
        assert ((borders[:, 0] <= step) & (step <= borders[:, -1])).all()
    assert all(d.tokens.min() >= 8 and d.tokens.max() < 32000 and not d.targets[0] for d in documents)


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shape = json.loads(workloads.SHAPES["small"].read_text())
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "tiny.json").write_text(json.dumps(shape | small | heads))
    monkeypatch.setitem(workloads.SHAPES, "tiny", tmp_path / "tiny.json")
    return "tiny"


@pytest.mark.parametrize(("mode", "precision"), [("lora", "bf16"), ("lora", "fp32"), ("full", "bf16")])
def test_model_adapter_and_documents_are_files_that_others_read(
    tiny_shape: str, tmp_path: Path, mode: str, precision: str
) -> None:
    made = prepare(tiny_shape, mode, 2, tmp_path, documents=4, chosen_keys=[f"model.precision={precision}"])
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["compute"] == precision and job["documents"] == 4
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    assert model.dtype == (torch.bfloat16 if (mode, precision) == ("lora", "bf16") else torch.float32)
    assert model.get_input_embeddings().weight.detach().float().std().item() == pytest.approx(0.02, rel=0.1)
    if mode == "lora":
        adapted = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
        factors = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert len(factors) == 2 * 7 * 2 and {p.dtype for p in factors.values()} == {torch.float32}
        assert all(p.any() == ("lora_A" in n) for n, p in factors.items())
    else:
        assert job["adapter"] is None
    with np.load(tmp_path / "documents.npz") as arrays:
        assert arrays["lengths"].tolist() == [len(d) for step in made.steps for d in step]
        assert (arrays["tokens"] == np.concatenate([d.tokens for step in made.steps for d in step])).all()
        assert (arrays["targets"] == np.concatenate([d.targets for step in made.steps for d in step])).all()
    again = prepare(tiny_shape, mode, 2, tmp_path, documents=4)
    assert again.digest == made.digest and len(made.steps) == 3 and all(len(step) == 4 for step in made.steps)


def test_a_models_folder_gets_real_documents(my_model: Path, tmp_path: Path) -> None:
    made = prepare(str(my_model), "lora", 1, tmp_path, documents=3)
    assert made.name == my_model.name and len(made.steps) == 2
    assert all(d.ends and 0 < d.target_count < len(d) for step in made.steps for d in step)
    with pytest.raises(UserError, match="ask for fewer rounds or documents"):
        prepare(str(my_model), "lora", 10**6, tmp_path, documents=3)


def test_a_workload_that_there_is_not_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no workload huge; choose medium, small, or name a model's folder"):
        prepare("huge", "lora", 1, tmp_path)
