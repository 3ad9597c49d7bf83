"""The lattice: every Triton kernel in every dtype on awkward shapes, in the interpreter, against float64.

One rule for all: the error of every output and every gradient is at most twice that of the reference in the same dtype.
A few points run in every test run, the whole lattice as a proof.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreted import exact
from torch import Tensor

from truetune.kernels.triton import KERNELS, cases, equal
from truetune.kernels.triton.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = [{"rows": 1, "width": 1}, {"rows": 7, "width": 100}, {"rows": 33, "width": 515}]
LATTICE: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [s | o for s in ROWS for o in ({}, {"residual": True}, {"offset": 1.0})]
    + [{"rows": 2, "width": 1025}, {"rows": 2, "width": 4097, "residual": True}],
    "rope": [
        {"tokens": t, "heads": h, "keys": k, "head_size": d, "interleaved": i}
        for t, h, k in ((1, 1, 1), (33, 6, 2))
        for d in (64, 80, 96, 128, 256)
        for i in (False, True)
    ]
    + [{"tokens": 7, "heads": 2, "keys": 1, "head_size": 80, "rotated": 0.4, "interleaved": i} for i in (False, True)],
    "linear_cross_entropy": [
        {"rows": n, "width": d, "vocabulary": v} | o
        for n, d, v in ((1, 8, 3), (7, 16, 100), (33, 72, 515), (70, 80, 257))
        for o in (
            {},
            {"bias": True, "weighted": True},
            {"scale": 0.25, "softcap": 3.0},
            {"bias": True, "softcap": 5.0, "z_loss": 0.1, "smoothing": 0.2},
            {"frozen": True},
        )
    ]
    + [{"rows": 0, "width": 8, "vocabulary": 5, "bias": True}],
    "gated": [s | {"activation": a} for s in ROWS for a in ("silu", "gelu", "gelu_tanh")],
}
QUICK = {"rms_norm": [4, 7], "rope": [17, 20], "gated": [3, 4, 5], "linear_cross_entropy": [10, 13, 16, 20]}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are small: with few programs each still goes over several tiles."""
    for name in KERNELS:
        module = sys.modules[equal(name).__module__]
        if hasattr(module, "PROGRAMS"):
            monkeypatch.setattr(module, "PROGRAMS", 2)


def points() -> Iterator[Any]:
    for name, options in LATTICE.items():
        for number, option in enumerate(options):
            for dtype in DTYPES:
                marks = [] if number in QUICK[name] else [pytest.mark.proof]
                label = ",".join(f"{key}={value}" for key, value in option.items())
                yield pytest.param(name, dtype, option, id=f"{name}-{dtype}-{label}", marks=marks)


def results(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Every output, and the gradient of every trained argument for a fixed random readout of the outputs."""
    arguments = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in case.arguments.items()}
    trained = [arguments[name].requires_grad_() for name in case.trained]
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    readout = sum(
        (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        for y in outputs
        if y.requires_grad
    )
    assert isinstance(readout, Tensor)
    gradients = torch.autograd.grad(readout, trained)
    found = {f"output {n}": y.detach().double() if y.dtype == torch.bool else y.detach() for n, y in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(case.trained, gradients, strict=True)}


def in_float64(case: Case) -> Case:
    return case._replace(
        arguments={
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.arguments.items()
        }
    )


def check(name: str, case: Case, dtype: torch.dtype, no_worse: Any) -> None:
    truth = results(KERNELS[name].reference, in_float64(case))
    plain = results(KERNELS[name].reference, case)
    with exact():
        ours = results(equal(name), case)
    assert ours.keys() == plain.keys()
    for part in truth:
        assert ours[part].dtype == plain[part].dtype, part
        no_worse(f"{name} {part}", ours[part], plain[part], truth[part], dtype)


@pytest.mark.parametrize(("name", "dtype", "option"), list(points()))
def test_a_kernel_is_as_right_as_its_reference(name: str, dtype: str, option: dict[str, Any], no_worse: Any) -> None:
    case = getattr(cases, name)(DTYPES[dtype], **option)
    check(name, case, DTYPES[dtype], no_worse)


def test_the_lattice_holds_every_kernel() -> None:
    assert LATTICE.keys() == QUICK.keys() == KERNELS.keys()
