"""A Triton kernel that is broken on purpose does not pass the lattice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from compared import DTYPES, check

from truetune.kernels.triton import cases, equal

pytestmark = pytest.mark.proof
ATTENTION = {"lengths": (200, 33), "heads": 4, "keys": 2, "head_size": 64}
LOSS = {"rows": 33, "width": 72, "vocabulary": 515}
FEW = {"rows": 7, "width": 16, "vocabulary": 3}
ROPE = {"tokens": 33, "heads": 2, "keys": 1, "head_size": 64}
ROWS = {"rows": 7, "width": 100}
BROKEN: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("a query sees the next key", "packed_attention", "<= query[:, None])", "<= query[:, None] + 1)", ATTENTION),
    ("a query sees other documents", "packed_attention", " & (key[None, :] >= seen[:, None])", "", ATTENTION),
    ("sums are not rescaled", "packed_attention", "total * rescale[:, None]", "total", ATTENTION),
    ("weights are not rescaled", "packed_attention", "weights * rescale +", "weights +", ATTENTION),
    ("a query head is left out", "packed_attention", "key_head * group + group", "key_head * group + 1", ATTENTION),
    ("ds without delta", "packed_attention", "(dp - sums[:, None])", "dp", ATTENTION),
    ("the soft cap's slope is lost", "packed_attention", "1.0 - t * t", "tl.full(s.shape, 1.0, tl.float32)", ATTENTION),
    ("exponentials are not rescaled", "linear_cross_entropy", "* tl.exp(maximum - above)", "", LOSS),
    ("the last tile is dropped", "linear_cross_entropy", "range(first, last, BLOCK_V)",
     "range(first, last - BLOCK_V, BLOCK_V)", LOSS),
    ("entries beyond the end count", "linear_cross_entropy", 'z, float("-inf")), slope', "z, 0.0), slope", FEW),
    ("a column of the head is dropped", "linear_cross_entropy", "range(0, width, BLOCK_D)",
     "range(0, width - 8, BLOCK_D)", LOSS),
    ("the label's one is lost", "linear_cross_entropy", "1.0 - smoothing, 0.0)", "0.0, 0.0)", LOSS),
    ("the mean is over the padded width", "rms_norm", "/ width + eps", "/ WIDTH + eps", ROWS),
    ("dx without its projection", "rms_norm", "(g - n * (", "(g - 0.0 * n * (", ROWS),
    ("the backward turns forward", "rope", "b * cos_b + a * sin_b * SIGN", "b * cos_b + a * sin_b", ROPE),
    ("the backward takes the sines of the forward", "rope", "(0 if SIGN > 0 else pairs)", "0", ROPE),
    ("positions are columns", "rope", "tl.load(positions + token, token < tokens, 0)", "token", ROPE),
    ("silu's slope is its gate", "gated", "slope = gate * (1.0 + x * (1.0 - gate))", "slope = gate", ROWS),
    ("the adapter is left out", "lora_linear", "tl.dot(tile_low, tile_up, total, input_precision=PRECISION)", "total",
     {"rows": 7, "inputs": 100, "outputs": 40, "rank": 4}),
    ("one half is not mirrored", "newton_schulz", "tl.store(y + other[None, :] * rows + row[:, None], total, inside)",
     "tl.store(y + place, total, inside)", {"matrices": 1, "rows": 140, "columns": 150}),
    ("one comparison is left out", "adamw_8bit", "tl.static_range(8)", "tl.static_range(7)", {"sizes": (700, 33)}),
    ("the mean is not corrected", "adamw", "(mean / correction)", "mean", {"sizes": (700, 33)}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("fault", "name", "right", "wrong", "option"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_kernel_is_caught(
    fault: str,
    name: str,
    right: str,
    wrong: str,
    option: dict[str, Any],
    dtype: str,
    no_worse: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = sys.modules[equal(name).__module__]
    text = Path(str(original.__file__)).read_text(encoding="utf-8")
    assert right in text
    (tmp_path / f"{name}.py").write_text(text.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"broken_{name}", tmp_path / f"{name}.py")
    assert spec and spec.loader
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    if hasattr(broken, "PROGRAMS"):
        monkeypatch.setattr(broken, "PROGRAMS", 2)
    softcap = {"softcap": 3.0} if "soft cap" in fault else {}
    case = getattr(cases, name)(DTYPES[dtype], **option, **softcap)
    with pytest.raises(AssertionError, match=name):
        check(name, getattr(broken, name), case, DTYPES[dtype], no_worse)
    check(name, equal(name), case, DTYPES[dtype], no_worse)
