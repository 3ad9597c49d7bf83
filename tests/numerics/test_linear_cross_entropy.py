"""Head and loss in one against plain torch, in value, gradient and memory."""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from truetune.kernels import LossTerms, linear_cross_entropy

# The package exports the operation under the name of its module.
module = sys.modules["truetune.kernels.linear_cross_entropy"]

SHAPES = [(1, 8, 3), (7, 16, 100), (33, 64, 515), (130, 24, 257)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"scale": 0.25},
    {"softcap": 3.0},
    {"bias": True, "scale": 2.0, "softcap": 5.0},
    {"softcap": 5.0, "z_loss": 0.1, "smoothing": 0.2},
]
PRECISIONS = ["fp32", "bf16", "autocast"]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool = False) -> list[Tensor]:
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).div(width**0.5).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,))
    return [hidden, weight, labels, *([torch.randn(vocabulary).to(dtype).requires_grad_()] if bias else [])]


def results(op: Callable[..., LossTerms], tensors: list[Tensor], **options: Any) -> dict[str, Tensor]:
    terms = op(*tensors, **options)
    trained = {k: t for k, t in zip(("hidden", "weight", "", "bias"), tensors, strict=False) if k}
    gradients = torch.autograd.grad(terms.total * 0.37, tuple(trained.values()))
    return {"losses": terms.losses, "total": terms.total.detach()} | dict(zip(trained, gradients, strict=True))


@pytest.fixture(params=["one chunk", "three rows a chunk"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one chunk":
        monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 515 * 4)


@pytest.fixture(params=["compiled", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("TRUETUNE_OFF", "native_cross_entropy")


@pytest.mark.usefixtures("_chunks", "_path")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain_torch(
    shape: tuple[int, int, int], precision: str, options: dict[str, Any], weighted: bool, no_worse: Any
) -> None:
    options = dict(options) | ({"weights_N": torch.rand(shape[0]) * 3} if weighted else {})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tensors = inputs(shape, dtype, options.pop("bias", False))
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    truth = results(linear_cross_entropy.reference, exact, **options)
    cast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    with cast:
        ours = results(linear_cross_entropy, tensors, **options)
        plain = results(linear_cross_entropy.reference, tensors, **options)
    for name in truth.keys() - {"total"}:
        assert ours[name].dtype == plain[name].dtype
        computed = torch.float32 if precision == "fp32" else torch.bfloat16
        no_worse(name, ours[name], plain[name], truth[name], computed)
    # A sum of rounding errors is as long as their vector when none of them leans.
    spread = (
        (2 if weighted else 1) * (plain["losses"].double() - truth["losses"]).norm()
        + 1e-7 * truth["total"].abs()
        + 1e-6
    )
    assert (ours["total"].double() - truth["total"]).abs() <= 3 * spread


def test_in_float64_it_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    tensors = inputs((11, 8, 50), torch.float64, bias=True)
    ours, truth = (
        results(op, tensors, scale=0.5, softcap=2.0) for op in (linear_cross_entropy, linear_cross_entropy.reference)
    )
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows_in_a_chunk", [1, 100])
def test_weights_scale_each_row_and_nothing_else(rows_in_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_in_a_chunk * 50 * 8)
    hidden, weight, labels, bias = inputs((6, 8, 50), torch.float64, bias=True)
    weights = torch.tensor([1.0, 0.0, 2.5, 1.0, 0.125, 3.0])
    for op in (linear_cross_entropy, linear_cross_entropy.reference):
        found = results(op, [hidden, weight, labels, bias], softcap=2.0, weights_N=weights)
        rows = [results(op, [hidden, weight, labels, bias], softcap=2.0, weights_N=torch.eye(6)[i]) for i in range(6)]
        for name in ("total", "hidden", "weight", "bias"):
            wanted = sum(w * row[name] for w, row in zip(weights.double(), rows, strict=True))
            torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=1e-14)
        plain = results(op, [hidden, weight, labels, bias], softcap=2.0)
        torch.testing.assert_close(found["losses"], plain["losses"], rtol=0, atol=0)
        ones = results(op, [hidden, weight, labels, bias], softcap=2.0, weights_N=torch.ones(6))
        assert all(torch.equal(ones[name], plain[name]) for name in plain)


def test_no_rows_give_zero() -> None:
    hidden, weight, labels, bias = inputs((0, 8, 5), torch.float32, bias=True)
    terms = linear_cross_entropy(hidden, weight, labels, bias, softcap=2.0, weights_N=torch.ones(0))
    terms.total.backward()
    assert terms.total.item() == 0 and terms.losses.shape == terms.correct.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    for parameter in (weight, bias):
        assert parameter.grad is not None and not parameter.grad.any()


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels, bias = inputs((9, 8, 5), torch.float32, bias=True)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, bias).total.backward()
    assert weight.grad is None and bias.grad is None and hidden.grad is not None and hidden.grad.any()
    frozen = linear_cross_entropy(hidden.detach(), weight, labels, bias)
    assert not frozen.total.requires_grad


def test_without_gradients_the_values_are_the_same() -> None:
    tensors = inputs((9, 8, 50), torch.float32)
    terms = linear_cross_entropy(*tensors)
    with torch.no_grad():
        alone = linear_cross_entropy(*tensors)
    assert terms.total.requires_grad and not alone.total.requires_grad
    assert not terms.losses.requires_grad
    for ours, theirs in zip(terms, alone, strict=True):
        assert torch.equal(ours, theirs)


def test_a_hit_is_the_single_largest_logit() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 3.0, 0.0], [0.0, 5.0, 1.0], [-1.0, -1.0, -0.5]])
    labels = torch.tensor([0, 0, 2, 2])
    for op in (linear_cross_entropy, linear_cross_entropy.reference):
        assert op(logits, torch.eye(3), labels).correct.tolist() == [True, False, False, True]


def test_an_impossible_label_costs_its_distance() -> None:
    hidden = torch.tensor([[400.0, 0.0]], requires_grad=True)
    terms = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    terms.total.backward()
    assert terms.total.item() == 400
    assert hidden.grad is not None and hidden.grad.tolist() == [[1.0, -1.0]]


def test_a_second_backward_is_refused() -> None:
    total = linear_cross_entropy(*inputs((4, 8, 5), torch.float32)).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


def test_gradients_accumulate_over_calls() -> None:
    hidden, weight, labels = inputs((8, 8, 5), torch.float32)
    linear_cross_entropy(hidden, weight, labels).total.backward()
    assert weight.grad is not None
    whole = weight.grad.clone()
    weight.grad = None
    for half in (slice(0, 3), slice(3, 8)):
        linear_cross_entropy(hidden[half], weight, labels[half]).total.backward()
    torch.testing.assert_close(weight.grad, whole)


MEASURE = """
import sys, torch
from truetune.kernels import linear_cross_entropy

def mebibytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

rows, width, *vocabularies = map(int, sys.argv[1:])
dtypes = (torch.float32, torch.bfloat16)
for dtype in dtypes:
    for vocabulary in vocabularies:
        weight = torch.full((vocabulary, width), 0.01, dtype=dtype)
        hidden = torch.ones(rows, width, dtype=dtype, requires_grad=True)
        labels = torch.arange(rows)
        torch.mm(hidden.detach()[:4], weight[:4].T)
        open("/proc/self/clear_refs", "w").write("5")
        before = mebibytes("VmRSS")
        terms = linear_cross_entropy(hidden, weight, labels)
        terms.total.backward()
        outputs = (hidden.grad.nbytes + terms.losses.nbytes + terms.correct.nbytes) / 2**20
        print(mebibytes("VmHWM") - before - outputs)
        del weight, hidden, labels, terms
"""


def _beyond_inputs_and_outputs(*sizes: int) -> list[float]:
    command = [sys.executable, "-c", MEASURE, *map(str, sizes)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "sizes",
    [(512, 64, 151_936, 303_872), pytest.param((8192, 896, 151_936, 303_872), marks=pytest.mark.proof)],
    ids=str,
)
def test_memory_does_not_grow_with_the_vocabulary(sizes: tuple[int, ...]) -> None:
    single, single_twice, half, half_twice = _beyond_inputs_and_outputs(*sizes)
    # One row of fp32 logits is 0.6 MiB, so a chunk's size jumps by at most that when the vocabulary doubles.
    for first, twice in ((single, single_twice), (half, half_twice)):
        assert 20 < first < 300 and twice < first + 32
