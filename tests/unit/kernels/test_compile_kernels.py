"""tools/compile_kernels.py: one kernel is compiled for real, and what it must refuse is seen."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import compile_kernels
import pytest
from compile_kernels import SAMPLES, SHARED, SIZES, Compiled, faults, main, traffic, unreached

from truetune.kernels.triton import KERNELS
from truetune.kernels.triton.configurations import CONFIGURATIONS

GOOD = Compiled("gated_forward", "bf16", "BLOCK 1024", "sm_80", 32, 0, 0, "none")


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there() -> None:
    command = [sys.executable, compile_kernels.__file__, "--only", "newton_schulz", "--targets", "sm_80"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("4 compiled, 0 faults\n")


def test_the_interpreter_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_kernels.py"])
    with pytest.raises(SystemExit):
        main()
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_spills_and_too_much_shared_memory_are_faults() -> None:
    assert not list(faults([GOOD, dataclasses.replace(GOOD, shared=SHARED["sm_80"])]))
    assert "spills 8 on sm_80" in next(faults([dataclasses.replace(GOOD, spilled=8)]))
    assert "shared memory" in next(faults([dataclasses.replace(GOOD, shared=SHARED["sm_80"] + 1)]))


def test_a_configuration_that_nothing_reaches_is_a_fault() -> None:
    every = {(kernel, number) for kernel, rows in CONFIGURATIONS.items() for number in range(len(rows))}
    assert not list(unreached(every))
    assert list(unreached(every - {("rotate", 1)})) == ["rotate: nothing reaches row 1"]


def test_the_bytes_of_a_kernel_are_those_of_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gate in bf16 three tensors forward and five backward; of AdamW p, m and v twice, and g."""
    monkeypatch.setattr(compile_kernels, "SAMPLES", {"gated": {"rows": 64}, "adamw": {"sizes": (8192,)}})
    found = traffic()
    assert found["gated"] == (8 * 2, 8 * 2)
    assert found["adamw"] == (pytest.approx(2 * (2 + 4 + 4) + 2, rel=0.02),) * 2


def test_every_kernel_is_in_the_matrix_and_on_the_page() -> None:
    assert SIZES.keys() == SAMPLES.keys() == KERNELS.keys()
    page = (Path(__file__).parents[3] / "docs" / "kernels-compiled.md").read_text(encoding="utf-8")
    assert all(f"`{kernel}`" in page for kernel in CONFIGURATIONS)
