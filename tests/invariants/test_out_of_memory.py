"""Memory that runs out, wherever it does, is one sentence with what to do, and loses nothing that was saved."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import STEPS, facts, invoke, keys, records
from transformers import AutoModelForCausalLM

from truetune.checks.preflight import Preflight
from truetune.errors import shortage
from truetune.kernels.native.build import kernels
from truetune.training import trainer as training
from truetune.training.evaluate import Evaluator

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free."
)
MAPPED = "unable to mmap 988097824 bytes from file <model.safetensors>: Cannot allocate memory (12)"


def fails(error: Exception) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


def asks() -> object:
    """For what no machine has: of our allocator or of torch's."""
    return torch.empty(1 << 50, dtype=torch.uint8)


SHORTAGES = {
    "gpu": (fails(torch.OutOfMemoryError(CUDA)), "the GPU's memory ran out when 2.00 GiB were asked for"),
    "cublas": (fails(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")), "the GPU's memory ran out"),
    "tensor": (asks, f"memory ran out when {1 << 50} bytes were asked for"),
    "python": (lambda: bytearray(1 << 62), "memory ran out"),
    "file": (fails(RuntimeError(MAPPED)), "memory ran out"),
    "system": (fails(OSError(12, "Cannot allocate memory")), "memory ran out"),
}


@pytest.mark.parametrize("kind", SHORTAGES)
def test_it_is_known_by_whichever_error_says_it(kind: str) -> None:
    ask, says = SHORTAGES[kind]
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        ask()
    assert shortage(caught.value) == says


@pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("ours", [False, True])
def test_both_allocators_of_tensors_say_it(ours: bool) -> None:
    compiled: Any = kernels()
    compiled.keep_memory(ours)
    try:
        with pytest.raises(RuntimeError, match="there is no memory for a tensor" if ours else "DefaultCPU") as caught:
            asks()
        assert shortage(caught.value) == SHORTAGES["tensor"][1]
    finally:
        compiled.keep_memory(True)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 differ"), OSError(28, "No space left"), ValueError("CUDA")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert shortage(error) is None


def failing(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, ask: Callable[[], object], after: int = 0) -> None:
    """The call number ``after`` of ``where.name``, from 0, asks for what there is not."""
    real, calls = getattr(where, name), iter(range(1000))

    def instead(*arguments: Any, **options: Any) -> Any:
        return ask() if next(calls) == after else real(*arguments, **options)

    monkeypatch.setattr(where, name, instead)


MORE = "train.tokens_per_micro_batch=240"
LESS = r"lower train\.tokens_per_micro_batch \(now 240, at least 128\) or set train\.activation_memory"


@pytest.mark.parametrize(
    ("where", "name", "after", "steps"),
    [(Preflight, "__call__", 0, 0), (training, "differentiate", 1, 1), (Evaluator, "__call__", 0, 0)],
    ids=["preflight", "step", "evaluation"],
)
def test_a_run_that_saved_nothing_says_what_to_lower(
    where: Any, name: str, after: int, steps: int, my_model: Path, my_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    failing(monkeypatch, where, name, asks, after)
    result = invoke("train", *keys(my_model, my_data, tmp_path / "out", MORE))
    says = rf"error: memory ran out when {1 << 50} bytes were asked for; {LESS}; no step was saved yet, so start .*\n"
    assert result.exit_code == 2 and re.fullmatch(says, result.stderr), result.stderr
    assert facts(tmp_path / "out")["status"] == "failed" and (tmp_path / "out" / "report.html").is_file()
    assert sum(r["kind"] == "step" for r in records(tmp_path / "out")) == steps


def test_with_less_the_run_goes_on_from_what_was_saved(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        failing(patched, training, "differentiate", SHORTAGES["gpu"][0], after=5)
        result = invoke("train", *keys(my_model, my_data, folder, MORE))
    says = rf"what was saved is intact, so {LESS} in .*recipe\.yaml; go on with: truetune train --resume .*out\n"
    assert result.exit_code == 2 and re.search(says, result.stderr), result.stderr
    recipe = folder / "recipe.yaml"
    written = recipe.read_text()
    assert "tokens_per_micro_batch: 240" in written
    recipe.write_text(written.replace("tokens_per_micro_batch: 240", "tokens_per_micro_batch: 128"))
    result = invoke("train", "--resume", str(folder))
    assert result.exit_code == 0, result.output
    assert [r["step"] for r in records(folder) if r["kind"] == "step"] == list(range(1, STEPS + 1))


def test_a_model_that_memory_does_not_hold(
    my_model: Path, my_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, AutoModelForCausalLM, "from_pretrained", asks)
    result = invoke("train", *keys(my_model, my_data, tmp_path / "out", "adapter.method=full"))
    says = r"error: memory ran out .* before the first step; set model\.precision=bf16 or train an adapter .* model\n"
    assert result.exit_code == 2 and re.fullmatch(says, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_any_other_command_says_it_too(my_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, AutoModelForCausalLM, "from_pretrained", SHORTAGES["python"][0])
    result = invoke("generate", str(my_model), "--prompt", "What?")
    assert result.exit_code == 2
    assert result.stderr == "error: memory ran out; close other programs, or use a smaller model\n"
