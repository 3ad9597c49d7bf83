"""Attention that was broken on purpose is seen by what its numerics are tested with."""

import shutil
from pathlib import Path

import pytest
import torch
from attended import HEADS, OPTIONS, PACKS, worse

from truetune.kernels.native.build import FLAGS, SOURCES, kernels, load

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(kernels() is None, reason="no native attention on this machine"),
]

FAULTS = {
    "future": ("items.h", "(distance >= 0)", "(distance >= -1)"),
    "window": ("items.h", "(distance < static_cast", "(distance <= static_cast"),
    "rescale": ("forward.h", "load<Vec>(at) * shrink", "load<Vec>(at)"),
    "last": ("forward.h", "key < item.end; key += KEYS", "key < item.first || key == 0; key += KEYS"),
    "part": ("backward.h", "item != items + count", "item != items + count - 1"),
    "lse": ("forward.h", "top[r] + std::log2(sum[r])", "top[r]"),
    "block": ("backward.h", "keys.dk + (block + c)", "keys.dk + (c)"),
}
"""Name -> file, what is there, what is put in its place."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, tmp_path: Path) -> None:
    name, right, wrong = FAULTS[fault]
    broken = tmp_path / "sources"
    shutil.copytree(SOURCES, broken)
    text = (broken / name).read_text(encoding="utf-8")
    assert text.count(right) == 1
    (broken / name).write_text(text.replace(right, wrong), encoding="utf-8")
    libraries = {fault: load(broken, f"truetune_{fault}", (*FLAGS, "-O1"))}
    cases = [(lengths, options) for lengths in PACKS for options in ({}, *OPTIONS)]
    cases.append(((20, 1400, 5), {}))
    torch.manual_seed(0)
    assert any(worse(libraries, HEADS[0], lengths, torch.float32, options, 0.15) for lengths, options in cases)
