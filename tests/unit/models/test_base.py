"""A base in 8 or 4 bits: which layers are, when they are, and that what is told and leaves rests on the original."""

from __future__ import annotations

import copy
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import at_record, facts, invoke, keys, records, same_file, step_is, write_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor
from transformers import AutoModelForCausalLM

from truetune import spelling
from truetune.assembly import assemble
from truetune.checks import preflight
from truetune.data.batch import Batch
from truetune.errors import UserError
from truetune.kernels import int8_linear, nf4_linear
from truetune.kernels.bases import BASES
from truetune.models import base as bases
from truetune.models.adapt import FusedLoraLinear, unfused
from truetune.models.base import original_weights, quantize_base, reference_base, require_able
from truetune.models.wrap import CausalLM
from truetune.objectives.next_token import NextToken
from truetune.training.evaluate import Evaluator
from truetune.training.record import Step

CPU = torch.device("cpu")
LACKS = {name: base.lack(CPU) for name, base in BASES.items()}
MARKS = {name: pytest.mark.skipif(lack is not None, reason=f"needs {lack}") for name, lack in LACKS.items()}
OFF = {"int8": 0.05, "nf4": 0.5}
"""How far logits of a random model may be from the original's, relative."""
each = pytest.mark.parametrize("base", [pytest.param(name, marks=mark) for name, mark in MARKS.items()])
nf4 = MARKS["nf4"]


def quantized(base: str, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> CausalLM:
    model = wrap(tiny(family), True, dtype, **options)
    quantize_base(model.hf, model.tail.head, base)
    return model


def packed(model: CausalLM) -> dict[str, FusedLoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedLoraLinear) and m.packed is not None}


@each
@pytest.mark.parametrize(("family", "layers"), [("llama", 14), ("qwen2", 14), ("gpt2", 0)])
def test_plain_lora_layers_are_quantised_and_the_output_layer_is_not(family: str, layers: int, base: str) -> None:
    model = wrap(tiny(family), True, targets=".*" if layers else "all-linear")
    if not layers:  # its layers hold their weights transposed
        with pytest.raises(UserError, match=f"model.base={base} finds no linear layer under plain LoRA"):
            quantize_base(model.hf, model.tail.head, base)
        return
    assert quantize_base(model.hf, model.tail.head, base) == len(packed(model)) == layers


@each
def test_training_uses_it_and_whatever_is_told_does_not(base: str) -> None:
    documents = random_documents(8)
    batch = Batch.of(documents)
    plain, model = wrap(tiny("llama"), True, torch.bfloat16), quantized(base)
    objective = NextToken()
    theirs, ours = (float(objective(m, batch).total.detach()) for m in (plain, model))
    assert ours != theirs and ours == pytest.approx(theirs, rel=OFF[base])
    with original_weights(model):
        assert float(objective(model, batch).total.detach()) == theirs
    assert Evaluator(documents, 64, objective)(model, 0).loss == Evaluator(documents, 64, objective)(plain, 0).loss
    with model.as_published() as hf, plain.as_published() as other:
        tokens = batch.tokens[None]
        assert torch.equal(hf(input_ids=tokens).logits, other(input_ids=tokens).logits)
    assert float(objective(model, batch).total.detach()) == ours
    assert list(model.state_dict()) == list(plain.state_dict())


@each
def test_plain_code_can_have_such_a_base_for_a_while(base: str) -> None:
    batch = Batch.of(random_documents(4))
    model = quantized(base)
    before = model(batch)
    with reference_base(model), model.as_published() as hf, unfused(hf), model.autocast():
        theirs = hf(input_ids=batch.tokens[None]).logits
    with model.as_published() as hf, unfused(hf), model.autocast():
        original = hf(input_ids=batch.tokens[None]).logits
    assert torch.equal(model(batch), before) and len(packed(model)) == 14
    off = float(((theirs - original).norm() / original.norm()).detach())
    assert 1e-3 < off < OFF[base]


@each
def test_a_copy_in_float64_is_the_original(base: str) -> None:
    batch = Batch.of(random_documents(4))
    plain, model = (
        copy.deepcopy(m).double() for m in (wrap(tiny("llama"), True), quantized(base, dtype=torch.float32))
    )
    assert torch.equal(model(batch), plain(batch))
    with original_weights(model):
        assert torch.equal(model(batch), plain(batch))


@each
def test_it_learns_what_the_original_learns(base: str) -> None:
    def losses(model: CausalLM) -> list[float]:
        trainer = tiny_trainer(model, random_documents(60), rate=3e-3, length={"steps": 10})
        return [record.loss for record in trainer.steps() if isinstance(record, Step)]

    ours, theirs = losses(quantized(base)), losses(wrap(tiny("llama"), True, torch.bfloat16))
    assert ours != theirs and ours == pytest.approx(theirs, rel=OFF[base] / 5)


def over_what_is_left(dtype: torch.dtype) -> CausalLM:
    """An ordinary model whose weights were brought to 4 bits and back."""
    hf = tiny("llama").to(dtype)
    adapted = {n.removeprefix("model.base_model.model.") for n in packed(quantized("nf4", dtype=dtype))}
    with torch.no_grad():
        for name in adapted:
            weight = hf.get_submodule(name).weight
            weight.copy_(nf4_linear.unpack(nf4_linear.pack(weight), dtype))
    assert len(adapted) == 14
    return wrap(hf, True, dtype)


@nf4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_over_the_weights_that_are_left(dtype: torch.dtype) -> None:
    def measured(model: CausalLM) -> tuple[float, list[Tensor | None]]:
        with torch.no_grad():
            for name, p in model.trainable().items():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
        with model.autocast():
            total = NextToken()(model, Batch.of(random_documents(8))).total
        total.backward()
        return float(total.detach()), [p.grad for p in model.trainable().values()]

    given = wrap(tiny("llama").to(dtype), True, dtype)
    quantize_base(given.hf, given.tail.head, "nf4")
    (loss, gradient), (known, known_gradient) = measured(given), measured(over_what_is_left(dtype))
    assert loss == pytest.approx(known, rel=1e-6)
    assert preflight.distance(gradient, known_gradient) < (1e-6 if dtype == torch.float32 else 1e-2)


@nf4
def test_weights_take_half_a_byte_and_a_sixteenth() -> None:
    layers = packed(quantized("nf4")).values()
    count = sum(layer.base_layer.weight.numel() for layer in layers)
    taken = sum(part.nbytes for layer in layers for part in layer.packed.weight[:2])
    assert taken / count == pytest.approx(0.5 + 4 / 64, rel=0.02)


@pytest.mark.parametrize(
    ("base", "more", "reason"),
    [
        *(
            (base, [key], f"means nothing with {told}")
            for base in BASES
            for key, told in (
                ("adapter.method=full", "adapter.method=full"),
                ("adapter.dora=true", "adapter.dora"),
                ("adapter.dropout=0.1", "adapter.dropout"),
            )
        ),
        ("int8", ["device=cuda"], "means nothing with device=cuda"),
    ],
)
def test_where_it_means_nothing_it_is_refused(base: str, more: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=f"model.base={base} {reason}"):
        spelling.read(None, ["model.path=a", "data.source=b", f"model.base={base}", *more])


def test_four_bits_may_be_on_a_gpu() -> None:
    assert spelling.read(None, ["model.path=a", "data.source=b", "model.base=nf4", "device=cuda"]).device == "cuda"


def test_a_machine_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_linear, "instructions", lambda: ["avx2", "fma"])
    with pytest.raises(UserError, match=r"model.base=int8 needs a CPU that multiplies bytes .*; without it, remove"):
        require_able("int8", CPU)
    monkeypatch.setattr(nf4_linear, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    sentence = re.escape("model.base=nf4 needs the extra: pip install 'truetune[bitsandbytes]'; without it, remove")
    with pytest.raises(UserError, match=sentence):
        assemble(spelling.read(None, ["model.path=a", "data.source=python-docs", "data.rows=4", "model.base=nf4"]))


def asked_of(base: str, precision: str = "bf16") -> tuple[str, str]:
    return f"model.precision={precision}", f"model.base={base}"


@pytest.fixture(scope="module", params=[pytest.param(name, marks=mark) for name, mark in MARKS.items()])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory, my_data: Path) -> Path:
    place = tmp_path_factory.mktemp(base)
    model = write_model(place / "model", dtype=torch.bfloat16)
    asked = keys(model, my_data, place / "run", *asked_of(base))
    found = invoke("train", *asked)
    assert found.exit_code == 0, found.output
    return place / "run"


def test_the_recipe_puts_it_in_place_and_only_then(run: Path, base: str) -> None:
    data = facts(run)["recipe"]["data"]["source"]
    asked = keys(run.parent / "model", data, run.parent / "other", *asked_of(base))
    for recipe, count in ((asked, 14), (asked[:-1], 0)):
        assert len(packed(assemble(spelling.read(None, recipe)).trainer.model)) == count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_themselves_rest_in_their_file(
    run: Path, base: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run.parent / "model" / "model.safetensors"
    data = facts(run)["recipe"]["data"]["source"]
    asked = keys(run.parent / "model", data, run.parent / "other", *asked_of(base, precision))
    released: list[bool] = []
    monkeypatch.setattr(bases, "release_memory", lambda: released.append(True))
    model = assemble(spelling.read(None, asked)).trainer.model
    assert released
    released.clear()

    def resting() -> list[bool]:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
        spans = [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]
        return [any(m.base_layer.weight.data_ptr() in span for span in spans) for m in packed(model).values()]

    kept = load_file(file)
    assert resting() == [True] * 14
    with original_weights(model):
        for name, layer in model.hf.named_modules():
            if isinstance(layer, FusedLoraLinear):
                assert layer.base_layer.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
                assert torch.equal(layer.base_layer.weight, kept[f"{name}.weight"].to(layer.base_layer.weight.dtype))
    assert resting() == [True] * 14 and bool(released) == (precision == "fp32")


def test_what_leaves_stands_on_the_original_weights(run: Path, base: str) -> None:
    assert facts(run)["model"]["base"] == base
    stored = load_file(run.parent / "model" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(run.parent / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload().state_dict()
    written = load_file(run / "merged" / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in written.items():
        assert torch.allclose(tensor.float(), merged[name], rtol=2**-8, atol=1e-6), name
    assert all(export["passed"] for export in facts(run)["exports"])


def test_it_resumes_as_it_was_and_not_without(run: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_record(monkeypatch, step_is(5), lambda: signal.raise_signal(signal.SIGTERM))
    again, recipe = run.parent / "again", run.parent / "again" / "recipe.yaml"
    invoke("train", *keys(run.parent / "model", facts(run)["recipe"]["data"]["source"], again, *asked_of(base)))
    assert facts(again)["status"] == "interrupted"
    asked = recipe.read_text(encoding="utf-8")
    recipe.write_text(asked.replace(f"base: {base}", "base: null"), encoding="utf-8")
    refused = invoke("train", "--resume", str(again))
    assert refused.exit_code == 2 and f"began with model.base={base} and would go on with none" in refused.stderr
    recipe.write_text(asked, encoding="utf-8")
    assert invoke("train", "--resume", str(again)).exit_code == 0
    ours, theirs = ({r["step"]: r["loss"] for r in records(f) if r["kind"] == "step"} for f in (again, run))
    assert ours == theirs and same_file(*(f / "adapter" / "adapter_model.safetensors" for f in (again, run)))


@nf4
def test_a_run_in_fp32_over_four_bits_of_another_dtype(tmp_path: Path, my_data: Path) -> None:
    """The model's file is in bf16, so the weights that are told by and leave are brought to fp32 each time."""
    model = write_model(tmp_path / "model", dtype=torch.bfloat16)
    found = invoke("train", *keys(model, my_data, tmp_path / "run", *asked_of("nf4", "fp32")))
    assert found.exit_code == 0, found.output
    assert all(e["passed"] and e["kind"] in ("adapter", "merged") for e in facts(tmp_path / "run")["exports"])


@nf4
def test_the_loss_before_a_run_is_held_to_plain_code_over_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(quantized("nf4", dtype=torch.float32), random_documents(20))
    documents = random_documents(3)
    (verdict,) = preflight.parity(trainer.model, trainer, documents)
    assert verdict.passed, verdict
    unpack = nf4_linear.unpack
    monkeypatch.setattr(nf4_linear, "unpack", lambda packed, dtype: unpack(packed, dtype) * 1.02)
    (verdict,) = preflight.parity(trainer.model, trainer, documents)
    assert not verdict.passed
