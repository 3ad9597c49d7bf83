"""What a frozen layer with its adapter takes in 8 bits and in bf16, in turns: python tools/int8_products.py [REPEATS]

In 8 bits with quantising, scales and the adapter in it; of each shape there are several weights and inputs, so that
they come from memory as in training. Prints JSON: seconds of every sample, and the quartiles of bf16's by those of
8 bits.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from truetune.bench.kernels import machine
from truetune.kernels.int8_linear import available, int8_lora_linears, pack
from truetune.kernels.lora_linear import Layer, lora_linears
from truetune.kernels.native.memory import keep_memory

TOKENS, RANK, COPIES = 2048, 16, 4
SHAPES = ((384, 384), (384, 128), (384, 2304), (2304, 384), (576, 1536), (1536, 576), (896, 4864), (4864, 896))
"""Inputs and outputs."""


def samples(inputs: int, outputs: int, repeats: int) -> dict[str, Any]:
    layers = [
        Layer(
            torch.randn(outputs, inputs).bfloat16(),
            None,
            torch.randn(RANK, inputs).bfloat16(),
            torch.randn(outputs, RANK).bfloat16(),
            1.0,
        )
        for _ in range(COPIES)
    ]
    packed = [pack(layer.weight) for layer in layers]
    x = [torch.randn(TOKENS, inputs).bfloat16() for _ in range(COPIES)]

    def once(bits: int, i: int) -> tuple[Tensor, ...]:
        return int8_lora_linears(x[i], [layers[i]], [packed[i]]) if bits == 8 else lora_linears(x[i], [layers[i]])

    taken: dict[int, list[float]] = {16: [], 8: []}
    with torch.no_grad():
        for r in range(repeats + 1):
            for bits in sorted(taken, reverse=r % 2 == 0):
                started = time.perf_counter()
                for i in range(COPIES):
                    once(bits, i)
                taken[bits].append((time.perf_counter() - started) / COPIES)
    for each in taken.values():
        del each[0]  # of the warm-up
    ratios = [a / b for a, b in zip(taken[16], taken[8], strict=True)]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "bf16_s": taken[16],
        "int8_s": taken[8],
        "gain": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
    }


def main() -> None:
    if not available(torch.device("cpu")):
        raise SystemExit("this needs a CPU with AVX-512 VNNI and a C++ compiler")
    keep_memory()
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    found = [samples(*shape, repeats) for shape in SHAPES]
    measured = machine() | {"command": f"python tools/int8_products.py {repeats}"}
    print(json.dumps({"machine": measured, "tokens": TOKENS, "rank": RANK, "products": found}, indent=1))


if __name__ == "__main__":
    main()
