"""The filter of the chunked loss merges what the rule says and no more, with and without compiled code."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from truetune.kernels import LossTerms, linear_cross_entropy
from truetune.kernels.linear_cross_entropy import FEW, filter_threshold
from truetune.kernels.product import products

# The package exports the operation under the name of its module.
module = sys.modules["truetune.kernels.linear_cross_entropy"]
ROWS, WIDTH, VOCABULARY, RANK = 48, 32, 1000, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights_N": torch.linspace(0, 3, ROWS)},
    {"scale": 1.5, "softcap": 30.0},
    {"bias_V": torch.linspace(-1, 1, VOCABULARY)},
]


class Merged(NamedTuple):
    """gradients by name; of each block, [V], which entries count, and which are too near the threshold to say."""

    gradients: dict[str, Tensor]
    counts: list[Tensor]
    unsure: list[Tensor]


def peaked(dtype: torch.dtype = torch.bfloat16, adapted: bool = False) -> dict[str, Tensor]:
    """Each row is sure of one of four entries far apart, less so in later rows, and the first rows are wrong. The
    logits of the rest fall by 12 from the first entry to the last."""
    *directions, common = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q[:5]
    row, entries = torch.arange(ROWS), torch.arange(4) * 256 + 5
    sure = torch.linspace(2.2, 1.2, ROWS)[:, None] * torch.stack(directions)[row % 4]
    hidden = sure + 2 * common + 0.1 * torch.randn(ROWS, WIDTH)
    weight = 0.1 * torch.randn(VOCABULARY, WIDTH) - torch.linspace(0, 6, VOCABULARY)[:, None] * common
    weight[entries] = 4 * torch.stack(directions)
    made = {
        "hidden_ND": hidden.to(dtype).requires_grad_(),
        "weight_VD": weight.to(dtype).requires_grad_(),
        "labels_N": entries[(row + (row < 8)) % 4],
    }
    adapter = (torch.randn(ROWS, RANK), torch.randn(VOCABULARY, RANK) * 0.2)
    pairs = zip(("low_NR", "up_VR"), adapter, strict=True)
    return made | ({name: t.to(dtype).requires_grad_() for name, t in pairs} if adapted else {})


def results(tensors: dict[str, Tensor], **options: Any) -> tuple[LossTerms, dict[str, Tensor]]:
    terms = linear_cross_entropy(**tensors, **options)
    trained = {name: t for name, t in (tensors | options).items() if isinstance(t, Tensor) and t.requires_grad}
    return terms, dict(zip(trained, torch.autograd.grad(terms.total, tuple(trained.values())), strict=True))


def by_definition(tensors: dict[str, Tensor], options: dict[str, Any], threshold: float, rows: int) -> Merged:
    """In float64, from slopes of which, in blocks of rows, what is small is merged; logits are rounded as ours are."""
    plain = {name: t.detach() for name, t in tensors.items()}
    lefts, rights = (names[: 1 + ("low_NR" in plain)] for names in (("hidden_ND", "low_NR"), ("weight_VD", "up_VR")))
    product = products([plain[name] for name in lefts], [plain[name] for name in rights])
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    z = scale * (product.double() + options.get("bias_V", torch.zeros(1)).double())
    t = torch.tanh(z / softcap) if softcap else torch.zeros_like(z)
    onehot = torch.nn.functional.one_hot(plain["labels_N"], VOCABULARY)
    d = (softcap * t if softcap else z).softmax(1) - onehot
    slopes = d * scale * (1 - t * t) * options.get("weights_N", torch.ones(ROWS))[:, None].double()
    counts, unsure = [], []
    for block, own, labels in zip(slopes.split(rows), d.abs().split(rows), onehot.split(rows), strict=True):
        most = own.masked_fill(labels.bool(), 0).amax(0)
        count = (most >= threshold) | labels.any(0)
        rest = block * ~count
        block[:, ~count] = (rest.sum(1, keepdim=True) * rest.sum(0) / rest.sum().clamp_min(1e-300))[:, ~count]
        counts.append(count)
        unsure.append((most / threshold - 1).abs() < 0.01)
    others = {"hidden_ND": "weight_VD", "low_NR": "up_VR"}
    found: dict[str, Tensor] = {}
    for left, right in others.items():
        if left in plain:
            found |= {left: slopes @ plain[right].double(), right: slopes.T @ plain[left].double()}
    return Merged(found, counts, unsure)


@pytest.fixture(params=["compiled", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("TRUETUNE_OFF", "native_cross_entropy")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The entries that each chunk keeps, as it is found; None for all."""
    found: list[Tensor | None] = []
    merged = module._Sweep._merged

    def noted(*arguments: Any) -> Any:
        slopes = merged(*arguments)
        found.append(slopes.kept_K)
        return slopes

    monkeypatch.setattr(module._Sweep, "_merged", noted)
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("rows", [48, 12], ids=["one block", "four"])
@pytest.mark.parametrize("adapted", [False, True], ids=["head", "adapted"])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_what_is_small_in_a_block_is_merged_and_nothing_else(
    options: dict[str, Any], adapted: bool, rows: int, kept: list[Tensor | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILTERED_ROWS", rows)
    tensors = peaked(adapted=adapted)
    truth, counts, unsure = by_definition(tensors, options, filter_threshold(torch.bfloat16), rows)
    exact, gradients = results(tensors, **options)
    assert kept == [None]
    kept.clear()
    filtered, found = results(tensors, **options, filtered=True)
    for ours, theirs in zip(filtered, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for entries_K, count_V, unsure_V in zip(kept, counts, unsure, strict=True):
        assert entries_K is not None and 4 <= len(entries_K) < FEW * VOCABULARY
        chosen_V = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, entries_K, True)
        assert not ((chosen_V != count_V) & ~unsure_V).any()
    for name, gradient in truth.items():
        assert relative(found[name], gradient) < 0.01, name
        assert 1e-4 < relative(found[name], gradients[name]) < 0.05, name


@pytest.mark.parametrize("rows", [48, 12], ids=["one block", "four"])
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_in_float64_it_is_the_formula_and_keeps_both_sums(
    options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILTERED_ROWS", rows)
    monkeypatch.setattr(module, "filter_threshold", lambda _: 1e-3)
    tensors = peaked(torch.float64, adapted=True)
    truth = by_definition(tensors, options, 1e-3, rows).gradients
    exact, found = (results(tensors, **options, filtered=f)[1] for f in (False, True))
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        assert 1e-5 < relative(found[name], exact[name]) < 0.02
        torch.testing.assert_close(found[name].sum(0), exact[name].sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_path")
def test_of_frozen_tensors_nothing_is_computed_and_the_rest_is_the_same() -> None:
    tensors = peaked()
    both = results(tensors, filtered=True)[1]
    tensors["weight_VD"].requires_grad_(False)
    alone = results(tensors, filtered=True)[1]
    assert alone.keys() == {"hidden_ND"} and torch.equal(alone["hidden_ND"], both["hidden_ND"])


def test_without_a_compiler_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = peaked(torch.float32)
    monkeypatch.setattr(module, "filter_threshold", lambda _: 1e-3)  # that of fp32 leaves out nothing here
    exact, first = results(tensors)[1], results(tensors, filtered=True)[1]
    monkeypatch.setenv("TRUETUNE_OFF", "native_cross_entropy")
    for name, gradient in results(tensors, filtered=True)[1].items():
        assert relative(gradient, exact[name]) > 1e-4
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_the_gradient_of_a_bias_is_whole() -> None:
    tensors, bias = peaked(), torch.zeros(VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    exact, filtered = (results(tensors, bias_V=bias, filtered=f)[1] for f in (False, True))
    assert torch.equal(exact["bias_V"], filtered["bias_V"])
    assert not torch.equal(exact["hidden_ND"], filtered["hidden_ND"])


@pytest.mark.usefixtures("_path")
def test_where_most_entries_count_all_are_multiplied(kept: list[Tensor | None]) -> None:
    made = {"hidden_ND": torch.randn(ROWS, WIDTH), "weight_VD": torch.randn(VOCABULARY, WIDTH) / WIDTH}
    tensors = {name: t.bfloat16().requires_grad_() for name, t in made.items()}
    tensors["labels_N"] = torch.randint(0, VOCABULARY, (ROWS,))
    exact, filtered = (results(tensors, filtered=f)[1] for f in (False, True))
    assert kept == [None, None]
    assert all(torch.equal(exact[name], filtered[name]) for name in exact)


@pytest.mark.usefixtures("_path")
def test_what_is_no_number_is_never_left_out() -> None:
    tensors = peaked()
    with torch.no_grad():
        tensors["hidden_ND"][11, 3] = torch.nan
    exact, found = (results(tensors, filtered=f)[1] for f in (False, True))
    assert found["hidden_ND"][11].isnan().all() and not found["hidden_ND"][:10].isnan().any()
    for name in exact:  # some processors' products spread it to the row before
        assert torch.equal(found[name].isnan(), exact[name].isnan())


def test_without_gradients_nothing_is_noted(kept: list[Tensor | None]) -> None:
    tensors = peaked()
    with torch.no_grad():
        alone = linear_cross_entropy(**tensors, filtered=True)
    assert not kept
    for ours, theirs in zip(alone, linear_cross_entropy(**tensors), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{"smoothing": 0.1}, {"z_loss": 0.01}], ids=" ".join)
def test_slopes_of_either_sign_are_not_merged(options: dict[str, float], kept: list[Tensor | None]) -> None:
    tensors = peaked()
    exact, filtered = (results(tensors, **options, filtered=f)[1] for f in (False, True))
    assert kept == [None, None]
    assert all(torch.equal(exact[name], filtered[name]) for name in exact)


@pytest.mark.usefixtures("_path")
def test_rows_that_are_quite_sure_have_nothing_to_merge() -> None:
    made = {"hidden_ND": 100 * torch.eye(8), "weight_VD": torch.eye(8).repeat_interleave(2, 0)}
    made["weight_VD"][1::2] = 0
    tensors = {name: t.bfloat16().requires_grad_() for name, t in made.items()} | {"labels_N": torch.arange(8) * 2}
    _, found = results(tensors, filtered=True)
    assert not found["hidden_ND"].any() and not found["weight_VD"].any()
