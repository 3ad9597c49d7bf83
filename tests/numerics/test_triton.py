"""The lattice: every Triton kernel in every dtype on awkward shapes, in the interpreter, against float64.

One rule for all: the error of every output and every gradient is at most twice that of the reference in the same dtype.
A few points run in every test run, the whole lattice as a proof.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compared import DTYPES, check, in_float64, results
from interpreted import exact
from torch import Tensor

from truetune.kernels.triton import KERNELS, cases, equal, launch

ROWS = [{"rows": 1, "width": 1}, {"rows": 7, "width": 100}, {"rows": 33, "width": 515}]
LATTICE: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [s | o for s in ROWS for o in ({}, {"residual": True}, {"offset": 1.0})]
    + [{"rows": 2, "width": 1025}, {"rows": 2, "width": 4097, "residual": True, "offset": 1.0}],
    "rope": [
        {"tokens": t, "heads": h, "keys": k, "head_size": d, "interleaved": i}
        for t, h, k in ((1, 1, 1), (33, 6, 2))
        for d in (64, 80, 96, 128, 256)
        for i in (False, True)
    ]
    + [{"tokens": 7, "heads": 2, "keys": 1, "head_size": 80, "rotated": 0.4, "interleaved": i} for i in (False, True)]
    + [{"tokens": 7, "heads": 2, "keys": 1, "head_size": 64, "positioned": False}],
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
    "packed_attention": [
        {"lengths": n, "heads": h, "keys": k, "head_size": d} | o
        for n, h, k, d in (
            ((1,), 1, 1, 64),
            ((7, 1, 70), 4, 2, 80),
            ((200, 33), 3, 1, 96),
            ((130, 5), 2, 2, 128),
            ((33, 70), 2, 1, 256),
            ((9, 9), 2, 2, 8),
        )
        for o in ({}, {"window": 9}, {"softcap": 2.0}, {"window": 33, "softcap": 3.0})
    ]
    + [{"lengths": (5, 60), "head_size": 24, "value_size": 40}],
    "lora_linear": [
        {"rows": t, "inputs": i, "outputs": o, "rank": r, "bias": b}
        for t, i, o, r in ((1, 8, 3, 1), (7, 100, 40, 4), (33, 515, 72, 33), (130, 72, 260, 16))
        for b in (False, True)
    ],
    "newton_schulz": [
        {"matrices": b, "rows": m, "columns": n} for b, m, n in ((1, 1, 1), (3, 7, 100), (2, 72, 33), (1, 140, 150))
    ],
    "adamw": [
        {"sizes": sizes, "step": step, "weight_decay": decay}
        for sizes in ((1,), (700, 1, 1025, 2048, 33))
        for step, decay in ((1, 0.0), (1000, 0.1))
    ]
    + [
        {"sizes": (700, 1, 1025), "counted": True},
        {"sizes": (1025, 3), "held": 0.0},
        {"sizes": (1025, 3), "held": 1.0},
    ],
    "adamw_8bit": [
        {"sizes": sizes, "step": step, "weight_decay": decay}
        for sizes in ((1,), (700, 1, 257, 512, 33))
        for step, decay in ((1, 0.0), (1000, 0.1))
    ]
    + [{"sizes": (100, 33), "block": 32}, {"sizes": (100, 33), "block": 24}],
    "gated": [s | {"activation": a} for s in ROWS for a in ("silu", "gelu", "gelu_tanh")],
}
QUICK = {
    "rms_norm": [4, 7],
    "rope": [17, 20, 22],
    "gated": [3, 4, 5],
    "packed_attention": [4, 5, 22],
    "lora_linear": [3, 5],
    "newton_schulz": [2],
    "adamw": [3, 4, 6],
    "adamw_8bit": [3, 4],
    "linear_cross_entropy": [10, 13, 16, 20],
}
"""Numbers of the points that every test run tries."""


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
                for target in ("sm_90", "gfx942"):  # between them all tiles of the configurations
                    marks = [] if number in QUICK[name] and target == "sm_90" else [pytest.mark.proof]
                    label = ",".join(f"{key}={value}" for key, value in option.items())
                    yield pytest.param(name, dtype, target, option, id=f"{name}-{dtype}-{target}-{label}", marks=marks)


@pytest.mark.parametrize(("name", "dtype", "target", "option"), list(points()))
def test_a_kernel_is_as_right_as_its_reference(
    name: str, dtype: str, target: str, option: dict[str, Any], no_worse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", target)
    case = getattr(cases, name)(DTYPES[dtype], **option)
    check(name, equal(name), case, DTYPES[dtype], no_worse)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "packed_attention", "lora_linear"])
def test_under_autocast_it_is_as_right_as_its_reference(name: str, no_worse: Any) -> None:
    """Those on the product's path, with fp32 tensors as full fine-tuning has them."""
    case = getattr(cases, name)(torch.float32, **LATTICE[name][5])
    truth = results(KERNELS[name].reference, in_float64(case))
    with exact(), torch.autocast("cpu", torch.bfloat16):
        ours, plain = results(equal(name), case), results(KERNELS[name].reference, case)
    for part in truth:
        assert ours[part].dtype == plain[part].dtype, part
        no_worse(part, ours[part], plain[part], truth[part], torch.bfloat16)
    assert any((ours[part] - truth[part]).norm() > 1e-4 * truth[part].norm() for part in truth), "it was not in bf16"


def test_what_a_kernel_leaves_out_is_torch_s(no_worse: Any) -> None:
    attention = cases.packed_attention(torch.float32, lengths=(5, 20), heads=2, keys=1, head_size=16)
    attention.arguments["sinks_H"] = torch.randn(2)
    check("packed_attention", equal("packed_attention"), attention, torch.float32, no_worse)
    loss = cases.linear_cross_entropy(torch.float32, rows=9, width=16, vocabulary=50)
    loss.arguments.update(low_NR=torch.randn(9, 4), up_VR=torch.randn(50, 4), z_loss=0.1)
    check("linear_cross_entropy", equal("linear_cross_entropy"), loss, torch.float32, no_worse)


def test_views_are_read_by_their_strides() -> None:
    """Every other row of larger tensors, and transposed ones, as models hand them over."""
    loss = cases.linear_cross_entropy(torch.float32, rows=14, width=16, vocabulary=50, weighted=True)
    attention = cases.packed_attention(torch.float32, lengths=(5, 20), heads=4, keys=2, head_size=16)
    lora = cases.lora_linear(torch.float32, rows=20, inputs=12, outputs=40, rank=4)
    turned = cases.rope(torch.float32, tokens=20, heads=4, keys=2, head_size=16)
    parts: list[tuple[str, Any, dict[str, Any]]] = [
        ("linear_cross_entropy", loss, {n: loss.arguments[n][::2] for n in ("hidden_ND", "labels_N", "weights_N")}),
        (
            "packed_attention",
            attention,
            {n: attention.arguments[n].flip(0).mT.contiguous().mT for n in attention.trained},
        ),
        ("lora_linear", lora, {"x": lora.arguments["x"].T.contiguous().T[::2]}),
        ("rope", turned, {"positions_T": turned.arguments["positions_T"].repeat_interleave(2)[::2]}),
    ]
    for name, case, views in parts:
        assert not all(v.is_contiguous() for v in views.values())
        plain = KERNELS[name].reference(**case.arguments | views)
        with exact():
            ours = equal(name)(**case.arguments | views)
        pairs = zip(ours, plain, strict=True) if isinstance(ours, tuple) else [(ours, plain)]
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_label_beyond_the_vocabulary_is_no_number() -> None:
    case = cases.linear_cross_entropy(torch.float32, rows=3, width=16, vocabulary=50)
    case.arguments["labels_N"][1] = 50
    with exact():
        terms = equal("linear_cross_entropy")(**case.arguments)
    assert terms.total.isnan() and terms.losses.isnan().tolist() == [False, True, False]


def rounded_at_random(name: str, kernel: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Weights in bf16 after a step of everything alike, and what they would be in fp32."""
    p, ends = torch.linspace(-2, 2, 3001), []
    for dtype in (torch.bfloat16, torch.float32):
        case = getattr(cases, name)(dtype, sizes=(3001,), step=1, weight_decay=0.0)
        for argument in case.changed:
            case.arguments[argument][0].zero_()
        case.arguments["parameters"][0].copy_(p.bfloat16())
        case.arguments.update(rate=1e-3, seeds=[seed])
        case.arguments["gradients"][0].fill_(1.0)
        with exact():
            (equal(name) if kernel else KERNELS[name].reference)(**case.arguments)
        ends.append(case.arguments["parameters"][0])
    return ends[0].float(), ends[1]


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("seed", [1, 2])
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(seed: int, name: str, kernel: bool) -> None:
    found, wanted = rounded_at_random(name, kernel, seed)
    step = torch.maximum(wanted.abs(), torch.tensor(2.0**-126)) * 2**-7
    assert ((found - wanted).abs() <= step).all()
    errors = (found - wanted) / step
    assert abs(errors.mean()) < 4 * errors.std() / 3001**0.5
    assert torch.equal(found, rounded_at_random(name, kernel, seed)[0])
    assert not torch.equal(found, rounded_at_random(name, kernel, seed + 10)[0])
    assert (wanted.bfloat16().float() - wanted).mean() > 1e-4  # to the nearest it stalls, or leans


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_tensor_is_rounded_alike_in_whatever_list_it_stands(name: str) -> None:
    """As weights that move within the backward pass are, part by part."""
    ends = []
    for part in (slice(0, 2), slice(1, 2)):
        torch.manual_seed(0)
        case = getattr(cases, name)(torch.bfloat16, sizes=(1500, 700), rounded=True)
        lists = {key: v[part] if isinstance(v, list) else v for key, v in case.arguments.items()}
        with exact():
            equal(name)(**lists)
        ends.append(lists["parameters"][-1])
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_tensors_that_are_not_contiguous_are_the_reference_s(name: str) -> None:
    ends = []
    for function in (equal(name), KERNELS[name].reference):
        torch.manual_seed(0)
        case = getattr(cases, name)(torch.float32, sizes=(48,))
        case.arguments["parameters"] = [torch.randn(8, 6).T]
        for argument in ("gradients", "means", "variances"):
            if argument in case.arguments:
                case.arguments[argument] = [case.arguments[argument][0].view(6, 8)]
        with exact():
            function(**case.arguments)
        ends.append(case.arguments["parameters"][0])
    assert torch.equal(*ends)


def test_the_lattice_holds_every_kernel() -> None:
    assert LATTICE.keys() == QUICK.keys() == KERNELS.keys()
