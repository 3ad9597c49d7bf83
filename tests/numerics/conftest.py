"""The one tolerance: an error against float64 at most twice that of plain torch in the same dtype.

To which comes half a step of the dtype, since few numbers can be lucky: plain torch may round a result of
one element to the very truth, and where the truth is 0 only the products that cancel, about 4, give a scale.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Comparison = Callable[[str, Tensor, Tensor, Tensor, torch.dtype], None]


@pytest.fixture(autouse=True)
def _seed_and_one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # shapes are tiny: a second thread would only wait
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_worse() -> Comparison:
    """no_worse(name, ours, plain, truth, computed): tensors of one shape, truth in float64."""

    def compare(name: str, ours: Tensor, plain: Tensor, truth: Tensor, computed: torch.dtype) -> None:
        assert ours.shape == truth.shape
        error, allowed = ((x.double() - truth).norm().item() for x in (ours, plain))
        assert truth.isfinite().all()
        step = torch.finfo(computed).eps / 2 * truth.norm().item()
        zero = 4 * torch.finfo(torch.float32).eps * truth.numel() ** 0.5
        assert error <= 2 * allowed + step + zero, f"{name}: {error:.3g}, plain {allowed:.3g}, step {step:.3g}"

    return compare
