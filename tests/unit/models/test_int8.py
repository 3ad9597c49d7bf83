"""A base in 8 bits: which layers are, when they are, and that what is told and what leaves rests on the original."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import at_record, facts, invoke, keys, records, same_file, step_is, write_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny import random_documents, tiny, tiny_trainer, wrap
from transformers import AutoModelForCausalLM

from truetune import spelling
from truetune.assembly import assemble
from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.kernels import int8_linear
from truetune.models.adapt import FusedLoraLinear, unfused
from truetune.models.int8 import original_weights, quantize_base, reference_base
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.training.evaluate import Evaluator
from truetune.training.record import Step

needs_bytes = pytest.mark.skipif(
    not int8_linear.available(torch.device("cpu")), reason="no compiled products of bytes on this machine"
)


def quantized(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> CausalLM:
    model = wrap(tiny(family), True, dtype, **options)
    quantize_base(model.hf, model.tail.head)
    return model


def packed(model: CausalLM) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, FusedLoraLinear) and m.packed is not None]


@needs_bytes
@pytest.mark.parametrize(("family", "layers"), [("llama", 14), ("qwen2", 14), ("gpt2", 0)])
def test_plain_lora_layers_are_quantised_and_the_output_layer_is_not(family: str, layers: int) -> None:
    model = wrap(tiny(family), True, targets=".*" if layers else "all-linear")
    if not layers:  # its layers hold their weights transposed
        with pytest.raises(UserError, match="finds no linear layer under plain LoRA"):
            quantize_base(model.hf, model.tail.head)
        return
    assert quantize_base(model.hf, model.tail.head) == len(packed(model)) == layers


@needs_bytes
def test_training_uses_it_and_whatever_is_told_does_not() -> None:
    documents = random_documents(8)
    batch = Batch.of(documents)
    plain, model = wrap(tiny("llama"), True, torch.bfloat16), quantized()
    objective = NextToken()
    theirs, ours = (float(objective(m, batch).total.detach()) for m in (plain, model))
    assert ours != theirs and ours == pytest.approx(theirs, rel=1e-2)
    with original_weights(model):
        assert float(objective(model, batch).total.detach()) == theirs
    assert Evaluator(documents, 64, objective)(model, 0).loss == Evaluator(documents, 64, objective)(plain, 0).loss
    with model.as_published() as hf, plain.as_published() as other:
        tokens = batch.tokens[None]
        assert torch.equal(hf(input_ids=tokens).logits, other(input_ids=tokens).logits)
    assert float(objective(model, batch).total.detach()) == ours
    assert list(model.state_dict()) == list(plain.state_dict())


@needs_bytes
def test_plain_code_can_have_such_a_base_for_a_while() -> None:
    batch = Batch.of(random_documents(4))
    model = quantized()
    before = model(batch)
    with reference_base(model), model.as_published() as hf, unfused(hf), model.autocast():
        theirs = hf(input_ids=batch.tokens[None]).logits
    with model.as_published() as hf, unfused(hf), model.autocast():
        original = hf(input_ids=batch.tokens[None]).logits
    assert torch.equal(model(batch), before) and len(packed(model)) == 14
    off = float(((theirs - original).norm() / original.norm()).detach())
    assert 1e-3 < off < 0.05


@needs_bytes
def test_a_copy_in_float64_is_the_original() -> None:
    batch = Batch.of(random_documents(4))
    plain, model = (copy.deepcopy(m).double() for m in (wrap(tiny("llama"), True), quantized(dtype=torch.float32)))
    assert torch.equal(model(batch), plain(batch))


@needs_bytes
def test_it_learns_what_the_original_learns() -> None:
    def losses(model: CausalLM) -> list[float]:
        trainer = tiny_trainer(model, random_documents(60), rate=3e-3, length={"steps": 10})
        return [record.loss for record in trainer.steps() if isinstance(record, Step)]

    ours, theirs = losses(quantized()), losses(wrap(tiny("llama"), True, torch.bfloat16))
    assert ours != theirs and ours == pytest.approx(theirs, rel=1e-2)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["adapter.method=full"], "means nothing with adapter.method=full"),
        (["adapter.dora=true"], "means nothing with adapter.dora"),
        (["adapter.dropout=0.1"], "means nothing with adapter.dropout"),
        (["device=cuda"], "means nothing with device=cuda"),
    ],
)
def test_where_it_means_nothing_it_is_refused(more: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=f"model.base=int8 {reason}"):
        spelling.read(None, ["model.path=a", "data.source=b", "model.base=int8", *more])


def test_a_processor_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "instructions", lambda: ["avx2", "fma"])
    with pytest.raises(UserError, match="needs a CPU that multiplies bytes"):
        quantized()


INT8 = ("model.precision=bf16", "model.base=int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, my_data: Path) -> Path:
    place = tmp_path_factory.mktemp("int8")
    model = write_model(place / "model", dtype=torch.bfloat16)
    asked = keys(model, my_data, place / "run", *INT8)
    found = invoke("train", *asked)
    assert found.exit_code == 0, found.output
    return place / "run"


@needs_bytes
def test_the_recipe_puts_it_in_place_and_only_then(run: Path) -> None:
    asked = keys(run.parent / "model", facts(run)["recipe"]["data"]["source"], run.parent / "other", *INT8)
    for recipe, count in ((asked, 14), (asked[:-1], 0)):
        assert len(packed(assemble(spelling.read(None, recipe)).trainer.model)) == count


@needs_bytes
def test_what_leaves_stands_on_the_original_weights(run: Path) -> None:
    assert facts(run)["model"]["base"] == "int8"
    base = load_file(run.parent / "model" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload().state_dict()
    written = load_file(run / "merged" / "model.safetensors")
    assert written.keys() == base.keys()
    for name, tensor in written.items():
        assert torch.allclose(tensor.float(), merged[name], rtol=2**-8, atol=1e-6), name
    assert all(export["passed"] for export in facts(run)["exports"])


@needs_bytes
def test_it_resumes_as_it_was_and_not_without(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_record(monkeypatch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
    again, recipe = run.parent / "again", run.parent / "again" / "recipe.yaml"
    invoke("train", *keys(run.parent / "model", facts(run)["recipe"]["data"]["source"], again, *INT8))
    assert facts(again)["status"] == "interrupted"
    asked = recipe.read_text(encoding="utf-8")
    recipe.write_text(asked.replace("base: int8", "base: null"), encoding="utf-8")
    refused = invoke("train", "--resume", str(again))
    assert refused.exit_code == 2 and "began with model.base=int8 and would go on with none" in refused.stderr
    recipe.write_text(asked, encoding="utf-8")
    assert invoke("train", "--resume", str(again)).exit_code == 0
    ours, theirs = ({r["step"]: r["loss"] for r in records(f) if r["kind"] == "step"} for f in (again, run))
    assert ours == theirs and same_file(*(f / "adapter" / "adapter_model.safetensors" for f in (again, run)))
