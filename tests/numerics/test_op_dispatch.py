"""Which function an operation runs, and in which dtype."""

import pytest
import torch
from torch import Tensor

from truetune.kernels.op import Op, compute_dtype


@pytest.fixture
def double() -> Op:
    @Op
    def double(factor: int, x: Tensor) -> str:
        """Twice."""
        return "reference"

    @double.on("meta")
    def fast(factor: int, x: Tensor) -> str:
        return "fast"

    return double


def test_the_first_tensor_s_device_chooses(double: Op) -> None:
    on_meta = torch.empty(1, device="meta")
    assert double(2, torch.empty(1)) == "reference"
    assert double(2, on_meta) == "fast"
    assert double(2, x=on_meta) == "fast"
    assert double.reference(2, on_meta) == "reference"
    assert (double.__name__, double.__doc__) == ("double", "Twice.")


def test_the_environment_forces_the_reference(double: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    on_meta = torch.empty(1, device="meta")
    monkeypatch.setenv("TRUETUNE_REFERENCE", "1")
    assert double(2, on_meta) == "reference"
    monkeypatch.setenv("TRUETUNE_REFERENCE", "0")
    assert double(2, on_meta) == "fast"


def test_compute_dtype_is_that_of_a_linear_layer() -> None:
    single, half, double = (torch.ones(2, 2, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float64))
    assert compute_dtype(half, half) == torch.bfloat16
    with pytest.raises(ValueError, match=r"float32, bfloat16.*autocast"):
        compute_dtype(single, half)
    with torch.autocast("cpu", torch.bfloat16):
        for pair in ((single, half), (half, single), (double, double)):
            assert compute_dtype(*pair) == torch.nn.functional.linear(*pair).dtype
