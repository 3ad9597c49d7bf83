"""Memory that tensors keep: pieces never overlap, join again when freed, and few products stay prepared."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from truetune.kernels.native.build import kernels

compiled = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

GROWTH = """
import json, os, re, sys, torch
from truetune.kernels.native.build import kernels
from truetune.kernels.native.memory import keep_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
keep_memory()
weight, x = torch.randn(256, 1024).bfloat16(), torch.randn(2048, 256).bfloat16()
before = resident()
for tokens in range(1024, 1024 + 300):
    x[:tokens] @ weight
print(json.dumps({"grown": resident() - before, "held": kernels().memory_held()[0],
                  "capacities": [os.environ[n] for n in sys.argv[1:] if n in os.environ]}))
"""
CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture
def kept() -> Iterator[Any]:
    """The library, whose allocator is in place."""
    library = kernels()
    assert library
    library.keep_memory(True)
    yield library
    library.keep_memory(False)


@compiled
def test_pieces_do_not_overlap(kept: Any) -> None:
    chance, alive = random.Random(0), []
    for number in range(400):
        elements = chance.choice((1, 1000, 16384, 16385, 40_001, 300_000, 9_000_000))
        tensor = torch.full((elements,), float(number))
        assert tensor.data_ptr() % 64 == 0
        alive.append((number, tensor))
        if len(alive) > 12:
            for _ in range(chance.randrange(1, 12)):
                alive.pop(chance.randrange(len(alive)))
        for was, found in alive:
            assert bool((found == was).all())
    alive.clear()
    del tensor, found


@compiled
def test_freed_pieces_join_and_are_used_again(kept: Any) -> None:
    before = kept.memory_held()
    tensors = [torch.empty(1 << 18) for _ in range(6)]
    places = [t.data_ptr() for t in tensors]
    assert kept.memory_held()[0] - kept.memory_held()[1] == before[0] - before[1] + 6 * (1 << 20)
    for i in (1, 3, 0, 5, 2, 4):  # a neighbour before, after, on both sides, on none
        tensors[i] = torch.empty(0)
    assert kept.memory_held()[0] - kept.memory_held()[1] == before[0] - before[1]
    assert torch.empty(6 << 18).data_ptr() == min(places)
    many = kept.memory_held()[0]
    for _ in range(50):
        torch.empty(6 << 18)
    assert kept.memory_held()[0] == many


@compiled
def test_what_is_free_can_be_given_back_and_used_again(kept: Any) -> None:
    resident = psutil.Process().memory_info
    alive, large = torch.ones(1 << 20), torch.ones(1 << 26)
    before = resident().rss
    del large
    kept.release_memory()
    assert before - resident().rss > 200 << 20
    assert bool((alive == 1).all()) and bool((torch.ones(1 << 26) == 1).all())


@compiled
def test_many_threads_at_once(kept: Any) -> None:
    def work(number: int) -> bool:
        chance, right = random.Random(number), True
        for _ in range(200):
            tensor = torch.full((chance.randrange(16384, 90_000),), number)
            right &= bool((tensor == number).all())
        return right

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


@compiled
def test_what_was_allocated_before_is_freed_as_it_was() -> None:
    library = kernels()
    assert library
    plain = torch.ones(1 << 20)
    library.keep_memory(True)
    own = torch.ones(1 << 20)
    del plain
    library.keep_memory(False)
    taken = library.memory_held()[1]
    del own
    assert library.memory_held()[1] == taken + (4 << 20)


@compiled
def test_few_products_stay_prepared_and_it_can_be_turned_off() -> None:
    def grown(**environment: str) -> Any:
        clean = {name: value for name, value in os.environ.items() if name not in CACHES}
        command = [sys.executable, "-c", GROWTH, *CACHES]
        return json.loads(subprocess.check_output(command, env=clean | environment, text=True))

    bounded, off = grown(), grown(TRUETUNE_OFF="kept_memory")
    assert bounded["held"] > 0 and off["held"] == 0
    assert bounded["capacities"] == ["64", "64"] and off["capacities"] == []
    assert bounded["grown"] < off["grown"] / 2
    assert grown(LRU_CACHE_CAPACITY="7")["capacities"] == ["64", "7"]
