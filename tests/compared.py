"""A kernel's results on a case, outputs and gradients, against its reference's and the truth in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from interpreted import exact
from torch import Tensor

from truetune.kernels.triton import KERNELS
from truetune.kernels.triton.cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def mapped(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with every tensor changed, those in lists too."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [change(v) for v in value]
        return change(value) if isinstance(value, Tensor) else value

    return case._replace(arguments={name: of(value) for name, value in case.arguments.items()})


def results(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Every output, and the gradient of every trained argument for a fixed random readout of the outputs."""
    arguments = mapped(case, lambda t: t.detach().clone()).arguments
    trained = [arguments[name].requires_grad_() for name in case.trained]
    outputs = function(**arguments)
    if case.changed:
        outputs = tuple(t for name in case.changed for t in arguments[name])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {n}": y.detach() for n, y in enumerate(outputs)}
    found |= {name: y.double() for name, y in found.items() if not y.is_floating_point()}
    if not case.trained:
        return found
    generator = torch.Generator().manual_seed(1)
    readouts = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    pairs = [(y.double(), readout) for y, readout in zip(outputs, readouts, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad(torch.stack([(y * readout).sum() for y, readout in pairs]).sum(), trained)
    return found | {f"gradient of {name}": g for name, g in zip(case.trained, gradients, strict=True)}


def in_float64(case: Case) -> Case:
    return mapped(case, lambda t: t.double() if t.is_floating_point() else t)


def check(name: str, kernel: Callable[..., Any], case: Case, dtype: torch.dtype, no_worse: Any) -> None:
    """Every part of the kernel's results against the reference's in the same dtype and in float64."""
    truth = results(KERNELS[name].reference, in_float64(case))
    plain = results(KERNELS[name].reference, case)
    with exact():
        ours = results(kernel, case)
    assert ours.keys() == plain.keys()
    for part in truth:
        assert ours[part].dtype == plain[part].dtype, part
        no_worse(f"{name} {part}", ours[part], plain[part], truth[part], dtype)
