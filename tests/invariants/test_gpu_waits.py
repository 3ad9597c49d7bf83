"""A step on a GPU waits for nothing: run whole on a device where reading a value is an error.

``meta`` tensors have no values, so ``.item()``, ``nonzero()``, boolean masks and copies to the host raise there. That
a copy from the host waits is seen by a mode over all operations. The operations are those of CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_documents, tiny, tiny_trainer, wrap
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from truetune.data.batch import Batch, Document
from truetune.devices import to_device
from truetune.kernels import triton as table
from truetune.kernels.int8_linear import int8_lora_linears
from truetune.kernels.lora_linear import lora_linears
from truetune.kernels.nf4_linear import nf4_lora_linears
from truetune.kernels.op import Op
from truetune.models.adapt import FusedLoraLinear, add_lora
from truetune.models.base import quantize_base
from truetune.models.route import choose_route
from truetune.models.tail import measure_tail
from truetune.models.wrap import CausalLM
from truetune.objectives import Terms
from truetune.objectives.next_token import NextToken
from truetune.optim import OPTIMIZERS, parameter_groups
from truetune.training.gradient import NonFinite
from truetune.training.record import Step
from truetune.training.trainer import Trainer

OPS: list[Op[..., Any]] = [*table.KERNELS.values(), lora_linears, int8_lora_linears, nf4_lora_linears]


class Copies(TorchDispatchMode):
    """Refuses copies from the host for which the host waits: all but those that are told not to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        copies = (name == "_to_copy" and args[0].device.type == "cpu" and is_meta(kwargs)) or (
            name == "copy_" and args[0].is_meta and args[1].device.type == "cpu" and args[1].ndim
        )
        if copies and not (kwargs.get("non_blocking") or args[2:] == (True,)):
            raise WaitError(name)
        return func(*args, **kwargs)


class Made(TorchFunctionMode):
    """Refuses tensors made of numbers of the host on the device: torch copies them there, and waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and is_meta(kwargs)
        if made or (func is Tensor.new_tensor and args[0].is_meta):
            raise WaitError(str(func))
        return func(*args, **kwargs)


class WaitError(Exception):
    """The host would wait for the device."""


def is_meta(kwargs: dict[str, Any]) -> bool:
    return torch.device(kwargs.get("device") or "cpu").type == "meta"


@pytest.fixture(autouse=True)
def _like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in OPS:
        if "cuda" in op.equals:
            monkeypatch.setattr(op, "equals", op.equals | {"meta": op.equals["cuda"]})
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda p: None)


def on_device(
    family: str = "llama", lora: bool = True, optimizer: str = "adamw", base: str | None = None, **parts: Any
) -> Trainer:
    """Assembled as for CUDA: the model is proven on the host, and is on its device before it is wrapped."""
    hf: PreTrainedModel = tiny(family)
    tail, route = measure_tail(hf), choose_route(hf, "model")
    adapted = add_lora(hf, tail.head, rank=4, alpha=8.0, dropout=0.0, targets="all-linear") if lora else hf
    if base:
        quantize_base(adapted, f"base_model.model.{tail.head}", base)
        for layer in (m for m in adapted.modules() if isinstance(m, FusedLoraLinear) and m.packed is not None):
            kept = layer.packed.weight
            parts_ = {"codes": kept.codes.to("meta"), "scale_N": kept.scale_N.to("meta")}
            layer.packed = layer.packed._replace(weight=kept._replace(**parts_))
    model = CausalLM(adapted.to("meta"), tail, route, torch.float32)
    trainer = tiny_trainer(model, random_documents(30), **parts)
    if optimizer != "adamw":
        trainer.optimizer = OPTIMIZERS[optimizer](parameter_groups(model.trainable().items(), 1e-3), 1e-3)
    return trainer


def run(trainer: Trainer, steps: int = 2) -> None:
    with Copies(), Made():
        for _ in range(steps):
            trainer._take()


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_a_step_waits_for_nothing(family: str, lora: bool) -> None:
    run(on_device(family, lora))


def test_over_a_base_in_4_bits_a_step_waits_for_nothing() -> None:
    trainer = on_device(base="nf4")
    assert any(isinstance(m, FusedLoraLinear) and m.packed for m in trainer.model.model.modules())
    run(trainer)


def test_documents_that_share_rows_wait_for_nothing() -> None:
    start = np.arange(3, 33, dtype=np.int32)
    tokens = [np.append(start, d.tokens) for d in random_documents(8)]
    trainer = on_device(shares=True, tokens_per_micro_batch=120)
    trainer.documents = [Document(t, np.arange(len(t)) > 20) for t in tokens] * 4
    assert any(batch.shared for batch in trainer.batches(0))
    run(trainer)


def reading(read: Callable[[Tensor], object]) -> NextToken:
    class Reads(NextToken):
        def __call__(self, model: CausalLM, batch: Batch) -> Terms:
            terms = super().__call__(model, batch)
            read(terms.losses)
            return terms

    return Reads()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.zeros(2).to(x.device),
        lambda x: torch.empty(2, device=x.device).copy_(torch.zeros(2)),
    ],
)
def test_what_waits_is_seen(read: Callable[[Tensor], object]) -> None:
    trainer = on_device()
    trainer.objective = reading(read)
    with pytest.raises((RuntimeError, NotImplementedError, WaitError)):
        run(trainer, 1)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS.keys() - {"mezo"}))  # which draws, as this device can not
def test_no_rule_waits_once_it_has_begun(optimizer: str) -> None:
    """Beside the look at loss and norm, which all but AdamW need before they move a weight. That torch's own
    decompositions wait inside, as ``eigh`` does on CUDA, does not show here."""
    trainer = on_device(optimizer=optimizer)
    trainer._require_finite = lambda taken: None  # type: ignore[method-assign]
    trainer._take()  # makes what stays: tables of cosines, numbers that all parameters share
    run(trainer)


def test_what_goes_to_a_gpu_leaves_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: asked.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *to, **how: asked.append((*to, how)) or self)
    to_device(torch.zeros(2), "cuda")
    assert asked == ["pinned", ("cuda", {"non_blocking": True})]


def without_a_wait(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> Trainer:
    monkeypatch.setattr(Trainer, "_runs_ahead", ahead)
    return tiny_trainer(wrap(tiny("llama"), True), random_documents(60), length={"steps": 8})


def test_reading_one_step_late_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for ahead in (True, False):
        trainer = without_a_wait(monkeypatch, ahead)
        found = [(r.step, r.loss, r.gradient_norm, r.rate) for r in trainer.steps() if isinstance(r, Step)]
        runs.append((found, [p.detach() for p in trainer.model.trainable().values()]))
    assert runs[0][0] == runs[1][0] and [step for step, *_ in runs[0][0]] == list(range(1, 9))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_that_fails_loses_no_record_of_the_one_before(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    trainer = without_a_wait(monkeypatch, ahead)
    take = trainer._take

    def fails_later() -> Any:
        if trainer.step == 3:
            raise RuntimeError("out of memory")
        return take()

    monkeypatch.setattr(trainer, "_take", fails_later)
    seen = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for record in trainer.steps():
            seen += [record.step] if isinstance(record, Step) else []
    assert seen == [1, 2, 3]


def test_from_a_step_that_found_no_number_on_the_weights_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken, kept = 4, []
    for ahead in (True, False):
        trainer = without_a_wait(monkeypatch, ahead)
        trainer.failures = tmp_path / str(ahead)
        trainer.objective = Breaks(trainer, broken)
        with pytest.raises(NonFinite, match=f"the loss of step {broken + 1} is nan; no weight was changed"):
            list(trainer.steps())
        assert trainer.step == broken
        kept.append([p.detach() for p in trainer.model.trainable().values()])
        state = trainer.optimizer.state.values()
        kept[-1] += [part for of_one in state for part in of_one.values()]
        assert (tmp_path / str(ahead) / f"failure-step-{broken + 1}" / "batch.safetensors").is_file()
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


class Breaks(NextToken):
    """Finds no number at one step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        super().__init__()
        self.trainer, self.step = trainer, step

    def __call__(self, model: CausalLM, batch: Batch) -> Terms:
        terms = super().__call__(model, batch)
        return replace(terms, total=terms.total * float("nan")) if self.trainer.step == self.step else terms
